"""Folders that earlier runs left: whether one may be written to, and the checkpoint in it that a run goes on from."""

import hashlib
import json
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers import TrainerCallback

from leanvocab.errors import CheckpointError, SettingsError
from leanvocab.files.headers import read_header
from leanvocab.files.presence import is_file, is_folder, is_there
from leanvocab.finetune.settings import FineTuneSettings, SavingSettings

CHECKPOINTS_FOLDER = "checkpoints"
RESULT_FILE = "finetune.json"
_STATE_FILE = "trainer_state.json"  # the Trainer writes it last
_RUN_FILE = "run.json"
_ROWS_AT_ONCE = 10_000


@dataclass(frozen=True)
class EarlierRun:
    """What lies in an output directory: the last whole checkpoint, if a run is to go on, and halves of others."""

    checkpoint: Path | None = None
    halves: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

    def notes_after(self, num_steps: int) -> tuple[str, ...]:
        """What a user should know of it, once a run is at a step."""
        if self.checkpoint is None or _step(self.checkpoint) < num_steps:
            return self.notes
        return (*self.notes, f"The run had come to its end, step {num_steps:,}, before: nothing was trained.")


def find_earlier_run(output_dir: Path, model: Path, settings: SavingSettings) -> EarlierRun:
    """What there is to go on from. Nothing is written.

    Raises:
        CheckpointError: the folder is a file, or the pretrained model's; it holds something, and no setting says what is to
            become of it; or a run ended there and left no checkpoint.
    """
    if is_there(output_dir) and not is_folder(output_dir):
        raise CheckpointError(f"the output directory {output_dir} is a file")
    if is_folder(model) and is_there(output_dir) and output_dir.samefile(model):
        raise CheckpointError(f"the output directory {output_dir} is the folder of the pretrained model; name another")
    if settings.resume:
        return _to_go_on_from(output_dir)
    if not settings.overwrite and is_there(output_dir) and any(output_dir.iterdir()):
        raise CheckpointError(
            f"the output directory {output_dir} is not empty; name another, or set overwrite (or resume) if an earlier "
            "run left it"
        )
    return EarlierRun()


def _to_go_on_from(output_dir: Path) -> EarlierRun:
    folder = output_dir / CHECKPOINTS_FOLDER
    last = last_whole(folder)
    halves = tuple(path for path in _newest_first(folder) if last is None or _step(path) > _step(last))
    notes = tuple(f"{path} was cut off while it was written, and is left out." for path in halves)
    if last is not None:
        return EarlierRun(last, halves, notes)
    if is_there(output_dir / RESULT_FILE):
        raise CheckpointError(
            f"a run ended in {output_dir} and left no checkpoint to resume from; set overwrite to train anew"
        )
    others = [path.name for path in output_dir.iterdir() if path != folder] if is_folder(output_dir) else []
    if others:
        raise CheckpointError(f"there is no checkpoint in {folder} to resume from, and {output_dir} holds {others[0]}")
    return EarlierRun(None, halves, (*notes, f"There is no checkpoint in {folder} yet: the run began anew."))


def last_whole(folder: Path) -> Path | None:
    """The newest of the Trainer's checkpoints in a folder that was written to its end, if any."""
    return next(filter(is_whole, _newest_first(folder)), None)


def _newest_first(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=_step, reverse=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def is_whole(checkpoint: Path) -> bool:
    """True for a checkpoint of the Trainer's that was written to its end: the last file is there, and no file is cut off."""
    try:
        json.loads((checkpoint / _STATE_FILE).read_bytes())
        for path in checkpoint.iterdir():
            if path.suffix == ".safetensors":
                read_header(checkpoint, path.name)
            elif (
                path.suffix in (".pt", ".pth", ".bin")
                and path.name != "training_args.bin"
                and not zipfile.is_zipfile(path)
            ):
                return False
    except (OSError, ValueError):
        return False
    return True


class RemovesHalves(TrainerCallback):
    """Removes checkpoints that were cut off, as soon as another one is whole."""

    def __init__(self, halves: tuple[Path, ...]) -> None:
        self._halves = halves

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for path in self._halves:
            if _step(path) != state.global_step:
                shutil.rmtree(path, ignore_errors=True)
        self._halves = ()


# What may be another when a run goes on: where and how often it looks at itself, where it ends, and what changes no result.
_FREE = {"epochs", "max_steps", "cpu", "full_vocabulary", *(known.name for known in fields(SavingSettings))}


class RunRecord:
    """What a run is made of, to compare with one that goes on: its settings, and digests of its data."""

    def __init__(self, settings: FineTuneSettings, encoded: Mapping[str, Any]) -> None:
        self._settings, self._encoded = settings, encoded

    @cached_property
    def content(self) -> dict[str, Any]:
        """The record in plain values; the data are read for it."""
        names = [known.name for known in fields(self._settings) if known.name not in _FREE]
        chosen = {name: getattr(self._settings, name) for name in names}
        data = {name: digest_of(split) for name, split in self._encoded.items()}
        return {"settings": json.loads(json.dumps(chosen)), "data": data}

    def check(self, checkpoint: Path | None) -> None:
        """Raises `SettingsError` where a checkpoint is of a run with other settings or data, and names them."""
        if checkpoint is None or not is_file(path := checkpoint.parent / _RUN_FILE):
            return  # nothing to go on from, or of a version that wrote no record
        earlier, now = json.loads(path.read_bytes()), self.content
        settings, data = earlier["settings"], earlier["data"]
        changed = [
            f"{name} is {value!r} and was {settings[name]!r}"
            for name, value in now["settings"].items()
            if name in settings and settings[name] != value
        ]
        names = sorted({*data, *now["data"]})
        changed += [f"split {name!r} holds other data" for name in names if data.get(name) != now["data"].get(name)]
        if changed:
            raise SettingsError(
                f"{checkpoint} belongs to another run: {'; '.join(changed)}. To go on, give what that run was given; to train "
                "anew, set overwrite, or name another output directory"
            )

    def write(self, folder: Path) -> None:
        """Leaves the record beside the checkpoints, where there will be any."""
        if self._settings.save_strategy != "no":
            folder.mkdir(parents=True, exist_ok=True)
            (folder / _RUN_FILE).write_text(json.dumps(self.content, indent=2) + "\n")


def digest_of(split: Any) -> str:
    """SHA-256 over the names and values of a data set's columns, however they are cut into pieces."""
    digest, table = hashlib.sha256(), split.with_format("arrow")
    for name in sorted(split.column_names):
        digest.update(name.encode())
        for start in range(0, len(split), _ROWS_AT_ONCE):
            column = table[start : start + _ROWS_AT_ONCE].column(name)
            for array in _leaves(pa.concat_arrays(column.chunks)):
                digest.update(
                    array.to_numpy(zero_copy_only=False).tobytes()
                    if _is_numeric(array)
                    else repr(array.to_pylist()).encode()
                )
    return digest.hexdigest()


def _is_numeric(array: Any) -> bool:
    return bool((pa.types.is_integer(array.type) or pa.types.is_floating(array.type)) and not array.null_count)


def _leaves(array: Any) -> "list[Any]":
    """Lengths and values of lists, as deep as they go."""
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        return [array.value_lengths(), *_leaves(array.flatten())]
    return [array]
