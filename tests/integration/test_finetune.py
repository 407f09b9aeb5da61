"""The main job: data + model → a fine-tuned full model, bit for bit that of ordinary fine-tuning."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from models import FULL_SIZE
from runs import assert_same_run
from safetensors.torch import load_file
from texts import SPECIAL, WORDS, files_in, rows, save_pretrained, small_tokenizer, write, write_splits
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from leanvocab.errors import CheckpointError, DataError, LeanVocabError, ModelError, SettingsError
from leanvocab.finetune.classification import find_label_task
from leanvocab.finetune.job import finetune
from leanvocab.finetune.settings import FineTuneSettings
from leanvocab.texts.data_files import load_splits
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary
from versions import TRAINER_KEEPS_SPECIAL_IDS

QUICK = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-2, "logging_steps": 1, "cpu": True}
MODEL_FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
CHECKPOINT_FILES = [
    "config.json", "model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "tokenizer.json",
    "tokenizer_config.json", "trainer_state.json", "training_args.bin",
]  # fmt: skip


def settings(**knobs):
    return FineTuneSettings(**QUICK | knobs)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_pretrained(tmp_path_factory.mktemp("pretrained") / "base")


@pytest.fixture
def data(tmp_path):
    return write_splits(tmp_path / "data")


def family(name):
    # RoBERTa counts its positions from behind the padding's id: 128 of 129 are a text's.
    sizes = {"vocab_size": FULL_SIZE, "max_position_embeddings": 129, "pad_token_id": 0, "eos_token_id": 3}
    usual = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    if name == "bart":
        bart = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 3}
        return transformers.BartModel(transformers.BartConfig(**sizes | bart | heads))
    if name == "t5":
        t5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "eos_token_id": 3}
        return transformers.T5Model(transformers.T5Config(vocab_size=FULL_SIZE, decoder_start_token_id=0, **t5))
    if name == "gpt2":
        gpt2 = transformers.GPT2Config(vocab_size=FULL_SIZE, n_positions=128, n_embd=16, n_layer=1, n_head=2)
        return transformers.GPT2LMHeadModel(gpt2)
    config = {"roberta": transformers.RobertaConfig, "llama": transformers.LlamaConfig}[name](**sizes | usual)
    return {"roberta": transformers.RobertaModel, "llama": transformers.LlamaForCausalLM}[name](config)


def both(base, data, tmp_path, **knobs):
    """The same run with the full and with the partial vocabulary."""
    return [
        finetune(base, data, tmp_path / name, settings(full_vocabulary=name == "full", **knobs))
        for name in ("full", "partial")
    ]


@pytest.mark.parametrize("kind", ["int", "str", "float"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_labels_of_every_kind_from_files_of_every_kind_give_the_model_of_ordinary_fine_tuning(
    base, tmp_path, kind, suffix
):
    data = write_splits(tmp_path / "data", suffix, kind=kind)
    full, partial = both(base, data, tmp_path)
    assert_same_run(full, partial)
    assert set(partial.scores) == {"loss"} | (
        {"pearson", "spearman"} if kind == "float" else {"accuracy", "f1", "matthews"}
    )
    assert len(partial.losses) == partial.num_steps == 6
    assert partial.gradients_bytes < full.gradients_bytes


@pytest.mark.parametrize("name", ["roberta", "bart", "llama", "gpt2"])
def test_other_architectures_do_too(tmp_path, name):
    # GPT-2's tokenizer has no padding token: its end of sequence pads.
    tokenizer = small_tokenizer(eos_token="[SEP]", **({"pad_token": None} if name == "gpt2" else {}))
    base = save_pretrained(tmp_path / name, family(name), tokenizer)
    full, partial = both(base, write_splits(tmp_path / "data", pairs=True), tmp_path)
    assert_same_run(full, partial)
    assert partial.notes == (
        ("The tokenizer has no padding token; its end of sequence '[SEP]' pads.",) if name == "gpt2" else ()
    )


@pytest.mark.parametrize(
    "knobs",
    [
        {"weight_decay": 0.1},
        {"gradient_accumulation_steps": 2, "warmup": 0.5, "scheduler": "cosine"},
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"max_grad_norm": 0.0, "dropout": -1.0, "group_by_length": True},
        {"epochs": 2, "best": "accuracy", "save_total_limit": 2},
        {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 4, "max_steps": 5},
    ],
    ids=lambda knobs: ",".join(knobs),
)
def test_the_usual_knobs_keep_both_runs_the_same(base, data, tmp_path, knobs):
    assert_same_run(*both(base, data, tmp_path, **knobs))


def test_the_model_loads_with_plain_transformers_and_only_used_rows_were_trained(base, data, tmp_path):
    result = finetune(base, data, tmp_path / "out", settings())
    tuned = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    table, base_table = (
        tuned.get_input_embeddings().weight,
        load_file(base / "model.safetensors")["embeddings.word_embeddings.weight"],
    )
    changed = (table != base_table).any(dim=1).nonzero().flatten().tolist()
    assert table.shape == base_table.shape
    assert set(changed) <= set(result.vocabulary.token_ids.tolist())
    words = {word for split in load_splits(data).values() for text in split["text"] for word in text.split()}
    used = {len(SPECIAL) + WORDS.index(word) for word in words}
    assert used | set(range(len(SPECIAL))) == set(result.vocabulary.token_ids.tolist())
    assert len(used) < 110 < min(used)  # kept ids lie above the partial size, too
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.get_vocab() == small_tokenizer().get_vocab()


def test_the_result_says_what_was_saved(base, data, tmp_path):
    full, partial = both(base, data, tmp_path)
    kept = len(partial.vocabulary)
    assert full.num_parameters - partial.num_parameters == (FULL_SIZE - kept) * 16
    assert (full.vocabulary, full.memory) == (None, None)
    assert partial.memory.full.num_parameters == full.num_parameters
    assert partial.memory.partial.num_parameters == partial.num_parameters
    assert partial.memory.full.optimizer_bytes == full.optimizer_bytes
    assert partial.memory.partial.optimizer_bytes == partial.optimizer_bytes
    assert set(full.seconds) == {"tokenizing", "training"}
    assert set(partial.seconds) == {"tokenizing", "counting", "shrinking", "training"}
    written = json.loads((tmp_path / "partial/finetune.json").read_text())
    assert written["vocabulary"] == {"kept_rows": kept, "full_rows": FULL_SIZE, "digest": partial.vocabulary.digest}
    assert written["scores"] == partial.scores
    assert written["task"]["label_names"] == ["0", "1"]
    assert PartialVocabulary.load(tmp_path / "partial/partial_vocabulary.json") == partial.vocabulary


def test_a_run_leaves_exactly_these_files_and_so_does_a_second_one_over_it(base, data, tmp_path):
    last = [f"checkpoints/checkpoint-6/{name}" for name in CHECKPOINT_FILES]
    expected = sorted([*last, "checkpoints/run.json", *MODEL_FILES, "finetune.json", "partial_vocabulary.json"])
    first = finetune(base, data, tmp_path / "out", settings())
    assert files_in(tmp_path / "out") == expected
    before = (tmp_path / "out/model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="out is not empty; name another, or set overwrite"):
        finetune(base, data, tmp_path / "out", settings())
    second = finetune(base, data, tmp_path / "out", settings(overwrite=True))
    assert files_in(tmp_path / "out") == expected
    assert (tmp_path / "out/model.safetensors").read_bytes() == before
    assert first.losses == second.losses


def test_a_full_run_without_checkpoints_over_it_leaves_nothing_of_the_earlier_one(base, data, tmp_path):
    finetune(base, data, tmp_path / "out", settings())
    finetune(base, data, tmp_path / "out", settings(overwrite=True, full_vocabulary=True, save_strategy="no"))
    assert files_in(tmp_path / "out") == sorted([*MODEL_FILES, "finetune.json"])
    assert not (tmp_path / "out/checkpoints").exists()


def test_neither_data_nor_pretrained_model_are_written_to(base, data, tmp_path):
    def contents(folder):
        return {name: (folder / name).read_bytes() for name in files_in(folder)}

    before = contents(data), contents(base)
    finetune(base, data, tmp_path / "out", settings())
    assert (contents(data), contents(base)) == before


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_run_that_was_cut_off_resumes_as_if_it_had_not_been(base, data, tmp_path, weight_decay):
    knobs = {"epochs": 2, "save_total_limit": 2, "weight_decay": weight_decay}
    whole = finetune(base, data, tmp_path / "whole", settings(**knobs))
    shutil.copytree(tmp_path / "whole/checkpoints/checkpoint-6", tmp_path / "cut/checkpoints/checkpoint-6")
    resumed = finetune(base, data, tmp_path / "cut", settings(**knobs, resume=True))
    assert resumed.losses == whole.losses
    assert resumed.scores == whole.scores
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert first == second
    assert files_in(tmp_path / "cut") == files_in(tmp_path / "whole")


def mixtral():
    sizes = {"vocab_size": FULL_SIZE, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    return transformers.MixtralModel(transformers.MixtralConfig(pad_token_id=0, eos_token_id=3, **sizes | heads))


@pytest.mark.parametrize("checkpoints", ["full", "delta"])
def test_weights_that_a_checkpoint_calls_otherwise_are_resumed_from_too(data, tmp_path, checkpoints):
    base = save_pretrained(
        tmp_path / "base", mixtral()
    )  # the experts are one tensor in the model, and several in files
    knobs = {"epochs": 2, "save_total_limit": 2, "checkpoints": checkpoints}
    whole = finetune(base, data, tmp_path / "whole", settings(**knobs))
    shutil.copytree(tmp_path / "whole/checkpoints/checkpoint-6", tmp_path / "cut/checkpoints/checkpoint-6")
    resumed = finetune(base, data, tmp_path / "cut", settings(**knobs, resume=True))
    assert resumed.losses == whole.losses
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert first == second


def test_the_best_checkpoint_is_kept_where_it_names_weights_otherwise(data, tmp_path):
    base = save_pretrained(tmp_path / "base", mixtral())
    # Steps so small that no prediction changes: the first of equals is the best.
    knobs = {"epochs": 3, "best": "accuracy", "save_total_limit": 3, "learning_rate": 1e-6}
    finetune(base, data, tmp_path / "out", settings(**knobs))
    first, last = (load_file(tmp_path / f"out/checkpoints/checkpoint-{n}/model.safetensors") for n in (6, 18))
    final = load_file(tmp_path / "out/model.safetensors")
    assert final.keys() == first.keys()
    assert [name for name in first if not torch.equal(final[name], first[name])] == []
    assert all(not torch.equal(last[name], first[name]) for name in first if ".experts." in name)


def test_the_best_checkpoint_is_kept_where_it_is_asked_for(base, data, tmp_path):
    result = finetune(
        base, data, tmp_path / "out", settings(epochs=3, best="loss", save_total_limit=3, learning_rate=0.3)
    )
    state = json.loads((tmp_path / "out/checkpoints/checkpoint-18/trainer_state.json").read_text())
    evaluations = [log["eval_loss"] for log in state["log_history"] if "eval_loss" in log]
    assert result.scores["loss"] == min(evaluations) != evaluations[-1]


def test_without_validation_there_are_no_scores(base, data, tmp_path):
    result = finetune(base, data / "train.csv", tmp_path / "out", settings())
    assert (result.scores, result.num_steps) == ({}, 6)
    held_out = finetune(base, data / "train.csv", tmp_path / "held", settings(validation_ratio=0.5))
    assert (set(held_out.scores), held_out.num_steps) == ({"loss", "accuracy", "f1", "matthews"}, 3)


def test_tokens_of_every_split_are_kept(base, data, tmp_path):
    write(data / "test.csv", [{"text": WORDS[299], "label": -1}])
    result = finetune(base, data, tmp_path / "out", settings())
    assert len(SPECIAL) + 299 in result.vocabulary


def test_dropout_of_the_settings_is_that_of_the_model(base, data, tmp_path):
    finetune(base, data, tmp_path / "out", settings(dropout=0.25))
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.25, 0.25)


def test_a_model_with_another_head_gets_a_new_one(base, data, tmp_path):
    finetune(base, data, tmp_path / "two", settings(save_strategy="no"))
    three = write(tmp_path / "three.csv", [row | {"label": at % 3} for at, row in enumerate(rows(24))])
    finetune(tmp_path / "two", three, tmp_path / "three", settings(save_strategy="no"))
    tuned = AutoModelForSequenceClassification.from_pretrained(tmp_path / "three")
    assert tuned.config.id2label == {0: "0", 1: "1", 2: "2"}
    assert tuned.classifier.weight.shape[0] == 3


def trained(folder, name, names):
    """A checkpoint of a family with a head for classes of these names."""
    config = family(name).config
    config.id2label, config.label2id = dict(enumerate(names)), {label: number for number, label in enumerate(names)}
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    save_pretrained(folder, model)
    return model


def head_of(model):
    return {
        name: value for name, value in model.state_dict().items() if not name.startswith(model.base_model_prefix + ".")
    }


BART_HEAD = "classification_head.out_proj.weight"
BARELY = {"max_steps": 1, "learning_rate": 1e-12, "save_strategy": "no"}


@pytest.mark.parametrize("named", ["id2label", "label2id"])
def test_a_trained_head_keeps_its_classes_where_the_data_have_the_same(tmp_path, named):
    model = trained(tmp_path / "trained", "roberta", ("pos", "neg"))
    texts = [row["text"] for row in rows(40)]
    with torch.no_grad():
        logits = model.eval()(**small_tokenizer()(texts, padding=True, return_tensors="pt")).logits
        middle = (
            (logits[:, 1] - logits[:, 0]).sort().values[19:21].mean()
        )  # between two texts: on one it would be a tie
        model.classifier.out_proj.bias[0] += middle  # so that it says both
    model.save_pretrained(tmp_path / "trained")
    config = json.loads((tmp_path / "trained/config.json").read_text())
    del config[{"id2label": "label2id", "label2id": "id2label"}[named]]
    (tmp_path / "trained/config.json").write_text(json.dumps(config))
    says = [("pos", "neg")[int(said)] for said in logits[:, 1] - logits[:, 0] > middle]
    table = [{"text": text, "label": label} for text, label in zip(texts, says, strict=True)]
    splits = {name: write(tmp_path / f"{name}.csv", table) for name in ("train", "validation")}
    result = finetune(tmp_path / "trained", splits, tmp_path / "out", settings(dropout=0.0, **BARELY))
    assert result.scores["accuracy"] == 1.0
    tuned = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert (tuned.config.id2label, tuned.config.label2id) == ({0: "pos", 1: "neg"}, {"pos": 0, "neg": 1})
    assert all(torch.allclose(value, head_of(tuned)[name], atol=1e-6) for name, value in head_of(model).items())


@pytest.mark.parametrize("name", ["roberta", "bart", "llama", "gpt2", "t5"])
def test_a_head_for_other_classes_of_the_same_number_starts_anew(tmp_path, name):
    if name in ("bart", "t5") and not TRAINER_KEEPS_SPECIAL_IDS:
        pytest.skip("the Trainer of this transformers clears ids that the tokenizer lacks")
    model = trained(tmp_path / "trained", name, ("pos", "neg"))
    data = write(tmp_path / "spam.csv", [row | {"label": ("ham", "spam")[row["label"]]} for row in rows(16)])
    result = finetune(tmp_path / "trained", data, tmp_path / "out", settings(**BARELY))
    assert "The checkpoint's head is for 'pos', 'neg', and not for 'ham', 'spam'; it starts anew." in result.notes
    tuned = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert tuned.config.id2label == {0: "ham", 1: "spam"}
    kept = {key for key, value in head_of(model).items() if torch.allclose(value, head_of(tuned)[key], atol=1e-6)}
    last = {"roberta": "classifier.out_proj.weight", "bart": BART_HEAD, "t5": BART_HEAD}.get(name, "score.weight")
    assert head_of(model).keys() - kept == {last}  # biases begin as zeros
    assert torch.allclose(next(tuned.base_model.parameters()), next(model.base_model.parameters()), atol=1e-6)


def test_a_head_of_another_kind_is_not_taken_for_one_of_texts(tmp_path):
    bert = transformers.BertConfig(
        vocab_size=FULL_SIZE, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.BertForTokenClassification(bert)
    save_pretrained(tmp_path / "tags", model)
    finetune(tmp_path / "tags", write(tmp_path / "rows.csv", rows(16)), tmp_path / "out", settings(**BARELY))
    tuned = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert not torch.allclose(model.classifier.weight, tuned.classifier.weight, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "knobs", "error", "message"),
    [
        ({"data": "nothing.csv"}, {}, DataError, "nothing.csv does not exist"),
        ({"rows": [{"text": "a", "stars": 1}]}, {}, DataError, "found no label column"),
        ({"rows": [{"text": "a", "label": -1}] * 2}, {}, DataError, "2 of 2 rows of split 'train' have no label"),
        ({"model": "no/such-model"}, {}, ModelError, "'no/such-model' is no folder here, and the hub did not give it"),
        ({"model": "empty"}, {}, ModelError, r"empty' (cannot be read|knows \d+ tokens)"),
        ({}, {"max_length": 1000}, SettingsError, "max_length is 1000, but the model takes 128 tokens at most"),
        ({"rows": rows(8)}, {"best": "f1"}, SettingsError, "best needs a validation split"),
        ({"output": "taken"}, {}, CheckpointError, "taken is not empty"),
        ({"output": "file"}, {}, CheckpointError, "file is a file"),
        ({"output": "base"}, {"overwrite": True}, CheckpointError, "is the folder of the pretrained model"),
        ({"output": "taken"}, {"resume": True}, CheckpointError, "no checkpoint in .*taken/checkpoints .* holds"),
        ({"model": "unpadded"}, {}, ModelError, "neither a padding nor an end-of-sequence token"),
        ({"model": "vision"}, {}, ModelError, "no sequence classification for models of the type 'clip_vision_model'"),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value)[:20],
)
def test_errors_come_before_long_work_and_leave_nothing(
    base, data, tmp_path, monkeypatch, change, knobs, error, message
):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/note.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    save_pretrained(tmp_path / "unpadded", tokenizer=small_tokenizer(pad_token=None))
    clip = transformers.CLIPVisionConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    save_pretrained(tmp_path / "vision", transformers.CLIPVisionModel(clip))
    if "rows" in change:
        data = write(tmp_path / "rows.csv", change["rows"])
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", pytest.fail)
    model = change.get("model", base)
    model = tmp_path / model if model in ("empty", "unpadded", "vision") else model
    output = base if change.get("output") == "base" else tmp_path / change.get("output", "out")
    before = files_in(tmp_path)
    with pytest.raises(error, match=message) as caught:
        finetune(model, tmp_path / change["data"] if "data" in change else data, output, settings(**knobs))
    assert isinstance(caught.value, LeanVocabError)
    assert files_in(tmp_path) == before


def test_a_failure_in_training_leaves_the_earlier_model_whole(base, data, tmp_path, monkeypatch):
    finetune(base, data, tmp_path / "out", settings())
    before = (tmp_path / "out/model.safetensors").read_bytes()
    monkeypatch.setattr("leanvocab.finetune.job.save_full", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        finetune(base, data, tmp_path / "out", settings(overwrite=True, seed=7))
    assert (tmp_path / "out/model.safetensors").read_bytes() == before


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("name", "columns", "num_labels"),
    [
        ("cola", ("sentence",), 2),
        ("mrpc", ("sentence1", "sentence2"), 2),
        ("sst2", ("sentence",), 2),
        ("wnli", ("sentence1", "sentence2"), 2),
        ("qnli", ("question", "sentence"), 2),
        ("qqp", ("question1", "question2"), 2),
        ("mnli", ("premise", "hypothesis"), 3),
    ],
)
def test_glue_is_understood_as_it_is_published(shared, name, columns, num_labels):
    splits = load_splits(shared / "data/glue", name)
    task = find_label_task(splits, FineTuneSettings())
    assert (task.text_columns, task.num_labels, task.train_split) == (columns, num_labels, "train")
    assert task.eval_split == ("validation_matched" if name == "mnli" else "validation")
    assert np.bincount(task.label_ids(splits[task.eval_split]["label"][:])).min() > 0


@pytest.mark.shared_data
def test_real_text_with_a_real_tokenizer_gives_the_model_of_ordinary_fine_tuning(shared, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(shared / "data/tokenizers/roberta-base")
    config = transformers.AutoConfig.from_pretrained(
        shared / "data/tokenizers/roberta-base",
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    torch.manual_seed(0)
    base = save_pretrained(tmp_path / "roberta", transformers.RobertaModel(config), tokenizer)
    knobs = {"config_name": "cola", "max_train_samples": 64, "max_eval_samples": 64}
    full, partial = both(base, shared / "data/glue", tmp_path, **knobs)
    assert_same_run(full, partial)
    assert 1_000 < len(partial.vocabulary) < 5_000


def test_an_output_directory_without_a_name_is_not_the_folder_where_one_is(base, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(SettingsError, match="the output directory has no name"):
        finetune(base, data, "", FineTuneSettings(overwrite=True))
    assert (tmp_path / "checkpoints").exists()
