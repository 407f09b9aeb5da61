"""Writing folders so that no failure costs anyone a model: into a sibling folder first, then a swap.

Two cases make it unsafe to let transformers save over the folder that a model was loaded from: from one file to shards it
leaves a stale `model.safetensors` beside them, which wins on reload; from shards to one file it deletes the shards first,
so that a full disk leaves no weights. `save_full` does neither.
"""

import contextlib
import ctypes
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from leanvocab.errors import CheckpointError

# Files that hold weights, whole or in shards, and their indices: what a newly saved model makes stale.
_WEIGHTS = re.compile(r"(model|pytorch_model)([.-].*)?\.(safetensors|bin)(\.index\.json)?")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def save_full(model: nn.Module, directory: str | os.PathLike[str], **options: Any) -> Path:
    """Saves the model with its full vocabulary in `directory`, whole or not at all, and returns the folder.

    Other files that lie there (tokenizer, notes) stay; weights of an earlier save do not. Saving over the folder that the
    model came from is safe, whatever its sharding. `options` go to `save_pretrained` (`max_shard_size=`, …); a model without
    that method is written as `model.safetensors`.

    Raises `CheckpointError` where `directory` is no folder, `OSError` where it cannot be written; then nothing has changed.
    """
    target = Path(os.path.realpath(directory))
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file, expected a folder, or a path that is free")
    with _sibling(target) as folder:
        _write_model(model, folder, options)
        if target.is_dir():
            _keep_other_files(target, folder)
        _sync_tree(folder)
        _swap(folder, target)
    return target


def _write_model(model: nn.Module, folder: Path, options: dict[str, Any]) -> None:
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder, **options)
        return
    if options:
        raise CheckpointError(f"{type(model).__name__} has no save_pretrained to take the options {', '.join(options)}")
    from safetensors.torch import save_model

    save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})


@contextlib.contextmanager
def _sibling(target: Path) -> Iterator[Path]:
    """A fresh folder beside `target`, removed in any case; what crashed writers left behind is removed too."""
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.leanvocab-"
    for leftover in target.parent.glob(f"{prefix}*"):
        if not _in_use(leftover, prefix):
            shutil.rmtree(leftover, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=target.parent))
    folder.chmod((target if target.is_dir() else target.parent).stat().st_mode & 0o777)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _in_use(leftover: Path, prefix: str) -> bool:
    process = leftover.name[len(prefix) :].split("-")[0]
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def _keep_other_files(target: Path, folder: Path) -> None:
    for path in target.rglob("*"):
        kept = folder / path.relative_to(target)
        if kept.exists() or kept.is_symlink() or (path.parent == target and _WEIGHTS.fullmatch(path.name)):
            continue
        if path.is_symlink():
            kept.symlink_to(os.readlink(path))
        elif path.is_dir():
            kept.mkdir(parents=True)
        else:
            kept.parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(path, kept)


def _link_or_copy(path: Path, kept: Path) -> None:
    try:
        os.link(path, kept)
    except OSError:  # a file system without links
        shutil.copy2(path, kept)


def _sync_tree(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            continue
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(folder: Path, target: Path) -> None:
    """Puts `folder` in the place of `target` in one step; what was there is then in `folder`'s place."""
    if not target.exists():
        os.rename(folder, target)
    elif not _exchange(folder, target):
        aside = folder.with_name(folder.name + "-replaced")
        os.rename(target, aside)
        try:
            os.rename(folder, target)
        except OSError:
            os.rename(aside, target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    _sync(target.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Exchanges two paths atomically (Linux: renameat2); False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    done = rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), ctypes.c_uint(_RENAME_EXCHANGE))
    if done == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(first), None, str(second))
