"""Everything that is read may be hostile: each case is an error that names file, tensor, expected and found; nothing is written."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from disk import content, sha256, tiny_folders, write_raw

from leanvocab.checkpoints.merge import merge_checkpoint
from leanvocab.errors import CheckpointError

SHARD, INDEX = "model-00001-of-00002.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    tiny_folders(folder)
    (folder / "outside").mkdir()
    shutil.copy(folder / "single" / "model.safetensors", folder / "outside" / "model.safetensors")
    return folder


def header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the header of a safetensors file, its data as it is."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    found = json.loads(raw[8 : 8 + length])
    write_raw(path, json.dumps(change(found) or found).encode(), raw[8 + length :])


def text(path: Path, change: Callable[[Any], Any]) -> None:
    """Changes a JSON file."""
    found = json.loads(path.read_text())
    path.write_text(json.dumps(change(found) or found))


def entry(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["table.weight"].update(values)


def described(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    """Sets one value of leanvocab.json."""

    def change(found: Any) -> None:
        for key in path[:-1]:
            found = found[key]
        found[path[-1]] = value

    return change


def first_row(path: Path, value: bytes) -> tuple[int, int]:
    """Writes over the first values of `table.weight`, and returns where it lies."""
    raw = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    start, end = (8 + length + each for each in json.loads(raw[8 : 8 + length])[TABLE]["data_offsets"])
    raw[start : start + len(value)] = value
    path.write_bytes(raw)
    return start, end


def replace_by_link(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def cut(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


def duplicate(path: Path, old: str, new: str) -> None:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    write_raw(path, raw[8 : 8 + length].replace(old.encode(), new.encode(), 1), raw[8 + length :])


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def move_names(f: Path, old: str, new: str) -> None:
    text(
        f / "sharded" / INDEX,
        lambda found: found["weight_map"].update({k: new for k, v in found["weight_map"].items() if v == old}),
    )


MODEL, DELTA, SAID = "single/model.safetensors", "delta/delta.safetensors", "delta/leanvocab.json"
TABLE = "table.weight"

# name → (which base, what is done to the folder, what the error says)
CASES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    # names in an index
    "index climbs out": ("sharded", lambda f: move_names(f, SHARD, "../outside/model.safetensors"), "expected the name of a file in this folder"),
    "index names an absolute path": ("sharded", lambda f: move_names(f, SHARD, str(f / "outside" / "model.safetensors")), "expected the name of a file in this folder"),
    "index climbs out by a dotted middle": ("sharded", lambda f: move_names(f, SHARD, "a/../../outside/model.safetensors"), "expected the name of a file"),
    "index with a backslash": ("sharded", lambda f: move_names(f, SHARD, "..\\outside\\model.safetensors"), "expected the name of a file"),
    "index with a null byte": ("sharded", lambda f: move_names(f, SHARD, "a\0.safetensors"), "expected the name of a file"),
    "index names a pickle": ("sharded", lambda f: move_names(f, SHARD, "pytorch_model.bin"), "expected a .safetensors file, found 'pytorch_model.bin'"),
    "index names a number": ("sharded", lambda f: text(f / "sharded" / INDEX, lambda x: x["weight_map"].update({TABLE: 7})), "expected a .safetensors file, found 7"),
    "index without a map": ("sharded", lambda f: text(f / "sharded" / INDEX, lambda x: {"metadata": {}}), "expected a weight_map"),
    "index is a list": ("sharded", lambda f: (f / "sharded" / INDEX).write_text("[]"), "expected a JSON object, found \\[\\]"),
    "index names a tensor that is in no shard": ("sharded", lambda f: text(f / "sharded" / INDEX, lambda x: x["weight_map"].update({"ghost": SHARD})), "expected 'ghost' in model-00001-of-00002.safetensors, found it in no shard"),
    "index names the wrong shard": ("sharded", lambda f: text(f / "sharded" / INDEX, lambda x: x["weight_map"].update({TABLE: "model-00002-of-00002.safetensors"})), "expected 'table.weight' in model-00002-of-00002.safetensors, found it in model-00001"),
    "index with a duplicate key": ("sharded", lambda f: (f / "sharded" / INDEX).write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'), "duplicate key 'a'"),
    "one tensor in two shards": ("sharded", lambda f: shutil.copy(f / "sharded" / SHARD, f / "sharded" / "model-00002-of-00002.safetensors"), "lies in two shards"),
    "a shard is missing": ("sharded", lambda f: (f / "sharded" / SHARD).unlink(), "cannot be opened \\(No such file"),
    # links and things that are no files
    "the file is a link out of the folder": ("single", lambda f: replace_by_link(f / MODEL, "../outside/model.safetensors"), "a link that leads out of the folder"),
    "a shard is a link out of the folder": ("sharded", lambda f: replace_by_link(f / "sharded" / SHARD, "../outside/model.safetensors"), "a link that leads out of the folder"),
    "a link to itself": ("single", lambda f: replace_by_link(f / MODEL, "model.safetensors"), "cannot be opened"),
    "the delta's tensors are a link out": ("single", lambda f: replace_by_link(f / DELTA, "/dev/zero"), "a link that leads out of the folder"),
    "a side file is a link out": ("single", lambda f: replace_by_link(f / "single" / "tokenizer.json", "/etc/passwd"), "tokenizer.json: a link that leads out of the folder, to /etc/passwd"),
    "a pipe in the place of the file": ("single", lambda f: pipe(f / MODEL), "expected a regular file"),
    "a pipe in the place of the description": ("single", lambda f: pipe(f / SAID), "expected a delta"),
    "a pipe among the side files": ("single", lambda f: pipe(f / "single" / "tokenizer.json"), "tokenizer.json: expected a regular file"),
    "a folder in the place of the file": ("single", lambda f: ((f / MODEL).unlink(), (f / MODEL).mkdir()), "expected a regular file"),
    # headers
    "header longer than the file": ("single", lambda f: write_raw(f / MODEL, b"{}", length=1 << 20), "its header would have 1,048,576 bytes, expected at most 2 "),
    "header of 2**64 - 1 bytes": ("single", lambda f: write_raw(f / MODEL, b"{}", length=(1 << 64) - 1), "its header would have 18,446,744,073,709,551,615"),
    "an empty file": ("single", lambda f: (f / MODEL).write_bytes(b""), "its header would have 0 bytes"),
    "seven bytes": ("single", lambda f: (f / MODEL).write_bytes(b"1234567"), "truncated, or no safetensors"),
    "header is no JSON": ("single", lambda f: write_raw(f / MODEL, b"nonsense"), "expected JSON, found something else"),
    "header is no text": ("single", lambda f: write_raw(f / MODEL, b"\xff\xfe{}"), "expected JSON, found something else"),
    "header nests deep": ("single", lambda f: write_raw(f / MODEL, b'{"a":' + b"[" * 90_000 + b"]" * 90_000 + b"}"), "nested deeper than 16"),
    "header with a duplicate tensor": ("single", lambda f: duplicate(f / MODEL, '"head.bias"', '"table.weight"'), "duplicate key 'table.weight'"),
    "header with a duplicate offset": ("single", lambda f: duplicate(f / MODEL, '"dtype"', '"shape":[1],"dtype"'), "duplicate key 'shape'"),
    "header with a key too many": ("single", lambda f: header(f / MODEL, entry(order="F")), "expected dtype, shape and data_offsets"),
    "header without a shape": ("single", lambda f: header(f / MODEL, lambda x: x["table.weight"].pop("shape") and None), "expected dtype, shape and data_offsets"),
    "an unknown dtype": ("single", lambda f: header(f / MODEL, entry(dtype="F33")), "expected a dtype such as F32, found 'F33'"),
    "a dtype that is a list": ("single", lambda f: header(f / MODEL, entry(dtype=["F32"])), "expected a dtype such as F32"),
    "a negative size": ("single", lambda f: header(f / MODEL, entry(shape=[-40, -6])), "expected a shape of sizes from 0"),
    "a size that is true": ("single", lambda f: header(f / MODEL, entry(shape=[True, 240])), "expected a shape of sizes from 0"),
    "a size that is a fraction": ("single", lambda f: header(f / MODEL, entry(shape=[40.0, 6])), "expected a shape of sizes from 0"),
    "a size that overflows": ("single", lambda f: header(f / MODEL, entry(shape=[1 << 62, 1 << 62])), "expected .* bytes \\(F32"),
    "more dimensions than anyone has": ("single", lambda f: header(f / MODEL, entry(shape=[1] * 4000)), "expected a shape of sizes from 0"),
    "a shape that does not fit the bytes": ("single", lambda f: header(f / MODEL, entry(shape=[41, 6])), "expected 984 bytes \\(F32 \\[41, 6\\]\\), found 960"),
    "offsets beyond the file": ("single", lambda f: header(f / MODEL, entry(data_offsets=[0, 1 << 40])), "expected data_offsets \\[start, end\\] within"),
    "offsets that run backwards": ("single", lambda f: header(f / MODEL, entry(data_offsets=[960, 0])), "expected data_offsets"),
    "negative offsets": ("single", lambda f: header(f / MODEL, entry(data_offsets=[-960, 0])), "expected data_offsets"),
    "offsets that overlap": ("single", lambda f: header(f / MODEL, entry(data_offsets=[0, 960])), "overlaps"),
    "offsets that leave a hole": ("single", lambda f: header(f / MODEL, lambda x: x.pop("head.bias") and None), "leaves a hole after|expected it at byte"),
    "data after the last tensor": ("single", lambda f: (f / MODEL).write_bytes((f / MODEL).read_bytes() + b"more"), "what follows .* is no tensor"),
    "a truncated file": ("single", lambda f: cut(f / MODEL, 4), "expected data_offsets"),
    "a truncated shard": ("sharded", lambda f: cut(f / "sharded" / SHARD, 4), "expected data_offsets"),
    "a truncated delta": ("single", lambda f: cut(f / DELTA, 4), "delta.safetensors: tensor .*expected data_offsets"),
    "metadata that is no text": ("single", lambda f: header(f / MODEL, lambda x: x.update(__metadata__={"a": 1})), "expected __metadata__"),
    "not a number in the header": ("single", lambda f: write_raw(f / MODEL, b'{"a": NaN}'), "NaN is no number"),
    "a number of a million digits": ("single", lambda f: write_raw(f / MODEL, b'{"a": ' + b"9" * 1_000_000 + b"}"), "expected JSON"),
    # the description
    "another format": ("single", lambda f: text(f / SAID, described("format", value="other")), "expected format 'leanvocab delta', version 1, found 'other'"),
    "a newer version": ("single", lambda f: text(f / SAID, described("version", value=2)), "found 'leanvocab delta', 2; a newer leanvocab"),
    "an id out of range": ("single", lambda f: text(f / SAID, described("tables", TABLE, "token_ids", value=[1, 2, 5, 40])), "expected token ids from 0 to 39, found 40"),
    "a negative id": ("single", lambda f: text(f / SAID, described("tables", TABLE, "token_ids", value=[-1, 2, 5, 39])), "expected token ids from 0, found \\[-1"),
    "unsorted ids": ("single", lambda f: text(f / SAID, described("tables", TABLE, "token_ids", value=[2, 1, 5, 39])), "expected sorted token ids, each once, found 1 after 2"),
    "repeated ids": ("single", lambda f: text(f / SAID, described("tables", TABLE, "token_ids", value=[1, 1, 5, 39])), "found 1 after 1"),
    "other ids than the digest says": ("single", lambda f: text(f / SAID, described("tables", TABLE, "token_ids", value=[1, 2, 6, 39])), "the token ids have the digest"),
    "ids that are no list": ("single", lambda f: text(f / SAID, described("tables", TABLE, "token_ids", value="all")), "expected token ids from 0, found 'all'"),
    "no ids": ("single", lambda f: text(f / SAID, described("tables", TABLE, "token_ids", value=[])), "expected token ids from 0, found \\[\\]"),
    "a full size that would take all memory": ("single", lambda f: text(f / SAID, described("tables", TABLE, "full_size", value=1 << 40)), "expected token ids from 0 to"),
    "fewer rows than ids": ("single", lambda f: header(f / DELTA, lambda x: x.update({"table.weight": x["per_layer.weight"], "per_layer.weight": x["table.weight"]})), "expected [34] rows, as many as ids"),
    "a digest that is none": ("single", lambda f: text(f / SAID, described("tensors", TABLE, "sha256", value="abc")), "expected 64 hexadecimal digits, found 'abc'"),
    "a delta's tensor that was changed": ("single", lambda f: first_row(f / DELTA, b"\x00\x00\x00\x40"), "delta.safetensors: tensor .*expected sha256"),
    "a base's row that was changed": ("single", lambda f: first_row(f / MODEL, b"\x00\x00\x00\x40"), "model.safetensors: tensor .*expected sha256"),
    "a shard's row that was changed": ("sharded", lambda f: first_row(f / "sharded" / SHARD, b"\x00\x00\x00\x40"), "00001-of-00002.safetensors: tensor .*expected sha256"),
    "another base of the same form": ("single", lambda f: text(f / SAID, described("base", "tensors", TABLE, "sha256", value="0" * 64)), "tensor 'table.weight': expected sha256 0000000000000000"),
    "a base of another form": ("single", lambda f: text(f / SAID, described("base", "tensors", "head.weight", "shape", value=[3, 6])), "expected F32 \\[3, 6\\], found F32 \\[2, 6\\]"),
    "a base with another dtype": ("single", lambda f: text(f / SAID, described("base", "tensors", "head.weight", "dtype", value="F16")), "expected F16 \\[2, 6\\], found F32"),
    "a base that lacks a tensor": ("single", lambda f: text(f / SAID, described("base", "tensors", "ghost", value={"dtype": "F32", "shape": [1], "sha256": "0" * 64})), "expected the tensor 'ghost', found none"),
    "a table that replaces nothing": ("single", lambda f: text(f / SAID, described("tensors", TABLE, "replaces", value=[])), "replaces rows of no tensor of the base"),
    "a tensor that replaces what is not there": ("single", lambda f: text(f / SAID, described("tensors", TABLE, "replaces", value=["ghost"])), "'ghost' is said to be a tensor of the base"),
    "one tensor replaced twice": ("single", lambda f: text(f / SAID, described("tensors", "head.bias", "replaces", value=[TABLE])), "is replaced twice"),
    "a table of another size": ("single", lambda f: text(f / SAID, described("tensors", TABLE, "replaces", value=["head.weight"])), "expected 40 rows in 'head.weight'|replaced twice"),
    "two tensors renamed to one": ("single", lambda f: text(f / SAID, described("renamed", value={"head.weight": "x", "head.bias": "x"})), "would not have one name each"),
    "a tensor renamed to metadata": ("single", lambda f: text(f / SAID, described("renamed", value={"head.weight": "__metadata__"})), "would not have one name each"),
    "a tensor that is said and not there": ("single", lambda f: text(f / SAID, described("tensors", "ghost", value={"replaces": [], "sha256": "0" * 64})), "'ghost' is in leanvocab.json and not in delta.safetensors"),
    "names that are no list": ("single", lambda f: text(f / SAID, described("absent", value={"a": 1})), "absent: expected list"),
    "NaN in a row": ("single", lambda f: nan_row(f), "found NaN in the row of id 1"),
    "code in the model's config": ("single", lambda f: (f / "delta" / "model_config.json").write_text('{"auto_map": {"AutoModel": "evil.Model"}}'), "expected no code of its own, found auto_map"),
    "code deep in the model's config": ("single", lambda f: (f / "delta" / "model_config.json").write_text('{"text_config": {"auto_map": {"AutoModel": "evil.Model"}}}'), "expected no code of its own"),
    "the model's config is a link": ("single", lambda f: (f / "delta" / "model_config.json").symlink_to("/etc/passwd"), "a link that leads out of the folder"),
    "only a pickle": ("single", lambda f: (f / MODEL).rename(f / "single" / "pytorch_model.bin"), "is a pickle, which is never loaded"),
}  # fmt: skip


def nan_row(folder: Path) -> None:
    """A NaN, with the digest made to fit."""
    start, end = first_row(folder / DELTA, b"\x00\x00\xc0\x7f")
    digest = sha256((folder / DELTA).read_bytes()[start:end])
    text(folder / SAID, described("tensors", TABLE, "sha256", value=digest))


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_input_is_refused_by_name_and_nothing_is_written(tmp_path: Path, folders: Path, name: str) -> None:
    base, spoil, said = CASES[name]
    shutil.copytree(folders, tmp_path / "in", symlinks=True)
    spoil(tmp_path / "in")
    before = content(tmp_path)
    for options in ({"output": tmp_path / "out"}, {"in_place": True}):
        with pytest.raises(CheckpointError, match=said):
            merge_checkpoint(base=tmp_path / "in" / base, delta=tmp_path / "in" / "delta", **options)
        assert content(tmp_path) == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_there_are_as_many_hostile_inputs_as_promised_and_the_pristine_ones_merge(
    tmp_path: Path, folders: Path
) -> None:
    print(f"{len(CASES)} hostile inputs, each merged out of place and in place")
    assert len(CASES) >= 40
    for base in ("single", "sharded"):
        merge_checkpoint(base=folders / base, delta=folders / "delta", output=tmp_path / base, verify=True)


def test_a_file_of_a_hub_cache_is_a_link_and_is_read(tmp_path: Path, folders: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0"
    blobs = tmp_path / "models--a--b" / "blobs"
    shutil.copytree(folders / "single", blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(os.path.relpath(path, snapshot))
    result = merge_checkpoint(base=snapshot, delta=folders / "delta", output=tmp_path / "out", verify=True)
    assert not any(path.is_symlink() for path in result.output.iterdir())
    assert (result.output / "tokenizer.json").read_text() == "{}"
    with pytest.raises(CheckpointError, match="lies in a hub cache, which others share"):
        merge_checkpoint(base=snapshot, delta=folders / "delta", in_place=True)
