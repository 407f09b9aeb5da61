"""Paths that may not be looked at: said as such on every Python, and never taken for nothing or for a name on the hub."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from disk import tiny_folders

from leanvocab.checkpoints.base_checkpoint import find_base
from leanvocab.checkpoints.delta_making import make_delta
from leanvocab.checkpoints.merge import merge_checkpoint
from leanvocab.cli.described import describe
from leanvocab.cli.printing import check_new_file, say_where_from
from leanvocab.files.presence import is_entry, is_file, is_folder, is_there
from leanvocab.finetune.pretrained import find_pretrained
from leanvocab.finetune.settings import FineTuneSettings
from leanvocab.reports.header_estimate import folder_of
from leanvocab.reports.inspection import inspect_checkpoint
from leanvocab.reports.memory import estimate_memory
from leanvocab.texts.data_files import load_splits, read_data_file
from leanvocab.trimming.export import export_trimmed
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

NOTHING_KEPT = PartialVocabulary([], 40)
LOOKS: dict[str, Callable[[Path, Path], Any]] = {
    "describe": lambda locked, _: describe(str(locked / "model"), None, None),
    "load_splits, a folder": lambda locked, _: load_splits(locked / "data"),
    "load_splits, a file": lambda locked, _: load_splits(locked / "data.csv"),
    "read_data_file": lambda locked, _: read_data_file(locked / "data.csv"),
    "merge_checkpoint, base": lambda locked, free: merge_checkpoint(
        base=locked / "base", delta=free / "delta", output=free / "out"
    ),
    "merge_checkpoint, delta": lambda locked, free: merge_checkpoint(
        base=free / "single", delta=locked / "delta", output=free / "out"
    ),
    "merge_checkpoint, output": lambda locked, free: merge_checkpoint(
        base=free / "single", delta=free / "delta", output=locked / "out"
    ),
    "export_trimmed, base": lambda locked, free: export_trimmed(locked / "base", NOTHING_KEPT, free / "out"),
    "export_trimmed, delta": lambda locked, free: export_trimmed(
        free / "single", NOTHING_KEPT, free / "out", delta=locked / "delta"
    ),
    "export_trimmed, output": lambda locked, free: export_trimmed(free / "single", NOTHING_KEPT, locked / "out"),
    "make_delta": lambda locked, free: make_delta(free / "single", locked / "tuned", free / "out"),
    "find_base": lambda locked, _: find_base(None, locked / "base"),
    "find_base, its files": lambda locked, _: find_base(None, locked),
    "find_pretrained": lambda locked, _: find_pretrained(locked / "model", FineTuneSettings(), 0.1),
    "inspect_checkpoint": lambda locked, _: inspect_checkpoint(locked / "model"),
    "estimate_memory": lambda locked, _: estimate_memory(str(locked / "model"), 10),
    "folder_of": lambda locked, _: folder_of(str(locked / "model")),
    "check_new_file": lambda locked, _: check_new_file(locked / "vocabulary.json", False),
    "say_where_from": lambda locked, _: say_where_from(str(locked / "model")),
}


@pytest.fixture
def locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which nothing may be looked at, be it by root, under a Python whose paths say that nothing is there."""
    folder, ask = tmp_path / "locked", os.stat
    folder.mkdir()

    def stat(path: Any, *args: Any, **options: Any) -> os.stat_result:
        if not isinstance(path, int) and folder in Path(os.fsdecode(path)).parents:
            raise PermissionError(13, "Permission denied", os.fsdecode(path))
        return ask(path, *args, **options)

    monkeypatch.setattr(os, "stat", stat)
    for name, said in {"exists": os.path.exists, "is_file": os.path.isfile, "is_dir": os.path.isdir}.items():
        monkeypatch.setattr(Path, name, said)  # as from Python 3.14 on
    return folder


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.filterwarnings("ignore")
def test_what_may_not_be_looked_at_is_said_as_that(locked: Path, tmp_path: Path, look: str) -> None:
    tiny_folders(tmp_path / "free")
    with pytest.raises(PermissionError, match=r"Permission denied: '.*/locked/"):
        LOOKS[look](locked, tmp_path / "free")


@pytest.mark.parametrize("ask", [is_there, is_file, is_folder])
def test_nothing_is_there_where_nothing_can_be(tmp_path: Path, ask: Callable[[Any], bool]) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for name in ("absent", "file/below", "loop", "n" * 300, "null\0byte"):
        assert not ask(tmp_path / name)
    assert is_entry(tmp_path / "loop")
    assert not is_entry(tmp_path / "absent")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert (is_there(tmp_path / "file"), is_file(tmp_path / "file"), is_folder(tmp_path / "file")) == (
        True,
        True,
        False,
    )
    assert (is_there(tmp_path), is_file(tmp_path), is_folder(tmp_path)) == (True, False, True)
