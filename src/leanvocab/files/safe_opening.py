"""Files of a folder, opened by names that nobody vouches for: none leads out of the folder, none is a pipe or a device."""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from leanvocab.errors import CheckpointError, shortened


def resolve_in(folder: Path, name: str) -> Path:
    """The path where the file `name` of `folder` really lies; raises `CheckpointError` where that is outside the folder.

    A link may lead to another file of the folder, and in a hub cache to its `blobs`, which is where its files are.
    """
    parts = Path(name).parts
    if not name or "\0" in name or "\\" in name or Path(name).is_absolute() or ".." in parts or name != "/".join(parts):
        raise CheckpointError(f"{folder}: expected the name of a file in this folder, found {shortened(name)}")
    root = Path(os.path.realpath(folder))
    real = Path(os.path.realpath(root / name))
    in_hub_cache = root.parent.name == "snapshots" and real.parent == root.parent.parent / "blobs"
    if not real.is_relative_to(root) and not in_hub_cache:
        raise CheckpointError(
            f"{folder / name}: a link that leads out of the folder, to {real}; put the file itself there"
        )
    return real


@contextlib.contextmanager
def opened(folder: Path, name: str) -> Iterator[int]:
    """A descriptor of the regular file `name` of `folder`, for reading; raises `CheckpointError`."""
    real = resolve_in(folder, name)
    try:
        # Without waiting, since a pipe in the place of a file would wait for ever; what `real` names is no link by now.
        descriptor = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise CheckpointError(f"{folder / name}: cannot be opened ({error.strerror})") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise CheckpointError(f"{folder / name}: expected a regular file, found something else")
        yield descriptor
    finally:
        os.close(descriptor)
