"""Merging on disk: what it keeps, what it refuses, and that running it twice changes nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import bits, differing
from disk import content, delta_of_base, listing, random_rows, read_all, tiny_folders, trained_pair
from models import used_vocabulary
from safetensors.torch import save_file

import leanvocab as lv
from leanvocab.checkpoints import merge as merging
from leanvocab.checkpoints.merge import merge_checkpoint
from leanvocab.errors import CheckpointError


@pytest.mark.parametrize("base", ["single", "sharded"])
def test_a_merge_keeps_the_form_of_the_base_and_every_side_file(tmp_path: Path, base: str) -> None:
    expected = tiny_folders(tmp_path)
    (tmp_path / base / "onnx").mkdir()
    (tmp_path / base / "onnx" / "a.json").write_text("{}")
    (tmp_path / base / "same.json").symlink_to("tokenizer.json")
    (tmp_path / base / "pytorch_model.bin").write_bytes(b"stale")
    for path in (tmp_path / base).glob("*.*"):
        path.chmod(0o640)
    result = merge_checkpoint(base=tmp_path / base, delta=tmp_path / "delta", output=tmp_path / "out", verify=True)
    assert listing(tmp_path / "out") == [name for name in listing(tmp_path / base) if name != "pytorch_model.bin"]
    assert result.left_out == ("pytorch_model.bin",)
    assert os.readlink(tmp_path / "out" / "same.json") == "tokenizer.json"
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").glob("*.*")} == {0o640}
    assert {name: bits(value) for name, value in read_all(tmp_path / "out").items()} == {
        name: bits(value) for name, value in expected.state_dict().items()
    }
    assert (result.num_rows, result.num_replaced, result.num_added, result.verified) == (7, 1, 0, True)


def test_merging_twice_changes_nothing_out_of_place_and_in_place(tmp_path: Path) -> None:
    tiny_folders(tmp_path)
    options: dict[str, Any] = {"base": tmp_path / "sharded", "delta": tmp_path / "delta"}
    first = merge_checkpoint(**options, output=tmp_path / "out")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    second = merge_checkpoint(**options, output=tmp_path / "out")
    assert (first.already_there, second.already_there) == (False, True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == stamps
    assert not merge_checkpoint(**options, in_place=True).already_there
    assert merge_checkpoint(**options, in_place=True).already_there
    assert content(tmp_path / "sharded") == content(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["delta", "out", "sharded", "single"]


def test_what_lies_in_the_output_is_replaced_only_on_request(tmp_path: Path) -> None:
    tiny_folders(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    options: dict[str, Any] = {"base": tmp_path / "single", "delta": tmp_path / "delta", "output": tmp_path / "out"}
    with pytest.raises(CheckpointError, match=r"is there already, and is not this merge's result .*overwrite=True"):
        merge_checkpoint(**options)
    assert content(tmp_path / "out") == {"thesis.txt": b"mine"}
    merge_checkpoint(**options, overwrite=True)
    assert listing(tmp_path / "out") == ["model.safetensors", "tokenizer.json"]


@pytest.mark.parametrize("place", ["single", "single/inner", "delta", "delta/inner", "."])
def test_an_output_within_what_is_read_is_refused(tmp_path: Path, place: str) -> None:
    tiny_folders(tmp_path)
    before = content(tmp_path)
    with pytest.raises(CheckpointError, match="lie in one another"):
        merge_checkpoint(base=tmp_path / "single", delta=tmp_path / "delta", output=tmp_path / place, overwrite=True)
    assert content(tmp_path) == before


@pytest.mark.parametrize("where", ["header", "rows"])
def test_verification_finds_what_was_written_wrongly_and_nothing_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    tiny_folders(tmp_path)
    write_at = merging.write_at

    def write_half(target: int, data: bytes, start: int) -> None:
        if (start == 0) != (where == "header"):
            write_at(target, data, start)

    monkeypatch.setattr(merging, "write_at", write_half)
    with pytest.raises(CheckpointError, match="is not what was to be written, and is discarded"):
        merge_checkpoint(base=tmp_path / "single", delta=tmp_path / "delta", output=tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists()


def test_a_partial_checkpoint_merges_with_the_vocabulary_of_its_rows(tmp_path: Path) -> None:
    full, model = trained_pair(tmp_path)
    with lv.partial_state_dicts(model):
        model.save_pretrained(tmp_path / "partial")
    used_vocabulary().save(tmp_path / "vocabulary.json")
    options: dict[str, Any] = {"base": tmp_path / "base", "delta": tmp_path / "partial", "output": tmp_path / "out"}
    with pytest.raises(CheckpointError, match="for a partial checkpoint say which rows it holds: vocabulary="):
        merge_checkpoint(**options)
    merge_checkpoint(**options, vocabulary=tmp_path / "vocabulary.json", verify=True)
    assert differing(type(full).from_pretrained(tmp_path / "out"), full) == []
    (tmp_path / "vocabulary.json").write_text('{"full_size": 500}')
    with pytest.raises(CheckpointError, match=r"vocabulary.json: expected a vocabulary"):
        merge_checkpoint(**options, vocabulary=tmp_path / "vocabulary.json")
    with pytest.raises(CheckpointError, match=r"expected a table of 3 rows whose full one .* has 500, found none"):
        merge_checkpoint(**options, vocabulary=lv.PartialVocabulary([1, 2, 3], 500))


def test_rows_with_nan_are_taken_on_request(tmp_path: Path) -> None:
    full, model = trained_pair(tmp_path)
    with torch.no_grad():
        model.roberta.embeddings.word_embeddings.weight[0, 0] = float("nan")
    lv.save_delta(model, tmp_path / "delta")
    options: dict[str, Any] = {"base": tmp_path / "base", "delta": tmp_path / "delta", "output": tmp_path / "out"}
    with pytest.raises(CheckpointError, match="found NaN in the row of id 0: the training diverged"):
        merge_checkpoint(**options)
    assert not (tmp_path / "out").exists()
    merge_checkpoint(**options, allow_nan=True)
    assert differing(type(full).from_pretrained(tmp_path / "out"), model) == []


def test_both_copies_of_a_tied_table_in_the_base_are_replaced(tmp_path: Path) -> None:
    from models import small_model

    model = small_model("bart")
    model.save_pretrained(tmp_path / "base")
    tensors = read_all(tmp_path / "base")
    shared = next(name for name in tensors if name.endswith("shared.weight"))
    tensors["model.encoder.embed_tokens.weight"] = tensors[shared].clone()  # as older checkpoints have it
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    model = type(model).from_pretrained(tmp_path / "base")
    if model.model.encoder.embed_tokens.weight is not model.model.shared.weight:
        pytest.skip("this transformers ties no copies of a table that are both in the files")
    lv.shrink_(model, used_vocabulary())
    with torch.no_grad():
        model.model.shared.weight.copy_(random_rows(len(used_vocabulary()), 48, torch.float32))
    lv.save_delta(model, tmp_path / "delta")
    merge_checkpoint(base=tmp_path / "base", delta=tmp_path / "delta", output=tmp_path / "out", verify=True)
    merged = read_all(tmp_path / "out")
    assert bits(merged[shared]) == bits(merged["model.encoder.embed_tokens.weight"]) == bits(model.state_dict()[shared])
    assert differing(type(model).from_pretrained(tmp_path / "out"), model) == []


def test_merging_loads_no_torch() -> None:
    loaded = "print('torch' in sys.modules, 'transformers' in sys.modules)"
    program = f"import sys, leanvocab.checkpoints.merge, leanvocab.cli.merge; {loaded}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def command(*arguments: object) -> "subprocess.CompletedProcess[str]":
    program = "import sys; from leanvocab.cli import main; sys.argv[0] = 'leanvocab'; main()"
    run = [sys.executable, "-c", program, "merge", *map(str, arguments)]
    return subprocess.run(run, capture_output=True, text=True, check=False)


def test_the_command_merges_and_says_what_it_did(tmp_path: Path) -> None:
    full = delta_of_base(tmp_path)
    base, delta, out = tmp_path / "base", tmp_path / "delta", tmp_path / "out"
    done = command(base, delta, out, "--verify", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["num_rows"], said["verified"], said["already_there"]) == (len(used_vocabulary()), True, False)
    assert differing(type(full).from_pretrained(out), full) == []
    assert "nothing was written" in " ".join(command(base, delta, out).stdout.split())
    assert "rows, 40 other tensors replaced" in " ".join(command("--in-place", base, delta).stdout.split())
    assert content(base) == content(out)


def test_the_command_refuses_in_one_line(tmp_path: Path) -> None:
    tiny_folders(tmp_path)
    done = command(tmp_path / "single", tmp_path / "delta")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "give OUTPUT, a folder to make, or --in-place" in done.stderr
    done = command(tmp_path / "single", tmp_path / "sharded", tmp_path / "out", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["type"] == "CheckpointError"
    assert not (tmp_path / "out").exists()


def test_a_long_merge_shows_a_bar_with_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_folders(tmp_path)
    options: dict[str, Any] = {"base": tmp_path / "single", "delta": tmp_path / "delta"}
    merge_checkpoint(**options, output=tmp_path / "quiet")
    assert capsys.readouterr().err == ""
    merge_checkpoint(**options, output=tmp_path / "loud", progress=True)
    assert "B/s" in capsys.readouterr().err
