"""Trimmed checkpoints: what lies in them, what they load as, what is refused, and that the same bytes come again."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from disk import content, listing, read_all
from models import FULL_SIZE, TEXT, make_model
from safetensors.torch import save_file
from texts import SPECIAL, save_language_model, save_pretrained, small_tokenizer
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

import leanvocab as lv
from leanvocab.checkpoints.tensor_names import names_when_saved
from leanvocab.errors import CheckpointError, LeanVocabError, VocabularyError
from leanvocab.trimming import export
from leanvocab.trimming.export import TrimResult, export_trimmed, trim_by_recipe
from leanvocab.trimming.recipe import read_recipe

IDS = [5, 6, 9, 40, 77, 200, 304]
TEXTS = ["word0 word1 word4", "word35 word72 word195 word299"]


def vocabulary(full_size: int = FULL_SIZE) -> lv.PartialVocabulary:
    return lv.PartialVocabulary(IDS, full_size)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_pretrained(tmp_path / "base")


def kept(result: TrimResult) -> np.ndarray[Any, Any]:
    return read_recipe(result.output / "trimming.json").vocabulary.token_ids


def assert_computes_as(trimmed: Path, base: Path, auto: Any = AutoModel) -> None:
    """Tokens are the same tokens, hidden states and logits of kept tokens the same bits."""
    ids = read_recipe(trimmed / "trimming.json").vocabulary.token_ids
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (base, trimmed)]
    models = [auto.from_pretrained(folder).eval() for folder in (base, trimmed)]
    for text in TEXTS:
        full, partial = (tokenizer(text, return_tensors="pt") for tokenizer in tokenizers)
        assert ids[partial["input_ids"].numpy()].tolist() == full["input_ids"].tolist()
        with torch.no_grad():
            outputs = [
                model(**inputs, output_hidden_states=True)
                for model, inputs in zip(models, (full, partial), strict=True)
            ]
        assert all(a.equal(b) for a, b in zip(outputs[0].hidden_states, outputs[1].hidden_states, strict=True))
        if "pooler_output" in outputs[0]:
            assert outputs[0].pooler_output.equal(outputs[1].pooler_output)
        if "logits" in outputs[0]:
            torch.testing.assert_close(outputs[0].logits[..., ids.tolist()], outputs[1].logits[..., : len(ids)])


def test_what_lies_in_the_output_and_what_it_loads_as(base: Path, tmp_path: Path) -> None:
    (base / "README.md").write_text("a model")
    (base / "notes").mkdir()
    (base / "notes" / "a.txt").write_text("kept")
    (base / "onnx").mkdir()
    (base / "onnx" / "model.onnx").write_bytes(b"all rows")
    (base / "pytorch_model.bin").write_bytes(b"all rows")
    (base / ".gitattributes").write_text("")
    before = content(base)
    result = export_trimmed(base, vocabulary(), tmp_path / "out")
    assert content(base) == before
    lost = {"onnx", "onnx/model.onnx", "pytorch_model.bin", ".gitattributes"}
    assert listing(tmp_path / "out") == sorted({*listing(base), "trimming.json"} - lost)
    assert set(result.left_out) == lost - {"onnx"}
    assert (result.rows_before, result.rows_after) == (FULL_SIZE, len(IDS) + len(SPECIAL))
    assert (
        result.rows_after == len(kept(result)) == json.loads((result.output / "config.json").read_text())["vocab_size"]
    )
    assert result.bytes_after == (result.output / "model.safetensors").stat().st_size < result.bytes_before
    assert result.tensors == ("embeddings.word_embeddings.weight",)
    assert set(result.tokenizer_files) == {"tokenizer.json", "tokenizer_config.json"}
    assert_computes_as(tmp_path / "out", base)


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("tied", [False, True])
def test_output_layers_are_cut_too(tmp_path: Path, family: str, tied: bool) -> None:
    base = save_language_model(tmp_path / "base", family, tied=tied)
    export_trimmed(base, vocabulary(), tmp_path / "out")
    assert_computes_as(tmp_path / "out", base, AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM)


def test_rows_of_padding_are_copies_of_the_pad_tokens_and_no_id_reaches_them(tmp_path: Path) -> None:
    base = save_language_model(tmp_path / "base", "llama")
    result = export_trimmed(base, vocabulary(), tmp_path / "out", pad_to_multiple_of=32)
    assert (result.rows_after, result.rows_of_padding) == (32, 32 - len(kept(result)))
    tensors, full = read_all(tmp_path / "out"), read_all(base)
    for name in result.tensors:
        assert tensors[name].shape[0] == 32
        assert all(row.equal(full[name][TEXT.pad]) for row in tensors[name][len(kept(result)) :])
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(kept(result))
    assert_computes_as(tmp_path / "out", base, AutoModelForCausalLM)
    again = export_trimmed(base, vocabulary(), tmp_path / "whole", pad_to_multiple_of=len(kept(result)))
    assert again.rows_of_padding == 0
    for wrong in (0, -1, True, 1.5, 1 << 20):
        with pytest.raises(VocabularyError, match=r"expected pad_to_multiple_of from 1 to 65,536, or None, got"):
            export_trimmed(base, vocabulary(), tmp_path / "other", pad_to_multiple_of=wrong)  # type: ignore[arg-type]


def test_trimming_twice_changes_nothing_and_says_so(base: Path, tmp_path: Path) -> None:
    first = export_trimmed(base, vocabulary(), tmp_path / "out")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    second = export_trimmed(os.path.relpath(base), vocabulary(), tmp_path / "out")
    assert (first.already_there, second.already_there) == (False, True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == stamps
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_what_is_trimmed_already_stays_as_it_is_but_for_the_recipe(base: Path, tmp_path: Path) -> None:
    first = export_trimmed(base, vocabulary(), tmp_path / "out")
    every = lv.PartialVocabulary(range(first.rows_after), first.rows_after)
    second = export_trimmed(tmp_path / "out", every, tmp_path / "again")
    assert (second.rows_after, second.rows_for_model, second.rows_for_splits) == (first.rows_after, 0, 0)
    once, twice = content(tmp_path / "out"), content(tmp_path / "again")
    assert once.pop("trimming.json") != twice.pop("trimming.json")
    assert once == twice


def test_another_result_is_replaced_only_on_request(base: Path, tmp_path: Path) -> None:
    export_trimmed(base, vocabulary(), tmp_path / "out")
    before = content(tmp_path / "out")
    other = lv.PartialVocabulary([7, 8], FULL_SIZE)
    with pytest.raises(
        CheckpointError, match=r"is not this trimming's result \(it keeps 12 of 500 rows, here 7 would stay\)"
    ):
        export_trimmed(base, other, tmp_path / "out")
    with pytest.raises(
        CheckpointError, match=r"this trimming's result \(.* differs\); name another output, or .*overwrite=True"
    ):
        export_trimmed(base, vocabulary(), tmp_path / "out", pad_to_multiple_of=32)
    assert content(tmp_path / "out") == before
    export_trimmed(base, other, tmp_path / "out", overwrite=True)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 7
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"mine is there already, .* \(no trimming.json lies there\)"):
        export_trimmed(base, vocabulary(), tmp_path / "mine")
    assert content(tmp_path / "mine") == {"thesis.txt": b"mine"}


@pytest.mark.parametrize("theirs", ["the same", "another"])
def test_what_another_put_there_meanwhile_is_taken_or_left_alone(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, theirs: str
) -> None:
    export_trimmed(base, vocabulary(), tmp_path / "theirs")
    if theirs == "another":
        (tmp_path / "theirs" / "config.json").write_text("{}")
    expected = content(tmp_path / "theirs")
    sync = export.sync_tree

    def someone_is_faster(folder: Path) -> None:
        sync(folder)
        (tmp_path / "theirs").rename(tmp_path / "out")

    monkeypatch.setattr(export, "sync_tree", someone_is_faster)
    if theirs == "the same":
        assert export_trimmed(base, vocabulary(), tmp_path / "out").already_there
    else:
        with pytest.raises(CheckpointError, match=r"out is there already, and is not .* \(config.json differs\)"):
            export_trimmed(base, vocabulary(), tmp_path / "out")
    assert content(tmp_path / "out") == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiple", [None, 16])
def test_a_recipe_makes_the_same_bytes_again(base: Path, tmp_path: Path, multiple: int | None) -> None:
    export_trimmed(base, vocabulary(), tmp_path / "out", pad_to_multiple_of=multiple)
    trim_by_recipe(tmp_path / "out" / "trimming.json", tmp_path / "again")
    assert content(tmp_path / "again") == content(tmp_path / "out")
    shutil.copytree(base, tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "further.txt").write_text("not there when the recipe was made")
    trim_by_recipe(tmp_path / "out" / "trimming.json", tmp_path / "third", base=tmp_path / "elsewhere")
    assert content(tmp_path / "third") == content(tmp_path / "out")
    assert trim_by_recipe(tmp_path / "out" / "trimming.json", tmp_path / "out").already_there


def test_a_recipe_holds_no_path_but_the_one_that_was_given(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    export_trimmed("base", vocabulary(), "out")
    assert str(tmp_path) not in (tmp_path / "out" / "trimming.json").read_text()
    trim_by_recipe("out/trimming.json", "again")
    assert content(tmp_path / "again") == content(tmp_path / "out")


def spoil_tensor(base: Path) -> None:
    path = base / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def spoil_config(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (spoil_tensor, r"the base is another one, or damaged: its tensor '.*': expected"),
        (spoil_config, r"the base is another one: its file 'config.json': expected"),
        (lambda base: (base / "tokenizer_config.json").unlink(), r"its file 'tokenizer_config.json'"),
    ],
)
def test_a_recipe_refuses_another_base_by_its_digests(base: Path, tmp_path: Path, spoil: Any, error: str) -> None:
    export_trimmed(base, vocabulary(), tmp_path / "out")
    spoil(base)
    with pytest.raises(CheckpointError, match=error):
        trim_by_recipe(tmp_path / "out" / "trimming.json", tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


# --- a delta, and a model in memory -----------------------------------------------------------------------------------


def trained(base: Path, auto: Any = AutoModel) -> Any:
    """A shrunk model of which every parameter was changed a little, as training does."""
    model = auto.from_pretrained(base)
    lv.shrink_(model, lv.PartialVocabulary(sorted({*IDS, *range(12)}), FULL_SIZE))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.125)
    return model


def test_a_delta_a_merged_checkpoint_and_the_model_itself_give_the_same(base: Path, tmp_path: Path) -> None:
    model = trained(base)
    lv.save_delta(model, tmp_path / "delta", base=base)
    lv.merge_checkpoint(base=base, delta=tmp_path / "delta", output=tmp_path / "merged")
    export_trimmed(tmp_path / "merged", vocabulary(), tmp_path / "of_merged")
    of_delta = export_trimmed(base, vocabulary(), tmp_path / "of_delta", delta=tmp_path / "delta")
    export_trimmed(model, vocabulary(), tmp_path / "of_model", tokenizer=AutoTokenizer.from_pretrained(base))
    expected = {name: t.tolist() for name, t in read_all(tmp_path / "of_merged").items()}
    for name, renamed in {"of_delta": {}, "of_model": names_when_saved(model)}.items():  # as save_pretrained calls them
        written = {name: t.tolist() for name, t in read_all(tmp_path / name).items()}
        assert written == {renamed.get(its, its): values for its, values in expected.items()}
        assert_computes_as(tmp_path / name, tmp_path / "merged")
    assert len(kept(of_delta)) == of_delta.rows_after
    trim_by_recipe(tmp_path / "of_delta" / "trimming.json", tmp_path / "again")
    assert content(tmp_path / "again") == content(tmp_path / "of_delta")
    assert not list(tmp_path.glob(".*"))


def test_a_recipe_refuses_another_delta(base: Path, tmp_path: Path) -> None:
    model = trained(base)
    lv.save_delta(model, tmp_path / "delta", base=base)
    export_trimmed(base, vocabulary(), tmp_path / "out", delta=tmp_path / "delta")
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight.add_(1)
    lv.save_delta(model, tmp_path / "delta", base=base)
    with pytest.raises(CheckpointError, match=r"the delta is another one: its file 'leanvocab.json'"):
        trim_by_recipe(tmp_path / "out" / "trimming.json", tmp_path / "again")
    export_trimmed(base, vocabulary(), tmp_path / "without")
    with pytest.raises(CheckpointError, match=r"was made without a delta, expected none, found"):
        trim_by_recipe(tmp_path / "without" / "trimming.json", tmp_path / "again", delta=tmp_path / "delta")


def test_a_model_in_memory_says_which_tokenizer_and_leaves_no_full_copy(tmp_path: Path) -> None:
    model = make_model("bert", TEXT, num_labels=2)
    with pytest.raises(
        CheckpointError, match=r"a model in memory has no tokenizer: hand it over, tokenizer=…, or .*=False"
    ):
        export_trimmed(model, vocabulary(), tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"delta= is for a base on disk"):
        export_trimmed(model, vocabulary(), tmp_path / "out", delta=tmp_path)
    result = export_trimmed(model, vocabulary(), tmp_path / "out", tokenizer=False)
    assert (result.tokenizer_files, [p.name for p in tmp_path.iterdir()]) == ((), ["out"])
    with pytest.raises(CheckpointError, match=r"was made of a model in memory: name a folder that holds it, base="):
        trim_by_recipe(tmp_path / "out" / "trimming.json", tmp_path / "again")
    model.save_pretrained(tmp_path / "saved")
    trim_by_recipe(tmp_path / "out" / "trimming.json", tmp_path / "again", base=tmp_path / "saved")
    assert content(tmp_path / "again") == content(tmp_path / "out")


@pytest.mark.parametrize("length", [0, 8, 24, 40])
def test_pooled_outputs_are_the_same_bits_although_they_depend_on_where_weights_lie(
    base: Path, tmp_path: Path, length: int
) -> None:
    save_file(read_all(base), base / "model.safetensors", metadata={"format": "pt", "more": "x" * length})
    export_trimmed(base, vocabulary(), tmp_path / "out")
    assert_computes_as(tmp_path / "out", base)


# --- proofs -----------------------------------------------------------------------------------------------------------


def test_a_result_is_proved_before_it_appears(base: Path, tmp_path: Path) -> None:
    result = export_trimmed(base, vocabulary(), tmp_path / "out", verify=[*TEXTS, "word99"])
    assert result.proof is not None
    assert (result.proof.holds, result.proof.total.covered_texts, result.proof.model_texts) == (True, 2, 2)
    lv.save_delta(trained(base), tmp_path / "delta", base=base)
    of_delta = export_trimmed(
        base, vocabulary(), tmp_path / "of_delta", delta=tmp_path / "delta", tokenizer=base, verify=TEXTS
    )
    assert of_delta.proof is not None
    assert of_delta.proof.holds
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "delta", "of_delta", "out"]
    with pytest.raises(CheckpointError, match=r"without a tokenizer there are none: leave verify= out"):
        export_trimmed(base, vocabulary(), tmp_path / "other", tokenizer=False, verify=TEXTS)


def test_weights_that_lie_in_no_file_do_not_spoil_a_proof(base: Path, tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in read_all(base).items() if not name.startswith("pooler")}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    result = export_trimmed(base, vocabulary(), tmp_path / "out", verify=TEXTS)
    assert result.proof is not None
    assert "pooler_output" in result.proof.outputs


def test_what_was_written_wrongly_is_found_by_a_proof_and_never_appears(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = export.write_trimmed

    def write_otherwise(folder: Path, *rest: Any) -> Any:
        written = write(folder, *rest)
        tensors = read_all(folder)
        tensors["embeddings.word_embeddings.weight"][6] += 1
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return written

    monkeypatch.setattr(export, "write_trimmed", write_otherwise)
    with pytest.raises(
        CheckpointError, match=r"is discarded, since its proof does not hold: 0 covered .* last_hidden_state"
    ):
        export_trimmed(base, vocabulary(), tmp_path / "out", verify=TEXTS)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


# --- refusals, before anything is written -----------------------------------------------------------------------------


def changed_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def without(name: str) -> Any:
    return lambda base: (base / name).unlink()


def without_tokenizer(base: Path) -> None:
    for path in base.glob("tokenizer*"):
        path.unlink()


def only_a_pickle(base: Path) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (without("config.json"), r"expected config.json, found none"),
        (without("model.safetensors"), r"expected model.safetensors or model.safetensors.index.json, found neither"),
        (only_a_pickle, r"pytorch_model.bin is a pickle, which is never loaded"),
        (
            without_tokenizer,
            r"expected a tokenizer's files beside the model, found none; hand it over, tokenizer=…, or",
        ),
        (lambda base: (base / "leanvocab.json").write_text("{}"), r"is a delta; name the base first"),
        (lambda base: (base / "adapter_config.json").write_text("{}"), r"is an adapter of peft, expected a checkpoint"),
        (
            lambda base: changed_config(base, quantization_config={"quant_method": "gptq"}),
            r"its weights are quantized \(gptq\), in a layout that is not known here; trim before quantizing",
        ),
    ],
)
def test_what_cannot_be_trimmed_is_refused_by_name(base: Path, tmp_path: Path, spoil: Any, error: str) -> None:
    spoil(base)
    before = content(tmp_path)
    with pytest.raises(LeanVocabError, match=error):
        export_trimmed(base, vocabulary(), tmp_path / "out")
    assert content(tmp_path) == before


@pytest.mark.parametrize("full_size", [FULL_SIZE - 1, FULL_SIZE + 1])
def test_a_vocabulary_of_another_size_is_refused(base: Path, tmp_path: Path, full_size: int) -> None:
    with pytest.raises(VocabularyError, match=rf"the vocabulary's full size is {full_size}, the model has 500 rows"):
        export_trimmed(base, vocabulary(full_size), tmp_path / "out")
    by_tokenizer = lv.PartialVocabulary.from_counts(np.bincount(IDS), tokenizer=small_tokenizer())
    assert by_tokenizer.full_size < FULL_SIZE  # a minimum, since only the tokenizer said it
    export_trimmed(base, by_tokenizer, tmp_path / "out")


@pytest.mark.parametrize("output", ["base", "base/inner", "."])
def test_an_output_within_the_base_is_refused(base: Path, tmp_path: Path, output: str) -> None:
    before = content(tmp_path)
    with pytest.raises(CheckpointError, match="lie in one another"):
        export_trimmed(base, vocabulary(), tmp_path / output, overwrite=True)
    assert content(tmp_path) == before


def test_a_tokenizer_of_another_folder_takes_the_place_of_the_bases(base: Path, tmp_path: Path) -> None:
    small_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (base / "vocab.txt").write_text("stale")
    result = export_trimmed(base, vocabulary(), tmp_path / "out", tokenizer=tmp_path / "tokenizer")
    assert "vocab.txt" in result.left_out
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == result.rows_after
    alone = export_trimmed(base, vocabulary(), tmp_path / "alone", tokenizer=False)
    assert not list((tmp_path / "alone").glob("tokenizer*"))
    assert {"tokenizer.json", "tokenizer_config.json", "vocab.txt"} == set(alone.left_out)
