"""Files of a checkpoint that hold no weights (tokenizer, config, code, notes), on their way into another folder. No torch."""

import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from leanvocab.errors import CheckpointError, shortened
from leanvocab.files.copying import read_exactly, sha256_of_range
from leanvocab.files.headers import is_weights_file
from leanvocab.files.presence import is_entry, is_file, is_folder
from leanvocab.files.untrusted_files import MAX_JSON_BYTES, opened, parse_json, resolve_in

# Weights in other forms, states of a run, and programs made of a model: none of them has the kept rows alone.
_OTHER_FORMS = re.compile(
    r".*\.(bin|pt|pth|ckpt|pkl|pickle|h5|msgpack|npz|npy|ot|onnx|onnx[._]data|gguf|ggml|tflite|pb|mlmodel|engine|safetensors)"
    r"|openvino_.*\.xml|.*\.(bin|safetensors)\.index\.json"
)
_MODULES = "modules.json"  # of sentence-transformers: folders of parts with weights of their own


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


# --- beside weights that are no longer the base's ---------------------------------------------------------------------


@dataclass(frozen=True)
class SideFiles:
    """Files at the paths that they have in the base."""

    copied: tuple[str, ...]
    left_out: tuple[str, ...]


def sort_side_files(base: Path, weights: Collection[str], tokenizer: Collection[str]) -> SideFiles:
    """Which files of a base stay as they are. Raises `CheckpointError` where one is not what may be read.

    Args:
        weights: names of the files with the weights that are trimmed.
        tokenizer: names of files that are written anew, or left out, with the tokenizer.
    """
    modules = _folders_of_modules(base)
    copied, left_out = [], [name for name in sorted(os.listdir(base)) if is_weights_file(name) and name not in weights]
    for relative in find_side_files(base):
        name, top = str(relative), relative.parts[0]
        is_link_to_folder = (base / relative).is_symlink() and is_folder(base / relative)
        if name in tokenizer or (is_folder(base / relative) and not is_link_to_folder):
            continue
        is_of_module = top in modules and len(relative.parts) > 1
        in_other_form = _OTHER_FORMS.fullmatch(relative.name) is not None and not is_of_module
        if top.startswith(".") or is_link_to_folder or in_other_form:
            left_out.append(name)
        else:
            copied.append(name)
    return SideFiles(tuple(copied), tuple(left_out))


def _folders_of_modules(base: Path) -> set[str]:
    if not is_entry(base / _MODULES):
        return set()
    with opened(base, _MODULES) as descriptor:
        raw = read_exactly(descriptor, 0, min(os.fstat(descriptor).st_size, MAX_JSON_BYTES))
    try:
        modules = parse_json(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{base / _MODULES}: expected JSON, found something else: {shortened(str(error))}"
        ) from error
    listed = [module.get("path") for module in modules if isinstance(module, dict)] if isinstance(modules, list) else []
    return {path.split("/")[0] for path in listed if isinstance(path, str) and path}


def digests_of(base: Path, names: Iterable[str]) -> dict[str, str]:
    """Name → sha256 of files in a folder; raises `CheckpointError` where one cannot be read."""
    digests = {}
    for name in names:
        with opened(base, name) as descriptor:
            digests[name] = sha256_of_range(descriptor, 0, os.fstat(descriptor).st_size)
    return digests


def copy_files(base: Path, folder: Path, names: Iterable[str]) -> None:
    """Copies files of a folder, the content of those that are links."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(resolve_in(base, name), folder / name)


def write_files(base: Path, folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes files anew, with the mode of the base's file of that name where it has one."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
        if is_file(base / name):
            shutil.copymode(base / name, folder / name)
