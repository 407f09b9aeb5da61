"""Files of a checkpoint that hold no weights (tokenizer, config, code, notes), on their way into another folder. No torch."""

import os
import shutil
from pathlib import Path

from leanvocab.errors import CheckpointError
from leanvocab.files.headers import is_weights_file
from leanvocab.files.presence import is_file, is_folder
from leanvocab.files.untrusted_files import resolve_in


def find_side_files(base: Path) -> list[Path]:
    """Everything in a folder that holds no weights, checked before anything is written; raises `CheckpointError`."""
    side_files = []
    for directory, folders, files in os.walk(base):
        here = Path(directory).relative_to(base)
        folders.sort()
        links = {name for name in folders if os.path.islink(os.path.join(directory, name))}
        for name in sorted({*files, *links}):
            relative = here / name
            if here == Path() and is_weights_file(name):
                continue
            real = resolve_in(base, str(relative))
            if not is_file(real) and not is_folder(real):
                raise CheckpointError(f"{base / relative}: expected a regular file or a folder, found something else")
            side_files.append(relative)
        side_files += [here / name for name in folders if name not in links]
    return side_files


def copy_side_files(base: Path, folder: Path, side_files: list[Path]) -> None:
    """Copies side files of `base` into `folder`; links within the base stay links."""
    for relative in side_files:
        source, copy = base / relative, folder / relative
        copy.parent.mkdir(parents=True, exist_ok=True)
        real = Path(os.path.realpath(source))
        if source.is_symlink() and real.is_relative_to(base) and not is_weights_file(real.name):
            copy.symlink_to(os.path.relpath(real, Path(os.path.realpath(source.parent))))
        elif is_folder(real):
            copy.mkdir(exist_ok=True)
        else:
            shutil.copy2(real, copy)
