"""Deltas of two checkpoints on disk: a merge gives the tuned one back, and they cost what differs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from disk import content, delta_of_base, listing, read_all, tiny_folders, trained_pair
from models import small_model
from runs import json_of, run, text_of
from safetensors.torch import save_file, save_model
from transformers import AutoModelForSequenceClassification, BertConfig, BertForMaskedLM, BertModel

from leanvocab.checkpoints.delta_format import read_delta
from leanvocab.checkpoints.delta_making import make_delta
from leanvocab.checkpoints.merge import merge_checkpoint
from leanvocab.errors import CheckpointError


def assert_gives_back(folder: Path) -> Path:
    """`folder / "tuned"` is what a merge of the delta into `folder / "base"` gives, tensor by tensor."""
    delta = make_delta(folder / "tuned", folder / "base", folder / "made").output
    merge_checkpoint(base=folder / "base", delta=delta, output=folder / "again", verify=True, allow_nan=True)
    tuned, again = read_all(folder / "tuned"), read_all(folder / "again")
    assert set(tuned) == set(again)
    for name, tensor in tuned.items():
        assert tensor.dtype == again[name].dtype
        assert tensor.numpy().tobytes() == again[name].numpy().tobytes(), name
    return delta


@pytest.mark.parametrize("max_shard_size", ["5GB", "50KB"])
def test_a_run_that_knew_nothing_of_leanvocab_becomes_a_delta_of_its_rows(tmp_path: Path, max_shard_size: str) -> None:
    full, _ = trained_pair(tmp_path, max_shard_size=max_shard_size)
    full.save_pretrained(tmp_path / "tuned")
    delta = assert_gives_back(tmp_path)
    (table,) = read_delta(delta)[0].tables.values()
    assert 0 < len(table.vocabulary) < table.vocabulary.full_size / 2


def test_it_holds_no_more_than_the_delta_that_a_run_writes(tmp_path: Path) -> None:
    delta_of_base(tmp_path).save_pretrained(tmp_path / "tuned")
    made = make_delta(tmp_path / "tuned", tmp_path / "base", tmp_path / "made").output
    assert listing(made) == listing(tmp_path / "delta")
    held, of_the_run = read_all(made), read_all(tmp_path / "delta")
    assert set(held) == set(of_the_run)
    assert sum(t.nbytes for t in held.values()) <= sum(t.nbytes for t in of_the_run.values())


@pytest.mark.parametrize("tuned_class", [AutoModelForSequenceClassification, BertForMaskedLM])
def test_another_head_is_new_and_the_bases_leaves(tmp_path: Path, tuned_class: Any) -> None:
    config = BertConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=90)
    BertModel(config).save_pretrained(tmp_path / "base")
    tuned = tuned_class.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        tuned.get_input_embeddings().weight[3] += 1
    tuned.save_pretrained(tmp_path / "tuned")
    delta = read_delta(assert_gives_back(tmp_path))[0]
    assert delta.renamed
    assert delta.absent == tuple(
        name for name in read_all(tmp_path / "base") if "bert." + name not in read_all(tmp_path / "tuned")
    )


def test_added_tokens_make_a_matrix_of_another_size_which_is_carried_whole(tmp_path: Path) -> None:
    model = small_model()
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(511)
    model.save_pretrained(tmp_path / "tuned")
    assert not read_delta(assert_gives_back(tmp_path))[0].tables


@pytest.mark.parametrize("kind", ["one value", "a NaN", "minus zero", "a scalar", "nothing else", "every row"])
def test_whatever_differs_in_any_bit_is_carried(tmp_path: Path, kind: str) -> None:
    tensors = {"table": torch.arange(240.0).view(40, 6), "scale": torch.tensor(2.0), "empty": torch.zeros(0, 3)}
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    if kind == "every row":
        changed["table"] += 1
    elif kind == "a scalar":
        changed["scale"] += 1
    else:
        changed["table"][0, 0] = {"one value": 5.0, "a NaN": torch.nan, "minus zero": -0.0, "nothing else": 7.0}[kind]
    for name, held in (("base", tensors), ("tuned", changed)):
        (tmp_path / name).mkdir()
        save_file(held, tmp_path / name / "model.safetensors")
    delta, file = read_delta(assert_gives_back(tmp_path))
    assert set(file.tensors) == ({"scale"} if kind == "a scalar" else {"table"})
    assert bool(delta.tables) == (kind not in ("a scalar", "every row"))


def test_files_that_a_merge_would_take_from_the_base_are_named(tmp_path: Path) -> None:
    full, _ = trained_pair(tmp_path)
    full.save_pretrained(tmp_path / "tuned")
    (tmp_path / "tuned/tokenizer.json").write_text('{"version": "of its own"}')
    (tmp_path / "tuned/chat_template.jinja").write_bytes((tmp_path / "base/chat_template.jinja").read_bytes())
    assert make_delta(tmp_path / "tuned", tmp_path / "base", tmp_path / "made").left_out == ("tokenizer.json",)


def test_the_command_says_what_it_wrote_and_how_to_merge_it(tmp_path: Path) -> None:
    delta_of_base(tmp_path).save_pretrained(tmp_path / "tuned")
    names = [tmp_path / name for name in ("tuned", "base", "made")]
    printed = text_of("delta", *names)
    assert f"leanvocab merge {tmp_path / 'base'} {tmp_path / 'made'} OUTPUT" in printed
    assert json_of("delta", *names, "--overwrite")["delta"]["base"] == str(tmp_path / "base")
    assert "--overwrite" in run("delta", *names, code=1).stderr


def test_nothing_is_written_where_there_is_nothing_to_write_or_it_would_not_merge(tmp_path: Path) -> None:
    model = tiny_folders(tmp_path)
    save_model(model, str(tmp_path / "again.safetensors"))
    before = content(tmp_path)
    (tmp_path / "half").mkdir()
    save_file({n: t.half() for n, t in read_all(tmp_path / "single").items()}, tmp_path / "half/model.safetensors")
    (tmp_path / "adapter").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter/adapter_model.safetensors")
    (tmp_path / "foreign").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign/model.safetensors")
    before |= content(tmp_path)
    cases = {
        (tmp_path / "single", tmp_path / "out"): "holds the same tensors as .*there is nothing to carry",
        (tmp_path / "half", tmp_path / "out"): r"'head.bias': expected F32, as in the base, found F16; .*dtype",
        (tmp_path / "adapter", tmp_path / "out"): "is an adapter.*merge_and_unload",
        (tmp_path / "foreign", tmp_path / "out"): "has no tensor of",
        (tmp_path / "delta", tmp_path / "out"): "is a delta already",
        (tmp_path / "nowhere", tmp_path / "out"): "the fine-tuned checkpoint '.*nowhere' is no folder here",
        (tmp_path / "half", tmp_path / "single/out"): "lie in one another",
    }
    for (tuned, output), message in cases.items():
        with pytest.raises(CheckpointError, match=message):
            make_delta(tuned, tmp_path / "single", output)
    assert content(tmp_path) == before
