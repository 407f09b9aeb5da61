"""A full disk, a folder that cannot be written, truncated files, two merges at once: nothing is lost."""

import contextlib
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from comparing import differing
from disk import content, delta_of_base, tiny_folders, trained_pair
from models import FULL_SIZE

import leanvocab as lv
from leanvocab.checkpoints.merge import merge_checkpoint
from leanvocab.errors import CheckpointError


@contextlib.contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Path]:
    """A file system of its own with so much room; skips where mounting is not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small disk is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# What is tried on a disk with too little room: name → (operation, the folder that it writes)
def operations(model: Any, disk: Path) -> dict[str, tuple[Callable[[], Any], str]]:
    return {
        "save_full": (lambda: lv.save_full(model, disk / "saved"), "saved"),
        "save_delta": (lambda: lv.save_delta(model, disk / "delta2", base=disk / "base"), "delta2"),
        "merge": (lambda: merge_checkpoint(base=disk / "base", delta=disk / "delta", output=disk / "out"), "out"),
        "merge in place": (lambda: merge_checkpoint(base=disk / "base", delta=disk / "delta", in_place=True), "base"),
        "trim": (lambda: trim(disk), "trimmed"),
    }


def trim(disk: Path) -> None:
    """Nearly all rows stay, so that nearly as much is written as the base has."""
    kept = lv.PartialVocabulary(range(FULL_SIZE - 10), FULL_SIZE)
    lv.export_trimmed(disk / "base", kept, disk / "trimmed", delta=disk / "delta", tokenizer=False)


@pytest.mark.parametrize("room", [0.02, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("name", ["save_full", "save_delta", "merge", "merge in place", "trim"])
def test_a_full_disk_leaves_everything_as_it_was(tmp_path: Path, name: str, room: float) -> None:
    _, model = trained_pair(tmp_path)
    lv.save_delta(model, tmp_path / "delta")
    written = "delta" if name == "save_delta" else "base"  # as large as what the operation writes
    size = sum(len(each) for each in content(tmp_path / written).values())
    held = sum(
        -(-len(each) // 4096) * 4096 for folder in ("base", "delta") for each in content(tmp_path / folder).values()
    )
    with small_disk(tmp_path / "disk", held + 64 * 4096 + int(size * room)) as disk:
        for folder in ("base", "delta"):
            shutil.copytree(tmp_path / folder, disk / folder)
        filler = disk / "filler"
        fill(filler, int(size * room))
        before = content(disk)
        operation, target = operations(model, disk)[name]
        with pytest.raises(Exception, match=r"[Nn]o space left|os error 28|GB are free there") as caught:
            operation()
        assert isinstance(caught.value, OSError) or name == "trim" or "os error 28" in str(caught.value)
        assert content(disk) == before
        assert not list(disk.glob(".*"))
        filler.unlink()
        with small_disk_has_room(disk, 2 * size):
            operation()  # the next run works once there is room
        assert (disk / target).is_dir()


def fill(path: Path, room: int) -> None:
    """Fills a disk but for `room` bytes."""
    found = os.statvfs(path.parent)
    path.write_bytes(b"\1" * max(0, found.f_bavail * found.f_frsize - room))


@contextlib.contextmanager
def small_disk_has_room(disk: Path, num_bytes: int) -> Iterator[None]:
    found = os.statvfs(disk)
    size = found.f_blocks * found.f_frsize + num_bytes
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)
    yield


@pytest.mark.parametrize("name", ["save_full", "save_delta", "merge", "merge in place", "trim"])
def test_a_disk_that_is_read_only_is_an_error_and_leaves_everything_as_it_was(tmp_path: Path, name: str) -> None:
    _, model = trained_pair(tmp_path)
    lv.save_delta(model, tmp_path / "delta")
    with small_disk(tmp_path / "disk", 8 << 20) as disk:
        for folder in ("base", "delta"):
            shutil.copytree(tmp_path / folder, disk / folder)
        before = content(disk)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        operation, _ = operations(model, disk)[name]
        with pytest.raises((OSError, CheckpointError), match=os.strerror(errno.EROFS)):
            operation()
        assert content(disk) == before


READ_ONLY = """
import os, sys
from pathlib import Path
from leanvocab.checkpoints.merge import merge_checkpoint
if os.getuid() == 0:
    os.setgid(65534); os.setuid(65534)  # root may write anywhere
folder = Path(sys.argv[1])
try:
    merge_checkpoint(base=folder / "single", delta=folder / "delta", output=folder / "out")
except PermissionError as error:
    print("refused", error)
"""


def test_a_folder_without_permission_is_an_error_and_leaves_everything_as_it_was(tmp_path: Path) -> None:
    tiny_folders(tmp_path / "in")
    before = content(tmp_path / "in")
    # All of pytest's folders above, which are its user's alone and one more where several processes test: or else the refusal
    # that is seen is theirs.
    for folder in [tmp_path, *tmp_path.parents]:
        if folder.stat().st_uid == os.getuid():
            folder.chmod(folder.stat().st_mode | 0o555)
    for path in (tmp_path / "in").rglob("*.safetensors"):
        path.chmod(0o644)
    (tmp_path / "in").chmod(0o555)
    done = subprocess.run(
        [sys.executable, "-c", READ_ONLY, str(tmp_path / "in")], capture_output=True, text=True, check=False
    )
    (tmp_path / "in").chmod(0o755)
    assert content(tmp_path / "in") == before
    refused = f"refused [Errno 13] Permission denied: '{tmp_path / 'in' / '.out.leanvocab-'}"
    assert done.stdout.startswith(refused), done.stdout + done.stderr


@pytest.mark.parametrize("base", ["single", "sharded"])
@pytest.mark.parametrize("spoiled", ["base", "delta"])
def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path: Path, base: str, spoiled: str) -> None:
    tiny_folders(tmp_path)
    path = max(
        (tmp_path / (base if spoiled == "base" else "delta")).glob("*.safetensors"),
        key=lambda each: each.stat().st_size,
    )
    whole = path.read_bytes()
    lengths = range(0, len(whole), max(1, len(whole) // 40))
    for length in lengths:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=path.name):
            merge_checkpoint(base=tmp_path / base, delta=tmp_path / "delta", output=tmp_path / "out")
        assert not (tmp_path / "out").exists()
    print(f"{len(lengths)} lengths of {path.name}")
    path.write_bytes(whole)
    merge_checkpoint(base=tmp_path / base, delta=tmp_path / "delta", output=tmp_path / "out", verify=True)


MERGE = """
import sys
from leanvocab.checkpoints.merge import merge_checkpoint
result = merge_checkpoint(base=sys.argv[1], delta=sys.argv[2], output=sys.argv[3])
print("already there" if result.already_there else "written")
"""


def test_two_merges_into_one_output_at_once_give_it_once_and_whole(tmp_path: Path) -> None:
    full = delta_of_base(tmp_path)
    paths = [str(tmp_path / name) for name in ("base", "delta", "out")]
    for _ in range(3):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        with ThreadPoolExecutor(3) as pool:
            runs = list(pool.map(lambda _: run(paths), range(3)))
        assert all(each.returncode == 0 for each in runs), [each.stderr for each in runs]
        said = sorted(each.stdout.strip() for each in runs)
        assert said == ["already there", "already there", "written"]
        assert differing(type(full).from_pretrained(tmp_path / "out"), full) == []
        assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "delta", "out"]


def run(paths: list[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", MERGE, *paths], capture_output=True, text=True, check=False)


def test_of_two_different_merges_into_one_output_one_wins_and_the_other_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_folders(tmp_path)
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / "model.safetensors").write_bytes(b"another's")
    from leanvocab.checkpoints import merge

    original = merge.copy_side_files

    def someone_else_is_faster(*args: Any) -> None:
        original(*args)
        (tmp_path / "early").rename(tmp_path / "out")

    monkeypatch.setattr(merge, "copy_side_files", someone_else_is_faster)
    with pytest.raises(CheckpointError, match="is there already, and is not this merge's result"):
        merge_checkpoint(base=tmp_path / "single", delta=tmp_path / "delta", output=tmp_path / "out")
    assert content(tmp_path / "out") == {"model.safetensors": b"another's"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["delta", "out", "sharded", "single"]
