"""Output layers on disk: tied stays tied, untied has rows of its own, and what is saved says how it was trained."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import bits, differing, train
from disk import listing, read_all
from models import FULL_SIZE, language_batch, small_model, used_vocabulary
from torch import nn

import leanvocab as lv
from leanvocab.adapters.exporting import export_trainable_tokens
from leanvocab.checkpoints.delta_loading import load_delta
from leanvocab.checkpoints.merge import merge_checkpoint
from leanvocab.errors import CheckpointError, LeanVocabWarning, ModelError
from leanvocab.model.shrink import merge_, shrink_
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

PAIRS = [
    ("llama-tied", "frozen"),
    ("llama-tied", "restricted"),
    ("llama-untied", "frozen"),
    ("llama-untied", "restricted"),
    ("bert-tied", "frozen"),
    ("bart-tied", "frozen"),
    ("gemma2-softcap", "restricted"),
]

# What a restricted softmax is, is said each time that a model is shrunk so; test_output_layer.py has that warning's words.
pytestmark = pytest.mark.filterwarnings('ignore:.*output="restricted" trains a softmax:UserWarning')


def trained(folder: Path, family: str, mode: str | None, **options: Any) -> nn.Module:
    """A model that was trained while shrunk, from a base that is saved in `folder / "base"`."""
    model = small_model(family)
    if not (folder / "base").exists():
        model.save_pretrained(folder / "base")
    model = type(model).from_pretrained(folder / "base")
    shrink_(model, used_vocabulary(), output=mode, **options)
    train(model, **language_batch())
    return model


def shared_weights(model: nn.Module) -> set[tuple[str, ...]]:
    """The names that are one parameter."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {tuple(names) for names in groups.values() if len(names) > 1}


@pytest.mark.parametrize(("family", "mode"), PAIRS)
def test_what_a_shrunk_model_saves_is_byte_for_byte_what_the_merged_one_saves(
    tmp_path: Path, family: str, mode: str
) -> None:
    model = trained(tmp_path, family, mode)
    model.save_pretrained(tmp_path / "shrunk")
    lv.save_full(model, tmp_path / "whole")
    merge_(model)
    model.save_pretrained(tmp_path / "merged")
    note = ["leanvocab_training.json"] if mode == "restricted" else []
    assert listing(tmp_path / "shrunk") == listing(tmp_path / "merged")
    assert listing(tmp_path / "whole") == sorted([*listing(tmp_path / "merged"), *note])
    for name in listing(tmp_path / "merged"):
        expected = (tmp_path / "merged" / name).read_bytes()
        assert (tmp_path / "shrunk" / name).read_bytes() == expected
        assert (tmp_path / "whole" / name).read_bytes() == expected


@pytest.mark.parametrize(("family", "mode"), PAIRS)
def test_a_delta_and_its_base_give_the_merged_model_and_what_was_tied_is_tied(
    tmp_path: Path, family: str, mode: str
) -> None:
    model = trained(tmp_path, family, mode)
    lv.save_delta(model, tmp_path / "delta")
    merge_checkpoint(base=tmp_path / "base", delta=tmp_path / "delta", output=tmp_path / "merged", verify=True)
    merge_(model)
    model.save_pretrained(tmp_path / "expected")
    for name in listing(tmp_path / "expected"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes(), name
    loaded = type(model).from_pretrained(tmp_path / "merged")
    assert differing(loaded, model) == []
    assert shared_weights(loaded) == shared_weights(small_model(family))


@pytest.mark.parametrize(("family", "mode"), PAIRS)
def test_a_delta_holds_rows_of_each_matrix_once_and_says_the_mode(tmp_path: Path, family: str, mode: str) -> None:
    model = trained(tmp_path, family, mode)
    lv.save_delta(model, tmp_path / "delta")
    said = json.loads((tmp_path / "delta" / "leanvocab.json").read_text())
    assert said["output"] == mode
    held = read_all(tmp_path / "delta")
    rows = [name for name, value in held.items() if value.shape == (len(used_vocabulary()), 48)]
    assert sorted(rows) == sorted(said["tables"])
    assert len(rows) == (2 if family == "llama-untied" else 1)
    assert not [name for name, value in held.items() if value.ndim == 2 and FULL_SIZE in value.shape]
    for name in rows:
        assert said["tables"][name]["digest"] == used_vocabulary().digest


def test_a_whole_output_layer_is_a_tensor_of_the_delta(tmp_path: Path) -> None:
    model = trained(tmp_path, "llama-untied", "full")
    lv.save_delta(model, tmp_path / "delta")
    said = json.loads((tmp_path / "delta" / "leanvocab.json").read_text())
    assert said["output"] == "full"
    assert list(said["tables"]) == ["model.embed_tokens.weight"]
    assert read_all(tmp_path / "delta")["lm_head.weight"].shape == (FULL_SIZE, 48)


@pytest.mark.parametrize(("family", "mode"), PAIRS)
def test_a_delta_loads_into_a_model_that_is_shrunk_in_the_same_way(tmp_path: Path, family: str, mode: str) -> None:
    model = trained(tmp_path, family, mode)
    lv.save_delta(model, tmp_path / "delta")
    fresh = type(model).from_pretrained(tmp_path / "base")
    shrink_(fresh, used_vocabulary(), output=mode)
    load_delta(fresh, tmp_path / "delta")
    assert differing(fresh, model) == []
    assert differing(merge_(fresh), merge_(model)) == []
    assert shared_weights(fresh) == shared_weights(small_model(family))


@pytest.mark.parametrize(("family", "mode"), PAIRS)
def test_widening_keeps_the_mode_and_where_frozen_rows_are(tmp_path: Path, family: str, mode: str) -> None:
    model = trained(tmp_path, family, mode)
    lv.save_delta(model, tmp_path / "delta")
    other = PartialVocabulary(range(0, FULL_SIZE, 3), FULL_SIZE)
    fresh = type(model).from_pretrained(tmp_path / "base")
    shrink_(fresh, other, output=mode, frozen_rows="host")
    with pytest.raises(CheckpointError, match="of another vocabulary"):
        load_delta(fresh, tmp_path / "delta")
    load_delta(fresh, tmp_path / "delta", widen=True)
    found = lv.status(fresh)
    assert found.output == mode
    assert {table.digest for table in found.tables} == {(other | used_vocabulary()).digest}
    assert fresh.get_output_embeddings().table.frozen_rows_on == "host"
    assert differing(merge_(fresh), merge_(model)) == []


def test_widening_keeps_the_threshold_of_a_filtered_gradient(tmp_path: Path) -> None:
    model = trained(tmp_path, "llama-tied", "frozen")
    lv.save_delta(model, tmp_path / "delta")
    fresh = type(model).from_pretrained(tmp_path / "base")
    shrink_(fresh, PartialVocabulary(range(0, FULL_SIZE, 3), FULL_SIZE), filter_eps="auto")
    load_delta(fresh, tmp_path / "delta", widen=True)
    assert [table.filter_eps for table in lv.status(fresh).tables] == ["auto"]


@pytest.mark.parametrize("modes", [("frozen", "restricted"), ("restricted", "frozen")], ids="-to-".join)
@pytest.mark.parametrize("family", ["llama-tied", "llama-untied"])
def test_rows_of_another_objective_load_with_a_warning(tmp_path: Path, family: str, modes: tuple[str, str]) -> None:
    model = trained(tmp_path, family, modes[0])
    lv.save_delta(model, tmp_path / "delta")
    fresh = type(model).from_pretrained(tmp_path / "base")
    shrink_(fresh, used_vocabulary(), output=modes[1])
    with pytest.warns(
        LeanVocabWarning, match=f'trained with output="{modes[0]}", .* is shrunk with output="{modes[1]}"'
    ):
        load_delta(fresh, tmp_path / "delta")
    assert differing(fresh, model) == []


def test_a_whole_output_layer_loads_into_a_partial_one_with_its_other_rows(tmp_path: Path) -> None:
    """Training with output="full" moves every row of the output layer: the frozen rows are these then, not the base's."""
    model = trained(tmp_path, "llama-untied", "full")
    lv.save_delta(model, tmp_path / "delta")
    fresh = type(model).from_pretrained(tmp_path / "base")
    shrink_(fresh, used_vocabulary(), output="frozen")
    with pytest.warns(LeanVocabWarning, match='trained with output="full"'):
        load_delta(fresh, tmp_path / "delta")
    assert differing(fresh, model) == []
    with torch.no_grad():
        logits, expected = (each.eval()(**language_batch()).logits for each in (fresh, merge_(model)))
    torch.testing.assert_close(logits.clone(), expected, rtol=1e-5, atol=1e-6)
    assert differing(merge_(fresh), model) == []


def test_rows_of_an_output_layer_do_not_load_into_a_whole_one(tmp_path: Path) -> None:
    model = trained(tmp_path, "llama-untied", "frozen")
    lv.save_delta(model, tmp_path / "delta")
    fresh = type(model).from_pretrained(tmp_path / "base")
    shrink_(fresh, used_vocabulary(), output="full")
    before = {name: bits(value) for name, value in fresh.state_dict().items()}
    with pytest.raises(
        CheckpointError,
        match=r"expected a shrunk table for 'lm_head.weight', .*trained with output=\"frozen\".*shrink_",
    ):
        load_delta(fresh, tmp_path / "delta")
    assert {name: bits(value) for name, value in fresh.state_dict().items()} == before


def test_unused_rows_that_decayed_load_into_a_shrunk_model(tmp_path: Path) -> None:
    """Such a table is carried whole, and its other rows are not the base's any more."""
    from models import small_model, used_vocabulary

    small_model().save_pretrained(tmp_path / "base")
    model, fresh = (type(small_model()).from_pretrained(tmp_path / "base") for _ in range(2))
    for each in (model, fresh):
        shrink_(each, used_vocabulary(), decay_unused_rows=True)
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1))
    lv.save_delta(model, tmp_path / "delta")
    load_delta(fresh, tmp_path / "delta")
    assert differing(fresh, model) == []


def test_loading_in_the_same_mode_says_nothing(tmp_path: Path) -> None:
    model = trained(tmp_path, "llama-tied", "frozen")
    lv.save_delta(model, tmp_path / "delta")
    fresh = shrink_(type(model).from_pretrained(tmp_path / "base"), used_vocabulary())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_delta(fresh, tmp_path / "delta")


def test_a_mode_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    model = trained(tmp_path, "llama-tied", "frozen")
    lv.save_delta(model, tmp_path / "delta")
    path = tmp_path / "delta" / "leanvocab.json"
    path.write_text(path.read_text().replace('"output":"frozen"', '"output":"sampled"'))
    with pytest.raises(CheckpointError, match="output: expected one of full, frozen, restricted, found 'sampled'"):
        merge_checkpoint(base=tmp_path / "base", delta=tmp_path / "delta", output=tmp_path / "merged")


def test_a_restricted_objective_is_said_beside_what_is_saved_and_merged(tmp_path: Path) -> None:
    model = trained(tmp_path, "llama-tied", "restricted")
    lv.save_delta(model, tmp_path / "delta")
    assert 'output="restricted"' in (tmp_path / "delta" / "README.md").read_text()
    lv.save_full(model, tmp_path / "saved")
    merge_checkpoint(base=tmp_path / "base", delta=tmp_path / "delta", output=tmp_path / "merged", verify=True)
    assert merge_checkpoint(base=tmp_path / "base", delta=tmp_path / "delta", output=tmp_path / "merged").already_there
    for folder in ("saved", "merged"):
        said = json.loads((tmp_path / folder / "leanvocab_training.json").read_text())
        assert said["output"] == "restricted"
        assert "another objective" in said["meaning"]
        (table,) = said["tables"].values()
        assert table == {"num_rows": len(used_vocabulary()), "full_size": FULL_SIZE, "digest": used_vocabulary().digest}
        assert differing(type(model).from_pretrained(tmp_path / folder), model) == []


def test_what_is_saved_over_a_restricted_model_does_not_say_so_any_more(tmp_path: Path) -> None:
    lv.save_full(trained(tmp_path, "llama-tied", "restricted"), tmp_path / "saved")
    (tmp_path / "saved" / "notes.txt").write_text("mine")
    lv.save_full(trained(tmp_path, "llama-tied", "frozen"), tmp_path / "saved")
    assert "leanvocab_training.json" not in listing(tmp_path / "saved")
    assert "notes.txt" in listing(tmp_path / "saved")


@pytest.mark.parametrize("family", ["llama-tied", "llama-untied", "bert-tied", "bart-tied"])
def test_the_rows_of_a_language_model_are_an_adapter_that_peft_loads_to_the_same_logits(
    tmp_path: Path, family: str
) -> None:
    small_model(family).save_pretrained(tmp_path / "base")
    model = shrink_(type(small_model(family)).from_pretrained(tmp_path / "base"), used_vocabulary(), output="frozen")
    rows = {id(each.weight) for each in (model.get_input_embeddings(), model.get_output_embeddings())}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in rows)
    train(model, **language_batch())
    export_trainable_tokens(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft reads deprecated attributes of transformers
        from peft import PeftModel

        adapted = PeftModel.from_pretrained(type(model).from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert bits(adapted(**language_batch()).logits) == bits(merge_(model).eval()(**language_batch()).logits)
        merged = adapted.merge_and_unload()
    assert differing(merged, model) == []
    assert shared_weights(merged) == shared_weights(small_model(family))


def test_an_adapter_of_an_output_layer_with_a_bias_is_refused_since_peft_leaves_it_out(tmp_path: Path) -> None:
    model = small_model("bert-tied")
    model.cls.predictions.bias.data.normal_()
    model.save_pretrained(tmp_path / "base")
    model = shrink_(type(model).from_pretrained(tmp_path / "base"), used_vocabulary())
    with pytest.raises(
        ModelError, match=r"cls.predictions.decoder has a bias, which peft's trainable tokens leave out"
    ):
        export_trainable_tokens(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
