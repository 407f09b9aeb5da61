"""Asks what lies at a path: nothing, a file or a folder. On every Python, what may not be looked at is an error, and not nothing.

From Python 3.14 on, `Path.exists` and its kin say False where permission is missing, as those of `os.path` always did.
"""

import errno
import os
import stat

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


def _mode(path: str | os.PathLike[str], follow: bool = True) -> int | None:
    try:
        return os.stat(path, follow_symlinks=follow).st_mode
    except ValueError:  # a null byte in it
        return None
    except OSError as error:
        if error.errno in _NOT_THERE:
            return None
        raise
