"""Descriptions of a checkpoint in a folder or on the hub (class, vocabulary-sized tensors, trained rows), and of a delta.

Read from the config and the headers of the safetensors files; no weights are loaded, but for the input tables when two
checkpoints are compared, block by block.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvocab.checkpoints.delta_format import OPTIMIZER, read_delta, read_training_note
from leanvocab.errors import CheckpointError, first_line
from leanvocab.files.headers import DTYPE_BITS, read_weights
from leanvocab.files.presence import is_file, is_folder
from leanvocab.reports.inventory import Inventory, VocabularyTensor, take_inventory

_BLOCK_ROWS = 8192


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its file's header describes it; `file` is None on the hub."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path | None = None

    @property
    def num_values(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_values * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class CheckpointInfo:
    """Description of a checkpoint. `ties` are groups of the model's names for one matrix; `inventory` is what the model makes
    of it, with sizes as the files have them; `training` is what is said of another objective that it was trained for."""

    name: str
    model_class: str
    model_type: str
    num_parameters: int
    num_bytes: int
    dtypes: Mapping[str, int]
    full_size: int
    input_table: TensorInfo
    vocabulary_tensors: tuple[TensorInfo, ...]
    ties: tuple[tuple[str, ...], ...]
    inventory: Inventory
    training: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self) | {
            "dtypes": dict(self.dtypes),
            "inventory": self.inventory.to_dict(),
            "input_table": self.input_table.name,
            "vocabulary_tensors": [
                {"name": tensor.name, "shape": list(tensor.shape), "dtype": tensor.dtype, "num_bytes": tensor.num_bytes}
                for tensor in self.vocabulary_tensors
            ],
        }


def inspect_checkpoint(name: str | Path) -> CheckpointInfo:
    """Describes the checkpoint in a folder, or of a name on the hub.

    Raises:
        CheckpointError: there is none, it has no safetensors files, or its input table is not to be found.
    """
    folder = Path(name)
    config = _read_config(name)
    tensors = read_tensors(folder) if is_folder(folder) else _headers_on_hub(str(name))
    model_class, model = _empty_model(config)
    names = _tables_of(model)
    table = next((tensor for tensor in tensors.values() if names and _same_tensor(tensor.name, names[0][0])), None)
    if table is None:
        raise CheckpointError(
            f"{str(name)!r}: none of its {len(tensors)} tensors is the input table of {model_class} "
            f"({names[0][0] if names else 'which names none'})"
        )
    dtypes: Counter[str] = Counter()
    for tensor in tensors.values():
        dtypes[tensor.dtype] += tensor.num_values
    return CheckpointInfo(
        name=str(name),
        model_class=model_class,
        model_type=config.model_type,
        num_parameters=sum(dtypes.values()),
        num_bytes=_num_bytes(tensors),
        dtypes=dict(dtypes),
        full_size=table.shape[0],
        input_table=table,
        vocabulary_tensors=tuple(tensor for tensor in tensors.values() if table.shape[0] in tensor.shape),
        ties=tuple(group for group in names if len(group) > 1),
        inventory=_as_in_files(take_inventory(model), tensors),
        training=read_training_note(folder) if is_folder(folder) else None,
    )


def _read_config(name: str | Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name)
    except Exception as error:  # what lies in its files: readers raise whatever they meet
        where = "holds no model" if is_folder(name) else "is no folder here, and the hub gave no model of that name"
        raise CheckpointError(f"{str(name)!r} {where}: {first_line(error)}") from error


def _num_bytes(tensors: Mapping[str, TensorInfo]) -> int:
    return sum(tensor.num_bytes for tensor in tensors.values())


def _as_in_files(inventory: Inventory, tensors: Mapping[str, TensorInfo]) -> Inventory:
    """The inventory with dtypes and bytes of the files, for what is in them."""

    def in_files(tensor: VocabularyTensor) -> VocabularyTensor:
        for entry in tensors.values():
            if entry.shape == tensor.shape and any(_same_tensor(entry.name, name) for name in tensor.names):
                return replace(tensor, dtype=entry.dtype, num_bytes=entry.num_bytes)
        return tensor

    return replace(inventory, tensors=tuple(map(in_files, inventory.tensors)), num_bytes=_num_bytes(tensors))


@dataclass(frozen=True)
class DeltaInfo:
    """Description of a delta: the base that it belongs to, how it was trained, and what it holds."""

    name: str
    base: str
    revision: str | None
    output: str
    decay_unused_rows: bool
    tables: Mapping[str, tuple[int, int, str]]  # name → rows held, of how many, digest of the vocabulary
    tensors: tuple[str, ...]  # the others that it holds
    new: tuple[str, ...]  # of these, those that the base does not have
    absent: tuple[str, ...]  # tensors of the base that the model does not have
    num_bytes: int
    base_bytes: int
    has_optimizer: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        tables = {
            name: {"kept_rows": kept, "full_rows": full, "digest": digest}
            for name, (kept, full, digest) in self.tables.items()
        }
        return asdict(self) | {"tables": tables}


def inspect_delta(folder: Path) -> DeltaInfo:
    """Describes the delta in a folder, each of its files checked against the other; raises `CheckpointError`."""
    delta, file = read_delta(folder)
    base = delta.base_tensors.items()
    return DeltaInfo(
        name=str(folder),
        base=delta.base_name,
        revision=delta.base_revision,
        output=delta.output,
        decay_unused_rows=delta.decay_unused_rows,
        tables={
            name: (len(table.vocabulary), table.vocabulary.full_size, table.vocabulary.digest)
            for name, table in delta.tables.items()
        },
        tensors=tuple(name for name in delta.tensors if name not in delta.tables),
        new=tuple(name for name, tensor in delta.tensors.items() if not tensor.replaces),
        absent=delta.absent,
        num_bytes=sum(entry.num_bytes for entry in file.tensors.values()),
        base_bytes=sum(TensorInfo(name, entry.shape, entry.dtype).num_bytes for name, entry in base),
        has_optimizer=is_file(folder / OPTIMIZER),
    )


def trained_rows(tuned: CheckpointInfo, base: CheckpointInfo) -> NDArray[np.int64]:
    """Token ids whose row in the input table differs, in any bit, from the base's; sorted.

    Raises:
        CheckpointError: the tables have different shapes, or one of them is not on this machine.
    """
    import torch
    from safetensors import safe_open

    tables = (tuned.input_table, base.input_table)
    if tables[0].shape != tables[1].shape:
        raise CheckpointError(
            f"the input tables cannot be compared: {tuned.name} has {tables[0].shape}, {base.name} {tables[1].shape}"
        )
    for info in (tuned, base):
        if info.input_table.file is None:
            raise CheckpointError(
                f"{info.name} is not on this machine: comparing rows needs its files, not only headers"
            )
    changed = []
    with safe_open(tables[0].file, "pt") as first, safe_open(tables[1].file, "pt") as second:
        slices = first.get_slice(tables[0].name), second.get_slice(tables[1].name)
        for start in range(0, tuned.full_size, _BLOCK_ROWS):
            rows, base_rows = (table[start : start + _BLOCK_ROWS] for table in slices)
            differs = (rows != base_rows.to(rows.dtype)).any(dim=1)
            changed.append(torch.nonzero(differs).flatten().numpy() + start)
    return np.concatenate(changed).astype(np.int64, copy=False)


def read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """The tensors of a folder's safetensors files, by name.

    Raises:
        CheckpointError: there are none, or they cannot be trusted.
    """
    entries = read_weights(folder).tensors.items()
    return {name: TensorInfo(name, entry.shape, entry.dtype, file.path) for name, (file, entry) in entries}


def _headers_on_hub(name: str) -> dict[str, TensorInfo]:
    """Headers of a checkpoint that is in the local cache, or else read from the hub without its weights."""
    import huggingface_hub

    try:
        return read_tensors(Path(huggingface_hub.snapshot_download(name, local_files_only=True)))
    except (OSError, CheckpointError):  # not in the cache, or without its weights
        pass
    try:
        metadata = huggingface_hub.get_safetensors_metadata(name)
    except Exception as error:  # the hub's errors have no common base
        raise CheckpointError(f"the hub gave no safetensors headers of {name!r}: {first_line(error)}") from error
    return {
        tensor: TensorInfo(tensor, tuple(entry.shape), entry.dtype)
        for file in metadata.files_metadata.values()
        for tensor, entry in file.tensors.items()
    }


def _empty_model(config: Any) -> tuple[str, Any]:
    """The model's class, and one of it without memory; None where transformers has none."""
    import torch
    import transformers

    for class_name in config.architectures or ():
        if hasattr(transformers, class_name):
            with torch.device("meta"):
                model = getattr(transformers, class_name)(config)
            model.tie_weights()  # transformers 5.0 leaves what has no memory untied
            return class_name, model
    return ", ".join(config.architectures or ()) or "unknown", None


def _tables_of(model: Any) -> list[tuple[str, ...]]:
    """A model's names for the input table (first) and for every other tied matrix."""
    try:
        first = id(model.get_input_embeddings().weight)
    except (AttributeError, NotImplementedError):
        return []
    groups: dict[int, list[str]] = {}
    for parameter_name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(parameter_name)
    table = groups.pop(first)
    return [tuple(table), *(tuple(group) for group in groups.values() if len(group) > 1)]


def _same_tensor(in_file: str, in_model: str) -> bool:
    """A base model's checkpoint leaves out the prefix that a model with a head has, or the other way round."""
    return in_file == in_model or in_file.endswith("." + in_model) or in_model.endswith("." + in_file)
