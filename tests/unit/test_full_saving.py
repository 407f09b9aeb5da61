import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import differing, train
from disk import delta_of_base, listing
from models import small_model, twins, used_vocabulary
from safetensors.torch import load_file
from torch import nn

from leanvocab.checkpoints.full_saving import save_full
from leanvocab.errors import CheckpointError
from leanvocab.files import atomic_folders
from leanvocab.model.shrink import partial_state_dicts, shrink_
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

SHARDED, WHOLE = "60KB", "5GB"


@pytest.mark.parametrize(("first", "second"), [(a, b) for a in (SHARDED, WHOLE) for b in (SHARDED, WHOLE)])
def test_saving_over_the_folder_that_the_model_came_from_is_safe_whatever_its_sharding(
    tmp_path: Path, first: str, second: str
) -> None:
    small_model().save_pretrained(tmp_path / "base", max_shard_size=first)
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    (tmp_path / "base" / "notes").mkdir()
    (tmp_path / "base" / "notes" / "a.txt").write_text("kept")
    full, model = (type(small_model()).from_pretrained(tmp_path / "base") for _ in range(2))
    shrink_(model, used_vocabulary())
    for each in (full, model):
        train(each)
    for _ in range(2):  # run twice: the second time over its own result
        assert save_full(model, tmp_path / "base", max_shard_size=second) == (tmp_path / "base").resolve()
        full.save_pretrained(tmp_path / f"expected-{second}", max_shard_size=second)
        expected = [*listing(tmp_path / f"expected-{second}"), "notes", "notes/a.txt", "tokenizer.json"]
        assert listing(tmp_path / "base") == sorted(expected)
        for name in listing(tmp_path / f"expected-{second}"):
            assert (tmp_path / "base" / name).read_bytes() == (tmp_path / f"expected-{second}" / name).read_bytes()
    assert differing(full, type(full).from_pretrained(tmp_path / "base")) == []
    assert differing(full, model) == []  # the store lives on, though its file was replaced
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", f"expected-{second}"]


STAGES = {  # → what fails at it
    "writing": (type(small_model()), "save_pretrained"),
    "other files": (shutil, "copy2"),  # where links fail too
    "syncing": (os, "fsync"),
    "swapping": (atomic_folders, "exchange"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_failure_at_any_stage_leaves_the_folder_as_it_was_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    model = small_model()
    save_full(model, tmp_path / "saved")
    (tmp_path / "saved" / "tokenizer.json").write_text("{}")
    before = {name: (tmp_path / "saved" / name).read_bytes() for name in listing(tmp_path / "saved")}
    train(model)

    def fail(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "link", fail)
        patched.setattr(*STAGES[stage], fail)
        with pytest.raises(OSError, match="No space left"):
            save_full(model, tmp_path / "saved")
    assert {name: (tmp_path / "saved" / name).read_bytes() for name in listing(tmp_path / "saved")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_the_swap_works_without_an_atomic_exchange_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    save_full(model, tmp_path / "saved")
    train(model)
    monkeypatch.setattr(atomic_folders, "exchange", lambda first, second: False)
    save_full(model, tmp_path / "saved")
    assert differing(model, type(model).from_pretrained(tmp_path / "saved")) == []
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_what_a_killed_writer_left_behind_is_cleared_and_what_a_live_one_writes_is_not(tmp_path: Path) -> None:
    dead, live = tmp_path / ".saved.leanvocab-999999999-x", tmp_path / f".saved.leanvocab-{os.getpid()}-y"
    for folder in (dead, live):
        folder.mkdir()
    save_full(small_model(), tmp_path / "saved")
    assert not dead.exists()
    assert live.exists()


def test_saving_through_a_link_writes_where_the_link_points(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save_full(small_model(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "model.safetensors").exists()


def test_any_module_is_saved_as_one_file_with_its_full_rows(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(9, 4))
    expected = model[0].weight.detach().cpu().clone()
    save_full(shrink_(model, PartialVocabulary([3, 8], 9)), tmp_path / "saved")
    assert torch.equal(load_file(tmp_path / "saved" / "model.safetensors")["0.weight"], expected)
    with pytest.raises(CheckpointError, match="has no save_pretrained to take the options max_shard_size"):
        save_full(model, tmp_path / "other", max_shard_size="1GB")
    assert not (tmp_path / "other").exists()


def test_what_was_collected_from_the_parameters_themselves_is_saved_in_full_by_a_model_of_its_vocabulary(
    tmp_path: Path,
) -> None:
    """So does DeepSpeed collect it in `engine.save_16bit_model`, and in `zero_to_fp32.py`."""
    base, trained = twins()
    train(shrink_(trained, used_vocabulary()))
    collected = {
        f"{path}.{name}": value.detach().clone()
        for path, module in trained.named_modules()
        for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        if name not in module._non_persistent_buffers_set
    }
    other = shrink_(base, used_vocabulary())
    with pytest.raises(CheckpointError, match=r"load them within partial_state_dicts\(model\)"):
        other.load_state_dict(collected)
    with partial_state_dicts(other):
        other.load_state_dict(collected)
    for model, name in ((trained, "trained"), (other, "loaded")):
        save_full(model, tmp_path / name)
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("trained", "loaded")]
    assert written[0] == written[1]


def test_a_file_in_the_place_of_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "saved").write_text("precious")
    with pytest.raises(CheckpointError, match="is a file, expected a folder"):
        save_full(small_model(), tmp_path / "saved")
    assert (tmp_path / "saved").read_text() == "precious"


def test_a_shrunk_model_saves_what_an_unshrunk_one_saves(tmp_path: Path) -> None:
    full, model = twins()
    shrink_(model, used_vocabulary())
    for each, name in ((full, "full"), (model, "shrunk")):
        train(each)
        save_full(each, tmp_path / name)
    assert listing(tmp_path / "full") == listing(tmp_path / "shrunk")
    for name in listing(tmp_path / "full"):
        assert (tmp_path / "full" / name).read_bytes() == (tmp_path / "shrunk" / name).read_bytes()


def test_a_delta_that_was_saved_there_before_gives_way(tmp_path: Path) -> None:
    delta_of_base(tmp_path)
    (tmp_path / "delta/notes.txt").write_text("mine")
    save_full(small_model(), tmp_path / "delta")
    assert listing(tmp_path / "delta") == ["config.json", "model.safetensors", "notes.txt"]
