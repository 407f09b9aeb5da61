"""Files of a base that hold no weights (tokenizer, code, notes), and the config, on their way into a merged folder. No torch."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from leanvocab.checkpoints.delta_format import CONFIG, MODEL_CONFIG
from leanvocab.errors import CheckpointError
from leanvocab.files.headers import is_weights_file
from leanvocab.files.safe_opening import resolve_in
from leanvocab.files.strict_json import read_json

_CODE_KEYS = ("auto_map", "custom_pipelines")  # names of code that a loader may be asked to run
_SAID_BY_THE_FILES = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")


def find_side_files(base: Path) -> list[Path]:
    """Everything in the base's folder that holds no weights, checked before anything is written; raises `CheckpointError`."""
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
            if not real.is_file() and not real.is_dir():
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
        elif real.is_dir():
            copy.mkdir(exist_ok=True)
        else:
            shutil.copy2(real, copy)


def merged_config(base: Path, delta: Path) -> bytes | None:
    """The model's config, where it says something else than the base's; None where the base's stays."""
    if not os.path.lexists(delta / MODEL_CONFIG):
        return None
    _, wanted = read_json(delta, MODEL_CONFIG)
    has_own = os.path.lexists(base / CONFIG)
    own = read_json(base, CONFIG)[1] if has_own else {}
    code_of_base = list(_code_in(own))
    for key, value in _code_in(wanted):
        if (key, value) not in code_of_base:
            raise CheckpointError(
                f"{delta / MODEL_CONFIG}: expected no code of its own, found {key} {value!r:.80}, which the base does not have"
            )
    if has_own and _without_notes(wanted) == _without_notes(own):
        return None
    wanted |= {key: own[key] for key in ("dtype", "torch_dtype") if key in own}  # the tensors' dtypes are the base's
    return (json.dumps(wanted, indent=2, sort_keys=True) + "\n").encode()


def _code_in(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, part in value.items():
            if key in _CODE_KEYS:
                yield key, part
            yield from _code_in(part)
    elif isinstance(value, list):
        for part in value:
            yield from _code_in(part)


def _without_notes(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _SAID_BY_THE_FILES}
