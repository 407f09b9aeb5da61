"""Asks what lies at a path: nothing, a file or a folder. On every Python, what may not be looked at is an error, and not nothing.

From Python 3.14 on, `Path.exists` and its kin say False where permission is missing, as those of `os.path` always did.
"""

import errno
import os
import stat
from pathlib import Path

from leanvocab.errors import CheckpointError

_NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.EBADF, errno.ELOOP, errno.ENAMETOOLONG}


def is_there(path: str | os.PathLike[str]) -> bool:
    """True where something lies at a path. Raises `OSError` where that cannot be told, as do the others."""
    return _mode(path) is not None


def is_entry(path: str | os.PathLike[str]) -> bool:
    """True where a path names something, be it a link that leads nowhere."""
    return _mode(path, follow=False) is not None


def is_file(path: str | os.PathLike[str]) -> bool:
    """True where a file lies at a path."""
    return stat.S_ISREG(_mode(path) or 0)


def is_folder(path: str | os.PathLike[str]) -> bool:
    """True where a folder lies at a path."""
    return stat.S_ISDIR(_mode(path) or 0)


def check_new_file(path: Path | None, overwrite: bool, to_overwrite: str = "give --overwrite") -> None:
    """Checks, before long work, that a file to write is not there yet, and its folder is; `to_overwrite` says how it may be.

    Raises:
        CheckpointError: it is there and not to be overwritten, or cannot be written.
    """
    if path is None:
        return
    if not is_folder(path.parent):
        raise CheckpointError(f"cannot write {path}: there is no folder {path.parent}")
    if is_folder(path):
        raise CheckpointError(f"cannot write {path}: it is a folder")
    if is_there(path) and not overwrite:
        raise CheckpointError(f"{path} is there already; {to_overwrite}, or name another")


def _mode(path: str | os.PathLike[str], follow: bool = True) -> int | None:
    try:
        return os.stat(path, follow_symlinks=follow).st_mode
    except ValueError:  # a null byte in it
        return None
    except OSError as error:
        if error.errno in _NOT_THERE:
            return None
        raise
