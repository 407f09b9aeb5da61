"""What lies in a folder or on the hub: a checkpoint's class, tensors and ties, and which rows were trained.

Read from the config and the headers of the safetensors files; no weights are loaded, but for the input tables when two
checkpoints are compared, block by block.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvocab.errors import CheckpointError
from leanvocab.headers import DTYPE_BITS, read_weights

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
    """What a checkpoint is. `ties` are groups of the model's names for one matrix."""

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

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self) | {
            "dtypes": dict(self.dtypes),
            "input_table": self.input_table.name,
            "vocabulary_tensors": [
                {"name": each.name, "shape": list(each.shape), "dtype": each.dtype, "num_bytes": each.num_bytes}
                for each in self.vocabulary_tensors
            ],
        }


def inspect_checkpoint(name: str | Path) -> CheckpointInfo:
    """Describes the checkpoint in a folder, or of a name on the hub.

    Raises:
        CheckpointError: there is none, it has no safetensors files, or its input table is not to be found.
    """
    from transformers import AutoConfig

    folder = Path(name)
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        where = "holds no model" if folder.is_dir() else "is no folder here, and the hub gave no model of that name"
        raise CheckpointError(f"{str(name)!r} {where}: {_first_line(error)}") from error
    tensors = read_tensors(folder) if folder.is_dir() else _headers_on_hub(str(name))
    model_class, names = _tables_of_class(config)
    table = next((each for each in tensors.values() if names and _same_tensor(each.name, names[0][0])), None)
    if table is None:
        raise CheckpointError(
            f"{str(name)!r}: none of its {len(tensors)} tensors is the input table of {model_class} "
            f"({names[0][0] if names else 'which names none'})"
        )
    dtypes: dict[str, int] = {}
    for each in tensors.values():
        dtypes[each.dtype] = dtypes.get(each.dtype, 0) + each.num_values
    return CheckpointInfo(
        name=str(name),
        model_class=model_class,
        model_type=config.model_type,
        num_parameters=sum(each.num_values for each in tensors.values()),
        num_bytes=sum(each.num_bytes for each in tensors.values()),
        dtypes=dtypes,
        full_size=table.shape[0],
        input_table=table,
        vocabulary_tensors=tuple(each for each in tensors.values() if table.shape[0] in each.shape),
        ties=tuple(group for group in names if len(group) > 1),
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
            rows, base_rows = (each[start : start + _BLOCK_ROWS] for each in slices)
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
        raise CheckpointError(f"the hub gave no safetensors headers of {name!r}: {_first_line(error)}") from error
    return {
        tensor: TensorInfo(tensor, tuple(entry.shape), entry.dtype)
        for file in metadata.files_metadata.values()
        for tensor, entry in file.tensors.items()
    }


def _tables_of_class(config: Any) -> tuple[str, list[tuple[str, ...]]]:
    """The model's class, and its names for the input table (first) and for every other tied matrix."""
    import torch
    import transformers

    for class_name in config.architectures or ():
        if hasattr(transformers, class_name):
            break
    else:
        return ", ".join(config.architectures or ()) or "unknown", []
    with torch.device("meta"):
        model = getattr(transformers, class_name)(config)
    groups: dict[int, list[str]] = {}
    for parameter_name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(parameter_name)
    try:
        first = id(model.get_input_embeddings().weight)
    except (AttributeError, NotImplementedError):
        return class_name, []
    table = groups.pop(first)
    return class_name, [tuple(table), *(tuple(group) for group in groups.values() if len(group) > 1)]


def _same_tensor(in_file: str, in_model: str) -> bool:
    """A base model's checkpoint leaves out the prefix that a model with a head has, or the other way round."""
    return in_file == in_model or in_file.endswith("." + in_model) or in_model.endswith("." + in_file)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
