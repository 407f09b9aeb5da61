"""Folders written whole or not at all: into a sibling folder first, then a swap; and what killed writers left is cleared."""

import contextlib
import ctypes
import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from leanvocab.errors import CheckpointError
from leanvocab.files.copying import sync
from leanvocab.files.headers import SAVED_WEIGHTS
from leanvocab.files.presence import is_file, is_folder, is_there

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_REPLACED = "-replaced"


@contextlib.contextmanager
def written_whole(
    directory: str | os.PathLike[str], *, keeps: Callable[[str], bool] | None = None, replace: bool = True
) -> Iterator[tuple[Path, Path]]:
    """(a fresh folder to write to, the folder that it becomes) — whole, when the block ends without an error, or not at all.

    Other files that lie there stay, those at the top that `keeps` says: by default all that hold no weights. Without
    `replace` the path has to be free, or an empty folder, when the block ends: otherwise `FileExistsError`.

    Raises `CheckpointError` where the path is a file, `OSError` where it cannot be written; then nothing has changed.
    """
    target = Path(os.path.realpath(directory))
    if is_there(target) and not is_folder(target):
        raise CheckpointError(f"{target} is a file, expected a folder, or a path that is free")
    with sibling(target) as folder:
        yield folder, target
        if is_folder(target) and replace:
            _keep_other_files(target, folder, keeps or (lambda name: not SAVED_WEIGHTS.fullmatch(name)))
        sync_tree(folder)
        (swap if replace else put)(folder, target)


@contextlib.contextmanager
def sibling(target: Path) -> Iterator[Path]:
    """A fresh folder beside `target`, removed in any case; what crashed writers left behind is removed too."""
    target.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(target)
    prefix = _prefix(target)
    folder = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=target.parent))
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # which the kernel lets go however the process ends
        folder.chmod((target if is_folder(target) else target.parent).stat().st_mode & 0o777)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def check_apart(output: Path, **others: Path) -> None:
    """Raises `CheckpointError` where a folder to write and one that is read, given by its role, lie in one another."""
    for role, folder in others.items():
        if output == folder or folder in output.parents or output in folder.parents:
            raise CheckpointError(f"output {output} and the {role} {folder} lie in one another; name another output")


def _prefix(target: Path) -> str:
    return f".{target.name}.leanvocab-"


def clear_leftovers(target: Path) -> None:
    """Removes what writers of `target` left behind that were killed.

    Where folders cannot be exchanged in one step, a kill between two renames leaves `target` aside: it is put back first.
    """
    prefix = _prefix(target)
    leftovers = [path for path in target.parent.glob(f"{glob.escape(prefix)}*") if not _in_use(path, prefix)]
    for path in leftovers:
        if path.name.endswith(_REPLACED) and not is_there(target):
            os.rename(path, target)
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)


def _in_use(leftover: Path, prefix: str) -> bool:
    """True while the writer of a folder lives: it holds a lock (in whatever container), or its process is there."""
    return _is_locked(leftover) or _is_alive(leftover.name[len(prefix) :].split("-")[0])


def _is_locked(folder: Path) -> bool:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EWOULDBLOCK, errno.EACCES)
    finally:
        os.close(descriptor)
    return False


def _is_alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def _keep_other_files(target: Path, folder: Path, keeps: Callable[[str], bool]) -> None:
    for path in target.rglob("*"):
        kept = folder / path.relative_to(target)
        if is_there(kept) or kept.is_symlink() or (path.parent == target and not keeps(path.name)):
            continue
        if path.is_symlink():
            kept.symlink_to(os.readlink(path))
        elif is_folder(path):
            kept.mkdir(parents=True)
        else:
            kept.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, kept)
            except OSError:  # a file system without links
                shutil.copy2(path, kept)


def sync_tree(folder: Path) -> None:
    """Waits until a folder and all files and folders in it are on the disk."""
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink() and (is_folder(path) or is_file(path)):
            sync(path)


def put(folder: Path, target: Path) -> None:
    """Puts `folder` in the place of `target`, which has to be free or an empty folder: two writers cannot both succeed."""
    try:
        os.rename(folder, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise FileExistsError(errno.EEXIST, "something was put there in the meantime", str(target)) from error
        raise
    sync(target.parent)


def swap(folder: Path, target: Path) -> None:
    """Puts `folder` in the place of `target` in one step; what was there is then in `folder`'s place."""
    if not is_there(target):
        os.rename(folder, target)
    elif not exchange(folder, target):
        aside = folder.with_name(folder.name + _REPLACED)
        os.rename(target, aside)
        try:
            os.rename(folder, target)
        except OSError:
            os.rename(aside, target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    sync(target.parent)


def exchange(first: Path, second: Path) -> bool:
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
