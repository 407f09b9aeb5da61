"""The main job with language models: full output layers bit for bit, and what the other modes say and leave."""

import json
import math
import shutil
import warnings

import numpy as np
import pytest
import torch
import transformers
from models import FULL_SIZE
from runs import assert_same_run
from safetensors.torch import load_file
from texts import (
    CHAT_TEMPLATE,
    SPECIAL,
    chats,
    files_in,
    ids_of,
    language_tokenizer,
    pairs,
    save_language_model,
    save_pretrained,
    small_tokenizer,
    texts,
    write,
    write_language_splits,
)

from leanvocab.errors import DataError, LeanVocabError, LeanVocabWarning, ModelError, SettingsError
from leanvocab.finetune.job import finetune
from leanvocab.finetune.settings import FineTuneSettings

QUICK = {"epochs": 1, "batch_size": 6, "learning_rate": 1e-2, "logging_steps": 1, "max_length": 32, "cpu": True}
AUTO = {
    "causal-lm": transformers.AutoModelForCausalLM,
    "seq2seq-lm": transformers.AutoModelForSeq2SeqLM,
    "masked-lm": transformers.AutoModelForMaskedLM,
}
# Every task with a family that can be untied, and what it reads.
UNTIED = [
    ("causal-lm", "llama", texts),
    ("causal-lm", "gpt2", pairs),
    ("seq2seq-lm", "bart", pairs),
    ("masked-lm", "bert", texts),
]
TIED = [*UNTIED, ("causal-lm", "llama", pairs), ("seq2seq-lm", "t5", pairs)]  # transformers ties every T5


def name_of(value):
    return getattr(value, "__name__", str(value))


def settings(task, **knobs):
    return FineTuneSettings(task=task, **QUICK | knobs)


def run(base, data, output_dir, task, **knobs):
    """A run in which a restricted output layer may warn, and nothing else may."""
    with warnings.catch_warnings():
        if knobs.get("output") == "restricted":
            warnings.simplefilter("ignore", LeanVocabWarning)
        return finetune(base, data, output_dir, settings(task, **knobs))


def both(base, data, tmp_path, task, **knobs):
    """The same run with the full and with the partial vocabulary and a full output layer."""
    full = run(base, data, tmp_path / "full", task, full_vocabulary=True, **knobs)
    return full, run(base, data, tmp_path / "partial", task, output="full", **knobs)


def weights(folder):
    return load_file(folder / "model.safetensors")


# --- full: the training of the full model -----------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "family", "make"), UNTIED, ids=name_of)
def test_an_untied_model_with_a_full_output_layer_is_that_of_ordinary_fine_tuning(tmp_path, task, family, make):
    base = save_language_model(tmp_path / "base", family)
    full, partial = both(base, write_language_splits(tmp_path / "data", make), tmp_path, task)
    assert_same_run(full, partial)
    assert (full.output, partial.output) == (None, "full")
    assert set(partial.scores) == {"loss", "perplexity", "accuracy"}
    assert partial.num_parameters < full.num_parameters
    assert partial.memory.partial.num_parameters == partial.num_parameters
    assert len(partial.losses) == partial.num_steps == 4
    loaded = AUTO[task].from_pretrained(tmp_path / "partial")
    assert loaded.get_input_embeddings().num_embeddings == FULL_SIZE


@pytest.mark.parametrize(
    ("task", "family", "make", "knobs"),
    [
        ("causal-lm", "llama", texts, {"packing": True}),
        ("causal-lm", "llama", pairs, {"packing": True}),
        ("causal-lm", "llama", pairs, {"train_on_prompts": True, "gradient_accumulation_steps": 2, "warmup": 0.5}),
        ("causal-lm", "llama", pairs, {"weight_decay": 0.1, "epochs": 2, "best": "loss", "save_total_limit": 2}),
        ("causal-lm", "llama", chats, {"bf16": True, "gradient_checkpointing": True}),
        ("seq2seq-lm", "bart", pairs, {"max_target_length": 5, "best": "perplexity", "dropout": 0.2}),
        ("masked-lm", "bert", texts, {"masked_ratio": 0.4, "epochs": 2, "max_grad_norm": 0.0}),
    ],
    ids=name_of,
)
def test_the_knobs_keep_both_runs_the_same(tmp_path, task, family, make, knobs):
    tokenizer = language_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    base = save_language_model(tmp_path / "base", family, tokenizer)
    assert_same_run(*both(base, write_language_splits(tmp_path / "data", make), tmp_path, task, **knobs))


def test_weight_decay_leaves_the_frozen_rows_of_a_tied_model_alone(tmp_path):
    base = save_language_model(tmp_path / "base", "llama", tied=True)
    data = write_language_splits(tmp_path / "data", texts)
    result = run(base, data, tmp_path / "out", "causal-lm", weight_decay=0.1)
    before, after = weights(base), weights(tmp_path / "out")
    loaded = AUTO["causal-lm"].from_pretrained(tmp_path / "out")
    assert rows_changed(before, after, loaded) == set(result.vocabulary.token_ids.tolist())


@pytest.mark.parametrize(("task", "family", "make"), [UNTIED[0], UNTIED[-1]], ids=name_of)
def test_a_run_that_was_cut_off_resumes_as_if_it_had_not_been(tmp_path, task, family, make):
    base = save_language_model(tmp_path / "base", family)
    data = write_language_splits(tmp_path / "data", make)
    knobs = {"epochs": 2, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 9, "output": "full"}
    whole = run(base, data, tmp_path / "whole", task, **knobs)
    shutil.copytree(tmp_path / "whole/checkpoints/checkpoint-3", tmp_path / "cut/checkpoints/checkpoint-3")
    resumed = run(base, data, tmp_path / "cut", task, **knobs, resume=True)
    assert (resumed.losses, resumed.scores) == (whole.losses, whole.scores)
    assert (tmp_path / "cut/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


# --- the three modes --------------------------------------------------------------------------------------------------

MODES = [
    *((*case, False, output) for case in UNTIED for output in ("frozen", "restricted")),
    *((*case, True, None) for case in TIED),
    *((*case, True, "restricted") for case in TIED if case[1] in ("gpt2", "t5", "bert")),
]


@pytest.mark.parametrize(("task", "family", "make", "tied", "output"), MODES, ids=name_of)
def test_every_mode_trains_validates_saves_and_loads(tmp_path, task, family, make, tied, output):
    base = save_language_model(tmp_path / "base", family, tied=tied)
    data = write_language_splits(tmp_path / "data", make)
    result = run(base, data, tmp_path / "out", task, output=output, epochs=3, save_strategy="no", eval_strategy="no")
    assert result.output == (output or ("frozen" if tied else "full"))
    assert all(math.isfinite(loss) for _, loss in result.losses)
    assert all(math.isfinite(score) for score in result.scores.values())
    assert result.memory.partial.num_parameters == result.num_parameters
    if tied:  # untied, BART and BERT have a table and a bias that nothing uses, and that have no states
        assert result.memory.partial.optimizer_bytes == result.optimizer_bytes
    losses = [loss for _, loss in result.losses]
    if task != "masked-lm":  # whose masks are others in each epoch, and whose few losses differ more than they fall
        assert np.mean(losses[-4:]) < np.mean(losses[:4])
    loaded, said = AUTO[task].from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(said[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) == tied
    # Until transformers 5.3 what was loaded is saved under other names than what was made.
    AUTO[task].from_pretrained(base).save_pretrained(tmp_path / "plain")
    before, after = weights(tmp_path / "plain"), weights(tmp_path / "out")
    assert {name: tensor.shape for name, tensor in before.items()} == {n: t.shape for n, t in after.items()}
    assert rows_changed(before, after, loaded) <= set(result.vocabulary.token_ids.tolist())
    assert {"finetune.json", "partial_vocabulary.json"} < set(files_in(tmp_path / "out"))


def rows_changed(before, after, network):
    """Token ids whose row of the input table was trained."""
    name = next(n for n, p in network.named_parameters() if p is network.get_input_embeddings().weight)
    name = (
        name if name in before else next(n for n in before if before[n].shape[0] == FULL_SIZE and before[n].ndim == 2)
    )
    return set((before[name] != after[name]).any(dim=1).nonzero().flatten().tolist())


@pytest.mark.parametrize(("task", "family", "make"), TIED, ids=name_of)
def test_frozen_scores_are_those_of_the_saved_model(tmp_path, task, family, make):
    base = save_language_model(tmp_path / "base", family, tied=True)
    data = write_language_splits(tmp_path / "data", make)
    frozen = run(base, data, tmp_path / "out", task, output="frozen", save_strategy="no", eval_strategy="no")
    # The saved model as it is: a rate so small that a step changes nothing.
    again = run(
        tmp_path / "out", data, tmp_path / "again", task, full_vocabulary=True, max_steps=1, learning_rate=1e-30
    )
    assert frozen.scores["loss"] == pytest.approx(again.scores["loss"], rel=1e-5)
    assert frozen.scores["perplexity"] == pytest.approx(again.scores["perplexity"], rel=1e-5)
    assert frozen.scores["accuracy"] == again.scores["accuracy"]


@pytest.mark.parametrize("tied", [False, True])
def test_the_first_loss_of_frozen_is_that_of_the_full_model(tmp_path, tied):
    base = save_language_model(tmp_path / "base", "llama", tied=tied)
    data, knobs = write(tmp_path / "data.jsonl", pairs()), {"save_strategy": "no", "max_steps": 2}
    full = run(base, data, tmp_path / "full", "causal-lm", full_vocabulary=True, **knobs)
    frozen = run(base, data, tmp_path / "frozen", "causal-lm", output="frozen", **knobs)
    host = run(base, data, tmp_path / "host", "causal-lm", output="frozen", frozen_rows="host", **knobs)
    restricted = run(base, data, tmp_path / "restricted", "causal-lm", output="restricted", **knobs)
    assert frozen.losses[0][1] == pytest.approx(full.losses[0][1], rel=1e-5)
    assert [loss for _, loss in host.losses] == pytest.approx([loss for _, loss in frozen.losses], rel=1e-5)
    assert restricted.losses[0][1] < full.losses[0][1] - 0.1  # over fewer rows


def test_a_filtered_run_has_the_first_loss_of_an_exact_one_to_the_bit_and_then_another(tmp_path):
    base = save_language_model(tmp_path / "base", "llama", tied=True)
    data, knobs = write(tmp_path / "data.jsonl", pairs()), {"save_strategy": "no", "max_steps": 3, "output": "frozen"}
    exact = run(base, data, tmp_path / "exact", "causal-lm", **knobs)
    filtered = run(base, data, tmp_path / "filtered", "causal-lm", filter_eps="0.5", **knobs)
    assert filtered.losses[0] == exact.losses[0]
    assert filtered.losses[2] != exact.losses[2]


def test_restricted_is_said_aloud_to_be_another_objective(tmp_path):
    base = save_language_model(tmp_path / "base", "llama", tied=True)
    data = write_language_splits(tmp_path / "data", texts)
    with pytest.warns(LeanVocabWarning, match="objective"):
        result = finetune(base, data, tmp_path / "out", settings("causal-lm", output="restricted"))
    assert any("another objective than that of the full model" in note for note in result.notes)
    written = json.loads((tmp_path / "out/finetune.json").read_text())
    assert (written["output"], written["notes"]) == ("restricted", list(result.notes))


# --- what is learned and what is measured -----------------------------------------------------------------------------


def test_perplexity_is_over_tokens_and_that_of_the_saved_model(tmp_path):
    base = save_language_model(tmp_path / "base", "llama")
    data = write_language_splits(tmp_path / "data", pairs)
    # Batches of unlike numbers of tokens, the last one smaller: a mean of means would be another number.
    result = run(base, data, tmp_path / "out", "causal-lm", output="full", eval_batch_size=4)
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    losses, right, number = 0.0, 0, 0
    for row in pairs(10, seed=1):
        prompt, completion = [2, *ids_of(row["prompt"])], [*ids_of(row["completion"]), 3]
        with torch.no_grad():
            scores = network(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].double()
        said = scores.log_softmax(-1)[range(len(completion)), completion]
        losses, right = losses - said.sum().item(), right + (scores.argmax(-1) == torch.tensor(completion)).sum().item()
        number += len(completion)
    assert result.scores["loss"] == pytest.approx(losses / number, rel=1e-5)
    assert result.scores["perplexity"] == pytest.approx(math.exp(losses / number), rel=1e-5)
    assert result.scores["accuracy"] == pytest.approx(right / number)


def test_validation_never_holds_more_logits_than_those_of_a_batch(tmp_path, monkeypatch):
    base = save_language_model(tmp_path / "base", "llama")
    data = write_language_splits(tmp_path / "data", texts)
    held = []
    gather = transformers.Trainer.__init__

    def spying(self, *args, **kwargs):
        gather(self, *args, **kwargs)
        inner = self.gather_function
        self.gather_function = lambda tensors: held.append(getattr(tensors, "shape", None)) or inner(tensors)

    monkeypatch.setattr(transformers.Trainer, "__init__", spying)
    run(base, data, tmp_path / "out", "causal-lm", output="full", eval_batch_size=5)
    assert held
    assert all(shape is None or FULL_SIZE not in shape for shape in held)


def test_a_tokenizer_that_pads_with_its_end_still_learns_where_texts_end(tmp_path):
    base = save_language_model(tmp_path / "base", "llama", language_tokenizer(pad_token=None), pad_token_id=None)
    data = write_language_splits(tmp_path / "data", texts)
    result = run(base, data, tmp_path / "out", "causal-lm", output="full")
    name = "model.embed_tokens.weight"
    assert (weights(base)["lm_head.weight"][3] != weights(tmp_path / "out")["lm_head.weight"][3]).any()
    assert name in weights(tmp_path / "out")
    assert result.notes == ()
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").pad_token is None


def test_ids_of_prompts_targets_and_of_the_decoders_start_are_kept(tmp_path):
    base = save_language_model(tmp_path / "base", "t5", decoder_start_token_id=7)
    data = write(tmp_path / "data.jsonl", [{"source": "word1 word2", "target": "word298"}] * 8)
    result = run(base, data, tmp_path / "out", "seq2seq-lm")
    assert set(result.vocabulary.token_ids.tolist()) == {*range(len(SPECIAL)), *ids_of("word1 word2 word298"), 7}


def test_random_words_come_from_the_kept_ids_in_both_runs(tmp_path):
    base = save_language_model(tmp_path / "base", "bert")
    data = write_language_splits(tmp_path / "data", texts)
    full, partial = both(base, data, tmp_path, "masked-lm", masked_ratio=0.9)
    before, after = weights(base), weights(full.output_dir)
    name = "bert.embeddings.word_embeddings.weight"
    changed = set((before[name] != after[name]).any(dim=1).nonzero().flatten().tolist())
    assert changed <= set(partial.vocabulary.token_ids.tolist())
    assert 4 in changed  # the mask


def test_a_head_that_the_checkpoint_does_not_have_starts_anew_and_is_named(tmp_path):
    base = save_pretrained(tmp_path / "base")  # a BERT without a masked-LM head
    data = write_language_splits(tmp_path / "data", texts)
    result = run(base, data, tmp_path / "out", "masked-lm", full_vocabulary=True)
    assert "The checkpoint has no cls.predictions.transform.dense.weight; it starts anew." in result.notes


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "knobs", "error", "message"),
    [
        ({"rows": [{"words": "a"}]}, {}, DataError, "found nothing to learn from"),
        ({"rows": pairs(2)}, {"text_columns": ("body",)}, DataError, "there is no text column 'body'"),
        ({"rows": [{"prompt": "a"}] * 2}, {}, DataError, "there is a column 'prompt' without 'completion'"),
        ({"rows": texts(2)}, {"task": "seq2seq-lm"}, ModelError, "no sequence-to-sequence language model for models of the "
         "type 'llama'"),
        ({"rows": texts(2)}, {"task": "masked-lm"}, ModelError, "no masked language model for models of the type 'llama'"),
        ({"rows": texts(2), "model": "t5"}, {}, ModelError, "no causal language model for models of the type 't5'"),
        ({"rows": texts(2), "model": "bert"}, {}, ModelError, "sees the tokens that it is to predict"),
        ({"rows": texts(2), "model": "maskless"}, {"task": "masked-lm"}, ModelError, "has no mask token, which masked-lm"),
        ({"rows": chats(2)}, {}, ModelError, "has no chat template"),
        ({"rows": texts(2)}, {"max_length": 1000}, SettingsError, "max_length is 1000, but the model takes 128 tokens"),
        ({"rows": pairs(2), "model": "bart"}, {"task": "seq2seq-lm", "max_target_length": 1000}, SettingsError,
         "max_target_length is 1000, but the model takes 128 tokens"),
        ({"rows": pairs(2)}, {"max_length": 2}, DataError, "nothing is left to learn of the 2 rows of split 'train'"),
        ({"rows": texts(2)}, {"best": "perplexity"}, SettingsError, "best needs a validation split"),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value)[:30],
)  # fmt: skip
def test_errors_come_before_long_work_and_leave_nothing(tmp_path, monkeypatch, change, knobs, error, message):
    for family in ("llama", "t5", "bart", "bert"):
        save_language_model(tmp_path / family, family)
    save_language_model(tmp_path / "maskless", "bert", small_tokenizer(mask_token=None))
    data = write(tmp_path / "rows.jsonl", change["rows"])
    monkeypatch.setattr(transformers.Trainer, "train", pytest.fail)
    before = files_in(tmp_path)
    with pytest.raises(error, match=message) as caught:
        finetune(
            tmp_path / change.get("model", "llama"), data, tmp_path / "out", settings(**{"task": "causal-lm"} | knobs)
        )
    assert isinstance(caught.value, LeanVocabError)
    assert files_in(tmp_path) == before


def test_a_tied_model_cannot_keep_its_output_layer_full(tmp_path):
    base = save_language_model(tmp_path / "base", "gpt2", tied=True)
    data = write_language_splits(tmp_path / "data", texts)
    with pytest.raises(ModelError, match="tied"):
        run(base, data, tmp_path / "out", "causal-lm", output="full")
    assert not (tmp_path / "out").exists()


@pytest.mark.shared_data
def test_a_real_tokenizer_on_real_text(shared, tmp_path):
    folder = shared / "data/tokenizers/gpt2"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "tie_word_embeddings": False}
    torch.manual_seed(0)
    network = transformers.GPT2LMHeadModel(transformers.AutoConfig.from_pretrained(folder, **sizes))
    base = save_pretrained(tmp_path / "gpt2", network, tokenizer)
    knobs = {"config_name": "cola", "max_train_samples": 48, "max_eval_samples": 16, "text_columns": ("sentence",)}
    full, partial = both(base, shared / "data/glue", tmp_path, "causal-lm", **knobs)
    assert_same_run(full, partial)
    assert 1_000 < len(partial.vocabulary) < 10_000
    assert np.isfinite(list(partial.scores.values())).all()
