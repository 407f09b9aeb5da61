"""Deltas: what they hold, that they cost what they hold, and that they load back."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import bits, differing, train
from disk import content, delta_of_base, listing, read_all, trained_pair
from models import FULL_SIZE, batch, small_model, used_vocabulary
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    RobertaModel,
)

import leanvocab as lv
from leanvocab.adapters.exporting import export_trainable_tokens
from leanvocab.checkpoints.delta_format import read_delta
from leanvocab.checkpoints.delta_loading import load_delta
from leanvocab.checkpoints.merge import merge_checkpoint
from leanvocab.checkpoints.optimizer_states import read_full_states
from leanvocab.errors import CheckpointError, LeanVocabWarning, ModelError, NotShrunkError
from leanvocab.files.headers import read_header
from leanvocab.model.shrink import merge_, shrink_
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

DELTA = ["README.md", "config.json", "delta.safetensors", "leanvocab.json", "model_config.json"]


def freeze_all_but_rows(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("word_embeddings" in name or "embed_tokens" in name)


def test_a_delta_and_its_base_give_the_ordinarily_trained_model_bit_for_bit(tmp_path: Path) -> None:
    full = delta_of_base(tmp_path)
    merge_checkpoint(base=tmp_path / "base", delta=tmp_path / "delta", output=tmp_path / "merged")
    assert differing(type(full).from_pretrained(tmp_path / "merged"), full) == []
    full.save_pretrained(tmp_path / "expected")
    for name in listing(tmp_path / "expected"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()


def test_a_delta_holds_these_files_and_costs_what_its_tensors_cost(tmp_path: Path) -> None:
    delta_of_base(tmp_path)
    assert listing(tmp_path / "delta") == DELTA
    held = read_all(tmp_path / "delta")
    assert held["roberta.embeddings.word_embeddings.weight"].shape[0] == len(used_vocabulary())
    size = (tmp_path / "delta" / "delta.safetensors").stat().st_size
    assert size < sum(tensor.nbytes for tensor in held.values()) + 8192


def test_only_what_changed_is_held_unless_all_is_asked_for(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path / "base")
    model = type(small_model()).from_pretrained(tmp_path / "base")
    shrink_(model, used_vocabulary())
    freeze_all_but_rows(model)
    train(model)
    lv.save_delta(model, tmp_path / "changed")
    lv.save_delta(model, tmp_path / "all", tensors="all")
    assert list(read_all(tmp_path / "changed")) == ["roberta.embeddings.word_embeddings.weight"]
    assert set(read_all(tmp_path / "all")) == set(read_all(tmp_path / "base"))
    for name in ("changed", "all"):
        merge_checkpoint(base=tmp_path / "base", delta=tmp_path / name, output=tmp_path / f"{name}-merged", verify=True)
    assert content(tmp_path / "changed-merged") == content(tmp_path / "all-merged")


def test_the_description_names_the_base_the_vocabulary_and_every_digest(tmp_path: Path) -> None:
    delta_of_base(tmp_path)
    said = json.loads((tmp_path / "delta" / "leanvocab.json").read_text())
    assert (said["format"], said["version"], said["output"]) == ("leanvocab delta", 1, "full")
    assert said["base"]["name"] == str(tmp_path / "base")
    table = said["tables"]["roberta.embeddings.word_embeddings.weight"]
    assert table["token_ids"] == used_vocabulary().token_ids.tolist()
    assert table["digest"] == used_vocabulary().digest
    base = read_header(tmp_path / "base", "model.safetensors")
    data = (tmp_path / "base" / "model.safetensors").read_bytes()
    import hashlib

    for name, entry in base.tensors.items():
        assert said["base"]["tensors"][name]["sha256"] == hashlib.sha256(data[entry.start : entry.end]).hexdigest()


@pytest.mark.parametrize("loader", [AutoConfig, AutoModel, AutoModelForSequenceClassification, type(small_model())])
@pytest.mark.filterwarnings("ignore:You are using a model of type")
def test_a_plain_from_pretrained_fails_with_the_command_to_run(tmp_path: Path, loader: Any) -> None:
    delta_of_base(tmp_path)
    with pytest.raises(ValueError, match=r"leanvocab merge .*base DELTA OUTPUT"):
        loader.from_pretrained(tmp_path / "delta")
    assert "leanvocab merge" in (tmp_path / "delta" / "README.md").read_text()


def test_a_base_with_another_head_gives_the_new_head_the_models_names_and_its_config(tmp_path: Path) -> None:
    """A headless base (names without the prefix), and one with a head that the model does not have."""
    torch.manual_seed(3)
    RobertaModel(small_model().config).save_pretrained(tmp_path / "headless")
    from transformers import RobertaForMaskedLM

    RobertaForMaskedLM(small_model().config).save_pretrained(tmp_path / "other-head", max_shard_size="60KB")
    for base in ("headless", "other-head"):
        torch.manual_seed(4)
        model = type(small_model()).from_pretrained(tmp_path / base, num_labels=5)
        shrink_(model, used_vocabulary())
        train(model)
        lv.save_delta(model, tmp_path / f"{base}-delta")
        merge_checkpoint(
            base=tmp_path / base, delta=tmp_path / f"{base}-delta", output=tmp_path / f"{base}-out", verify=True
        )
        merged, report = type(model).from_pretrained(tmp_path / f"{base}-out", output_loading_info=True)
        assert merged.config.num_labels == 5
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        assert differing(merged, model) == []
        merge_checkpoint(base=tmp_path / base, delta=tmp_path / f"{base}-delta", in_place=True)
        assert merge_checkpoint(base=tmp_path / base, delta=tmp_path / f"{base}-delta", in_place=True).already_there
        assert content(tmp_path / base) == content(tmp_path / f"{base}-out")


@pytest.mark.parametrize("family", ["roberta", "bert", "bart", "llama", "llama-untied"])
def test_every_family_merges_to_what_it_saves_in_full(tmp_path: Path, family: str) -> None:
    full = delta_of_base(tmp_path, family=family)
    merge_checkpoint(base=tmp_path / "base", delta=tmp_path / "delta", output=tmp_path / "merged", verify=True)
    full.save_pretrained(tmp_path / "expected")
    for name in listing(tmp_path / "expected"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes(), name


def test_unused_rows_that_decayed_are_carried_whole(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path / "base")
    full, model = (type(small_model()).from_pretrained(tmp_path / "base") for _ in range(2))
    shrink_(model, used_vocabulary(), decay_unused_rows=True)
    for each in (full, model):
        train(each, torch.optim.AdamW(each.parameters(), lr=1e-2, weight_decay=0.1))
    lv.save_delta(model, tmp_path / "delta")
    assert read_all(tmp_path / "delta")["roberta.embeddings.word_embeddings.weight"].shape[0] == FULL_SIZE
    merge_checkpoint(base=tmp_path / "base", delta=tmp_path / "delta", output=tmp_path / "merged", verify=True)
    assert differing(type(full).from_pretrained(tmp_path / "merged"), full) == []


def test_a_model_in_another_dtype_than_its_base_merges_into_the_bases_dtype(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path / "base")
    model = type(small_model()).from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    shrink_(model, used_vocabulary())
    with torch.no_grad():
        model.roberta.embeddings.word_embeddings.weight.mul_(3)
    lv.save_delta(model, tmp_path / "delta")
    assert len(read_all(tmp_path / "delta")) == 1  # what equals the base, rounded as the model has it, is left out
    merge_checkpoint(base=tmp_path / "base", delta=tmp_path / "delta", output=tmp_path / "merged", verify=True)
    assert read_all(tmp_path / "merged")["classifier.dense.weight"].dtype == torch.float32
    assert differing(type(model).from_pretrained(tmp_path / "merged", dtype=torch.bfloat16), model) == []


def test_values_that_the_bases_dtype_cannot_hold_are_rounded_only_on_request(tmp_path: Path) -> None:
    small_model().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = type(small_model()).from_pretrained(tmp_path / "base", dtype=torch.float32)
    shrink_(model, used_vocabulary())
    train(model)
    lv.save_delta(model, tmp_path / "delta")
    paths = {"base": tmp_path / "base", "delta": tmp_path / "delta", "output": tmp_path / "merged"}
    with pytest.raises(
        CheckpointError, match="expected BF16, as in the base, found F32, whose values would be rounded"
    ):
        merge_checkpoint(**paths)
    assert not (tmp_path / "merged").exists()
    merge_checkpoint(**paths, allow_rounding=True, verify=True)
    merged = type(model).from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    assert differing(merged, model.to(torch.bfloat16)) == []


def test_a_delta_loads_into_a_shrunk_model(tmp_path: Path) -> None:
    full = delta_of_base(tmp_path)
    model = type(full).from_pretrained(tmp_path / "base")
    shrink_(model, used_vocabulary())
    with torch.no_grad():
        model.classifier.dense.bias.add_(1)  # comes back as it was, whether the delta has it or the base
    load_delta(model, tmp_path / "delta")
    assert differing(model, full) == []


def test_another_vocabulary_is_refused_or_widened_on_request(tmp_path: Path) -> None:
    full = delta_of_base(tmp_path)
    other = PartialVocabulary(range(0, FULL_SIZE, 3), FULL_SIZE)
    model = type(full).from_pretrained(tmp_path / "base")
    shrink_(model, other)
    before = {name: bits(value) for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"of another vocabulary: expected digest .* or take both: widen=True"):
        load_delta(model, tmp_path / "delta")
    assert {name: bits(value) for name, value in model.state_dict().items()} == before
    load_delta(model, tmp_path / "delta", widen=True)
    assert lv.status(model).tables[0].digest == (other | used_vocabulary()).digest
    assert differing(model, full) == []
    assert differing(merge_(model), full) == []


def test_a_delta_for_another_base_is_refused(tmp_path: Path) -> None:
    full = delta_of_base(tmp_path)
    torch.manual_seed(9)
    other = type(full)(full.config)
    other.save_pretrained(tmp_path / "other")
    model = type(full).from_pretrained(tmp_path / "other")
    shrink_(model, used_vocabulary())
    with pytest.raises(CheckpointError, match=r"are not those of .*base, which the delta was made from"):
        load_delta(model, tmp_path / "delta")


def test_what_cannot_be_a_delta_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    full, model = trained_pair(tmp_path)
    with pytest.raises(NotShrunkError, match="is not shrunk"):
        lv.save_delta(full, tmp_path / "delta")
    with pytest.raises(CheckpointError, match="holds weights of a full checkpoint"):
        lv.save_delta(model, tmp_path / "base")
    with pytest.raises(ModelError, match="expected 'changed' or 'all'"):
        lv.save_delta(model, tmp_path / "delta", tensors="some")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="is no folder here and not in the hub's cache"):
        lv.save_delta(model, tmp_path / "delta", base="no/such-model")
    fresh = shrink_(small_model(), used_vocabulary())
    with pytest.raises(CheckpointError, match="does not say which checkpoint it came from"):
        lv.save_delta(fresh, tmp_path / "delta")
    small_model("llama").save_pretrained(tmp_path / "llama")
    with pytest.raises(
        CheckpointError, match=r"expected the table roberta.embeddings.word_embeddings.weight, found none"
    ):
        lv.save_delta(model, tmp_path / "delta", base=tmp_path / "llama")
    assert sorted(os.listdir(tmp_path)) == ["base", "llama"]


def test_a_base_that_has_other_rows_is_warned_about_and_the_table_is_carried_whole(tmp_path: Path) -> None:
    full, model = trained_pair(tmp_path)
    torch.manual_seed(9)
    BertModel(small_model("bert").config).save_pretrained(tmp_path / "other")
    with pytest.warns(
        LeanVocabWarning, match=r"rows outside the vocabulary differ from those of .*other, .* carried whole"
    ):
        lv.save_delta(model, tmp_path / "delta", base=tmp_path / "other")
    merge_checkpoint(base=tmp_path / "other", delta=tmp_path / "delta", output=tmp_path / "merged", verify=True)
    assert differing(type(full).from_pretrained(tmp_path / "merged"), full) == []


def test_saving_a_delta_twice_replaces_it_and_keeps_notes_beside_it(tmp_path: Path) -> None:
    _, model = trained_pair(tmp_path)
    lv.save_delta(model, tmp_path / "delta")
    (tmp_path / "delta" / "note.txt").write_text("mine")
    train(model)
    lv.save_delta(model, tmp_path / "delta")
    assert listing(tmp_path / "delta") == sorted([*DELTA, "note.txt"])
    merge_checkpoint(base=tmp_path / "base", delta=tmp_path / "delta", output=tmp_path / "merged")
    assert differing(type(model).from_pretrained(tmp_path / "merged"), model) == []


def test_any_module_has_a_delta_when_its_base_is_named(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"table": nn.Embedding(40, 6), "per_layer": nn.Embedding(40, 10), "head": nn.Linear(6, 2)})

    (tmp_path / "base").mkdir()
    save_model(make(), str(tmp_path / "base" / "model.safetensors"))
    model, expected = make(), make()
    first, second = PartialVocabulary([1, 5, 39], 40), PartialVocabulary([0, 2, 3, 4], 40)
    shrink_(model, {"table": first, "per_layer": second})
    with torch.no_grad():
        model["table"].weight.add_(1)
        model["per_layer"].weight.mul_(2)
        expected["table"].weight[[1, 5, 39]] += 1
        expected["per_layer"].weight[[0, 2, 3, 4]] *= 2
    lv.save_delta(model, tmp_path / "delta", base=tmp_path / "base")
    assert {name: len(value) for name, value in read_all(tmp_path / "delta").items()} == {
        "table.weight": 3,
        "per_layer.weight": 4,
    }
    merge_checkpoint(base=tmp_path / "base", delta=tmp_path / "delta", output=tmp_path / "merged", verify=True)
    merged = make()
    load_model(merged, str(tmp_path / "merged" / "model.safetensors"))
    assert differing(merged, expected) == []


def test_the_rows_are_exported_as_an_adapter_that_peft_loads_to_the_same_logits(tmp_path: Path) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft reads deprecated attributes of transformers
        from peft import PeftModel
    small_model().save_pretrained(tmp_path / "base")
    model = type(small_model()).from_pretrained(tmp_path / "base")
    shrink_(model, used_vocabulary())
    freeze_all_but_rows(model)
    train(model)
    export_trainable_tokens(model, tmp_path / "adapter")
    assert listing(tmp_path / "adapter") == ["adapter_config.json", "adapter_model.safetensors"]
    full = type(model).from_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = PeftModel.from_pretrained(full, tmp_path / "adapter").eval()
    model.eval()
    with torch.no_grad():
        assert bits(adapted(**batch()).logits) == bits(model(**batch()).logits)
    model.classifier.dense.bias.data.add_(1)
    with pytest.raises(ModelError, match=r"holds rows alone, and 1 other tensors differ .* classifier.dense.bias"):
        export_trainable_tokens(model, tmp_path / "second")
    assert not (tmp_path / "second").exists()


def test_the_description_that_was_read_is_the_one_that_was_written(tmp_path: Path) -> None:
    delta_of_base(tmp_path)
    said, _ = read_delta(tmp_path / "delta")
    before = (tmp_path / "delta" / "leanvocab.json").read_bytes()
    said.write(tmp_path / "delta")
    assert (tmp_path / "delta" / "leanvocab.json").read_bytes() == before


@pytest.mark.parametrize("mode", ["full", "frozen"])
def test_a_model_whose_checkpoint_has_other_names_than_the_model_itself(tmp_path: Path, mode: Any) -> None:
    """transformers renames tensors when it loads some models: GPT-NeoX's output layer is `embed_out` on disk."""
    sizes = {
        "vocab_size": 60,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    torch.manual_seed(0)
    GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, tie_word_embeddings=False)).save_pretrained(tmp_path / "base")
    assert "embed_out.weight" in read_all(tmp_path / "base")
    model, other = (GPTNeoXForCausalLM.from_pretrained(tmp_path / "base") for _ in range(2))
    vocabulary = PartialVocabulary(range(3, 40, 2), 60)
    for each in (model, other):
        shrink_(each, vocabulary, output=mode)
    ids = torch.tensor([[3, 5, 7, 39]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    lv.save_delta(model, tmp_path / "delta")
    assert differing(load_delta(other, tmp_path / "delta"), model) == []
    merge_checkpoint(base=tmp_path / "base", delta=tmp_path / "delta", output=tmp_path / "merged", verify=True)
    assert differing(GPTNeoXForCausalLM.from_pretrained(tmp_path / "merged"), model) == []


def test_a_delta_beside_full_weights_is_refused_since_nothing_says_which_is_newer(tmp_path: Path) -> None:
    """A Trainer without deltas writes full checkpoints where one with deltas wrote before, and leaves its files there."""
    full = delta_of_base(tmp_path)
    full.save_pretrained(tmp_path / "delta")
    model = shrink_(type(full).from_pretrained(tmp_path / "base"), used_vocabulary())
    said = (
        r"holds a delta \(leanvocab.json\) and weights of a full checkpoint \(model.safetensors\), expected one of them"
    )
    with pytest.raises(CheckpointError, match=said):
        load_delta(model, tmp_path / "delta")
    with pytest.raises(CheckpointError, match=r"Remove model\.safetensors to use the delta, or leanvocab\.json and"):
        merge_checkpoint(base=tmp_path / "base", delta=tmp_path / "delta", output=tmp_path / "merged")
    (tmp_path / "delta" / "model.safetensors").unlink()
    assert differing(load_delta(model, tmp_path / "delta"), full) == []


def test_states_of_a_single_kept_row_are_rows_too(tmp_path: Path) -> None:
    """A count in a tensor of one number is none, and a state of one row is."""
    (tmp_path / "base").mkdir()
    full, model = (nn.Sequential(nn.Embedding(9, 4)) for _ in range(2))
    model.load_state_dict(full.state_dict())
    save_model(full, str(tmp_path / "base" / "model.safetensors"))
    shrink_(model, PartialVocabulary([3], 9))
    states = []
    for each in (full, model):
        optimizer = torch.optim.AdamW(each.parameters(), lr=0.1, weight_decay=0.0)
        each(torch.tensor([3])).sum().backward()
        optimizer.step()
        states.append({key: value[None] for key, value in optimizer.state_dict()["state"][0].items()})
    assert differing(*states) == []
    lv.save_delta(model, tmp_path / "delta", base=tmp_path / "base", optimizer=optimizer)
    read = read_full_states(tmp_path / "delta", read_delta(tmp_path / "delta")[0])
    assert differing({key: value[None] for key, value in read["state"][0].items()}, states[0]) == []


@pytest.mark.parametrize("trained", ["rows", "one expert", "all"])
def test_tensors_that_saving_splits_are_left_out_all_together_or_not_at_all(tmp_path: Path, trained: str) -> None:
    """transformers stacks the experts of Mixtral when it loads them, and has one tensor for each on disk."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 60,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    config = MixtralConfig(**sizes, num_key_value_heads=1, num_local_experts=2, tie_word_embeddings=False)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    full, model = (MixtralForCausalLM.from_pretrained(tmp_path / "base") for _ in range(2))
    assert set(full.state_dict()) != set(read_all(tmp_path / "base"))
    shrink_(model, PartialVocabulary([1, 5, 59], 60), output="full")
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
        full.get_input_embeddings().weight[[1, 5, 59]] += 1
        for each in (full, model):
            for name, parameter in each.named_parameters():
                if (trained == "all" and "embed" not in name) or (
                    trained == "one expert" and "layers.1.mlp.experts" in name
                ):
                    parameter[:1] += 1
    lv.save_delta(model, tmp_path / "delta")
    held = read_all(tmp_path / "delta")
    assert (len(held) == 1) == (trained == "rows")
    assert any("experts.1" in name for name in held) == (trained != "rows")
    merge_checkpoint(base=tmp_path / "base", delta=tmp_path / "delta", output=tmp_path / "merged", verify=True)
    full.save_pretrained(tmp_path / "expected")
    assert differing(read_all(tmp_path / "merged"), read_all(tmp_path / "expected")) == []
    assert set(model.state_dict()) == set(full.state_dict())  # nothing is left out any more
