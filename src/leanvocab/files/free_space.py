"""Room for what will be written: asked before long work, since a disk that is full at its end loses the work."""

import shutil
import tempfile
from pathlib import Path

from leanvocab.errors import CheckpointError
from leanvocab.files.presence import is_there


def check_free_space(folder: Path, num_bytes: int, what: str, advice: str) -> None:
    """Tries to write where a folder is or will be, and compares what it will hold with what is free.

    Raises:
        CheckpointError: it cannot be written there, or less than `num_bytes` are free.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if is_there(path))
    try:
        with tempfile.TemporaryFile(dir=existing):
            free = shutil.disk_usage(existing).free
    except OSError as error:
        raise CheckpointError(f"cannot write to {existing}: {error.strerror or error}; name another folder") from error
    if free < num_bytes:
        raise CheckpointError(
            f"{what} will take about {num_bytes / 1e9:,.1f} GB in {folder}, and {free / 1e9:,.1f} GB are free there; {advice}"
        )
