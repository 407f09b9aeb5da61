"""What trimming reads may be hostile: each case is an error that names its file, and nothing is written."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from disk import content, read_all, write_raw
from models import FULL_SIZE
from safetensors.torch import save_file
from texts import save_pretrained

import leanvocab as lv
from leanvocab.errors import LeanVocabError
from leanvocab.trimming.export import export_trimmed, trim_by_recipe

MODEL, CONFIG, TOKENIZER, SAID = "base/model.safetensors", "base/config.json", "base/tokenizer.json", "trimming.json"
DEEP = "[" * 90_000 + "]" * 90_000


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    save_pretrained(folder / "base")
    (folder / "base" / "generation_config.json").write_text('{"pad_token_id": 0}')
    export_trimmed(folder / "base", vocabulary(), folder / "out")
    shutil.move(folder / "out" / "trimming.json", folder / SAID)
    shutil.rmtree(folder / "out")
    return folder


def vocabulary() -> lv.PartialVocabulary:
    return lv.PartialVocabulary([5, 9, 200], FULL_SIZE)


def text(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def said(path: Path, *keys: str, value: Any) -> None:
    found = json.loads(path.read_text())
    at = found
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = value
    path.write_text(json.dumps(found))


def header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    found = json.loads(raw[8 : 8 + length])
    change(found)
    write_raw(path, json.dumps(found).encode(), raw[8 + length :])


def link(path: Path, target: str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


TABLE = "embeddings.word_embeddings.weight"

# name → (what is done to the folder, what the error says)
CASES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a truncated file": (lambda f: (f / MODEL).write_bytes((f / MODEL).read_bytes()[:-4]), "model.safetensors: .*expected data_offsets"),
    "an empty file": (lambda f: (f / MODEL).write_bytes(b""), "its header would have 0 bytes"),
    "a header that lies about rows": (lambda f: header(f / MODEL, lambda x: x[TABLE].update(shape=[FULL_SIZE + 1, 16])), "expected .* bytes"),
    "rows and columns the other way round": (lambda f: header(f / MODEL, lambda x: x[TABLE].update(shape=[16, FULL_SIZE])), r"word_embeddings.weight has the shape \(16, 500\) in the checkpoint, and \(500, 16\) by its config"),
    "a header that nests deep": (lambda f: write_raw(f / MODEL, f'{{"a":{DEEP}}}'.encode()), "nested deeper than 16"),
    "a link out of the folder": (lambda f: link(f / MODEL, "/dev/zero"), "a link that leads out of the folder"),
    "a pipe": (lambda f: pipe(f / MODEL), "expected a regular file"),
    "a config that nests deep": (lambda f: (f / CONFIG).write_text(f'{{"a":{DEEP}}}'), "config.json: .*nested deeper than 16"),
    "a config with a key twice": (lambda f: (f / CONFIG).write_text('{"vocab_size": 500, "vocab_size": 7}'), "config.json: .*duplicate key"),
    "a config that is a list": (lambda f: (f / CONFIG).write_text("[]"), "config.json: expected a JSON object"),
    "a config that is no JSON": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe"), "config.json: expected JSON"),
    "a config that is a link out": (lambda f: link(f / CONFIG, "/etc/passwd"), "config.json: a link that leads out of the folder"),
    "a config of no model": (lambda f: text(f / CONFIG, model_type="evil"), "model_type is 'evil', which this version of transformers does not know"),
    "a config of more rows": (lambda f: text(f / CONFIG, vocab_size=501), "the vocabulary's full size is 500, the model has 501 rows|has the shape"),
    "a config of more rows than memory": (lambda f: text(f / CONFIG, vocab_size=1 << 40), "the vocabulary's full size is 500, the model has|cannot be built"),
    "a config of negative rows": (lambda f: text(f / CONFIG, vocab_size=-1), "config.json|cannot be built"),
    "a config with rows in words": (lambda f: text(f / CONFIG, vocab_size="many"), "config.json|cannot be built"),
    "an id in words": (lambda f: text(f / CONFIG, pad_token_id="0"), "config.json"),
    "an id that is a fraction": (lambda f: text(f / CONFIG, pad_token_id=0.5), "config.json"),
    "a field of ids that nobody knows": (lambda f: text(f / CONFIG, secret_ids=[3, 4]), "config.json: secret_ids"),
    "generation's config is a list": (lambda f: (f / "base/generation_config.json").write_text("[]"), "generation_config.json: expected a JSON object"),
    "generation's config nests deep": (lambda f: (f / "base/generation_config.json").write_text(f'{{"a":{DEEP}}}'), "generation_config.json: .*nested"),
    "a tokenizer that nests deep": (lambda f: (f / TOKENIZER).write_text(f'{{"a":{DEEP}}}'), "tokenizer"),
    "a tokenizer that is none": (lambda f: (f / TOKENIZER).write_text("{}"), "tokenizer"),
    "a tokenizer that is a link out": (lambda f: link(f / TOKENIZER, "/etc/passwd"), "tokenizer.json: a link that leads out"),
    "a tokenizer that is a pipe": (lambda f: pipe(f / TOKENIZER), "tokenizer.json"),
    "a side file that is a link out": (lambda f: link(f / "base/notes.txt", "/etc/passwd"), "notes.txt: a link that leads out of the folder"),
    "a side file that is a pipe": (lambda f: pipe(f / "base/notes.txt"), "notes.txt: expected a regular file"),
    "modules that nest deep": (lambda f: (f / "base/modules.json").write_text(DEEP), "modules.json: .*nested deeper than 16"),
    "modules that are no JSON": (lambda f: (f / "base/modules.json").write_text("nonsense"), "modules.json: expected JSON"),
}  # fmt: skip

RECIPES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "files that climb out": (lambda f: said(f / SAID, "base", "files", "../../etc/passwd", value="0" * 64), "its file '../../etc/passwd'"),
    "weights among the files": (lambda f: said(f / SAID, "base", "files", "model.safetensors", value="0" * 64), "its file 'model.safetensors'"),
    "a file less": (lambda f: said(f / SAID, "base", "files", value={}), "its file '"),
    "another shape": (lambda f: said(f / SAID, "base", "tensors", TABLE, "shape", value=[3, 3]), f"its tensor '{TABLE}'"),
    "a tensor more": (lambda f: said(f / SAID, "base", "tensors", "ghost", value={"dtype": "F32", "shape": [1], "sha256": "0" * 64}), "its tensor 'ghost'"),
    "ids without those that have to stay": (lambda f: said(f / SAID, "vocabulary", value=as_said([5, 9])), "has to be|needs further ids"),
    "ids of a larger model": (lambda f: said(f / SAID, "vocabulary", value=as_said([*range(5), 9], 400)), "they belong to different models"),
    "ids of a smaller model": (lambda f: said(f / SAID, "vocabulary", value=as_said([*range(5), 9, 600], 700)), "its file|its tensor|other bytes"),
    "padding that is not there": (lambda f: said(f / SAID, "options", "pad_to_multiple_of", value=64), "other bytes than the recipe's"),
    "other bytes": (lambda f: said(f / SAID, "output", "tensors", TABLE, value="0" * 64), f"other bytes than the recipe's came out, .*: tensor '{TABLE}'"),
    "a delta that is not there": (lambda f: said(f / SAID, "delta", value={"name": "ghost", "files": {}}), "delta: expected a folder, found nothing at ghost"),
    "a recipe that nests deep": (lambda f: (f / SAID).write_text(f'{{"a":{DEEP}}}'), "trimming.json: .*nested deeper than 16"),
}  # fmt: skip


def as_said(ids: list[int], full_size: int = FULL_SIZE) -> dict[str, Any]:
    made = lv.PartialVocabulary(ids, full_size)
    return {"full_size": full_size, "digest": made.digest, "token_ids": " ".join(map(str, ids))}


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_base_is_refused_by_name_and_nothing_is_written(tmp_path: Path, folders: Path, name: str) -> None:
    spoil, words = CASES[name]
    shutil.copytree(folders, tmp_path / "in", symlinks=True)
    spoil(tmp_path / "in")
    before = content(tmp_path)
    with pytest.raises(LeanVocabError, match=words):
        export_trimmed(tmp_path / "in" / "base", vocabulary(), tmp_path / "out")
    assert content(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_hostile_recipe_is_refused_and_nothing_is_written(tmp_path: Path, folders: Path, name: str) -> None:
    spoil, words = RECIPES[name]
    shutil.copytree(folders, tmp_path / "in")
    spoil(tmp_path / "in")
    before = content(tmp_path)
    with pytest.raises(LeanVocabError, match=words):
        trim_by_recipe(tmp_path / "in" / SAID, tmp_path / "out", base=tmp_path / "in" / "base")
    assert content(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_pristine_folders_are_trimmed_and_made_again(tmp_path: Path, folders: Path) -> None:
    print(f"{len(CASES)} hostile bases, {len(RECIPES)} hostile recipes")
    export_trimmed(folders / "base", vocabulary(), tmp_path / "out")
    trim_by_recipe(folders / SAID, tmp_path / "again", base=folders / "base")
    once, again = content(tmp_path / "out"), content(tmp_path / "again")
    assert once.pop("trimming.json") == again.pop("trimming.json")
    assert once == again


def test_what_is_not_a_number_stays_as_it_is(tmp_path: Path, folders: Path) -> None:
    shutil.copytree(folders / "base", tmp_path / "base")
    tensors = read_all(tmp_path / "base")
    tensors[TABLE][9, 3], tensors["encoder.layer.0.output.dense.bias"][0] = float("nan"), float("inf")
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    result = export_trimmed(tmp_path / "base", vocabulary(), tmp_path / "out")
    trimmed = read_all(result.output)
    assert trimmed[TABLE].isnan().nonzero().tolist() == [[6, 3]]
    assert torch.isinf(trimmed["encoder.layer.0.output.dense.bias"][0])


def test_a_base_in_a_hub_cache_is_read_through_its_links(tmp_path: Path, folders: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    shutil.copytree(folders / "base", blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(os.path.relpath(path, snapshot))
    result = export_trimmed(snapshot, vocabulary(), tmp_path / "out")
    assert not any(path.is_symlink() for path in result.output.iterdir())
    assert json.loads((result.output / "trimming.json").read_text())["base"]["revision"] == "0123"
    trim_by_recipe(folders / SAID, tmp_path / "again", base=snapshot)
