"""Optimizer states beside a delta: partial, in safetensors and JSON alone, and full again for resuming anywhere."""

import json
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from leanvocab.checkpoints.delta_format import OPTIMIZER, OPTIMIZER_TENSORS, Description
from leanvocab.errors import CheckpointError, OptimizerError
from leanvocab.files.headers import SafetensorsFile, read_header
from leanvocab.files.row_store import put_rows, zero_pages
from leanvocab.files.tensor_files import read_tensor
from leanvocab.files.untrusted_files import read_json
from leanvocab.partial.optimizers import has_rows, numbers, unwrapped_optimizer, values_at_rest
from leanvocab.partial.partial_table import PartialTable

_FORMAT = "leanvocab optimizer"
_NO_DELTA = (
    "{name} keeps a copy of each row ({key}), which a delta does not hold for rows outside the vocabulary; save full "
    'checkpoints (checkpoints="full"), or the delta without optimizer states'
)


def write_states(optimizer: Optimizer, folder: Path, tables: dict[int, tuple[str, PartialTable]]) -> None:
    """Writes the states of an optimizer as they are in memory: of kept rows alone. `tables` has the parameters by id.

    Raises `OptimizerError` for a state that is neither a tensor nor a plain value.
    """
    from safetensors.torch import save_file

    optimizer = unwrapped_optimizer(optimizer)
    tensors: dict[str, Tensor] = {}
    groups, states, number = [], {}, 0
    for group in optimizer.param_groups:
        own = {key: _encoded(key, value) for key, value in group.items() if key != "params"}
        groups.append(own | {"params": list(range(number, number + len(group["params"])))})
        for parameter in group["params"]:
            if parameter in optimizer.state:
                name, table = tables.get(id(parameter), (None, None))
                at_rest = {} if table is None else values_at_rest(optimizer, group, _NO_DELTA)
                state = optimizer.state[parameter]
                values = {key: _described(key, value, table, at_rest) for key, value in state.items()}
                states[str(number)] = {"table": name, "values": values}
                for key in (key for key in values if "tensor" in values[key]):
                    tensors[f"{number}.{key}"] = numbers(state[key].detach()).cpu().contiguous().clone()
            number += 1
    save_file(tensors, folder / OPTIMIZER_TENSORS, metadata={"format": "pt"})
    content = {"format": _FORMAT, "version": 1, "class": type(optimizer).__name__, "groups": groups, "states": states}
    (folder / OPTIMIZER).write_text(json.dumps(content), encoding="utf-8")


def _described(key: str, value: Any, table: PartialTable | None, at_rest: dict[str, float]) -> dict[str, Any]:
    """The JSON of one state: the value itself, or what the tensor of that name in the other file is."""
    if not isinstance(value, Tensor):
        return {"value": _encoded(key, value)}
    rows = table is not None and has_rows(key, value, table.num_rows)
    return {"tensor": True, "rows": rows, "at_rest": at_rest.get(key, 0.0)}


def check_states_can_be_saved(optimizer: Optimizer, tables: Container[int]) -> None:
    """Raises `OptimizerError` where `write_states` would; `tables` has the ids of the parameters of tables."""
    optimizer = unwrapped_optimizer(optimizer)
    for group in optimizer.param_groups:
        if any(id(parameter) in tables for parameter in group["params"]):
            values_at_rest(optimizer, group, _NO_DELTA)


def read_full_states(folder: Path, description: Description) -> dict[str, Any]:
    """The optimizer's ordinary `state_dict()`: states of all rows, at rest for those outside the vocabulary.

    Unused rows take no memory. Raises `CheckpointError`.
    """
    _, content = read_json(folder, OPTIMIZER)
    path = folder / OPTIMIZER
    if content.get("format") != _FORMAT or content.get("version") != 1:
        raise CheckpointError(f"{path}: expected {_FORMAT!r}, version 1, found {content.get('format')!r:.60}")
    file = read_header(folder, OPTIMIZER_TENSORS)
    try:
        groups = [{key: _decoded(value) for key, value in group.items()} for group in content["groups"]]
        states = {int(number): _full(file, number, state, description) for number, state in content["states"].items()}
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path}: expected groups and states of an optimizer, found something else: {error!r:.120}"
        ) from error
    return {"state": states, "param_groups": groups}


def _full(file: SafetensorsFile, number: str, state: dict[str, Any], description: Description) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, entry in state["values"].items():
        if "value" in entry:
            values[key] = _decoded(entry["value"])
            continue
        name = f"{number}.{key}"
        if name not in file.tensors:
            raise CheckpointError(f"{file.path}: expected the tensor {name!r}, found none")
        values[key] = read_tensor(file, name)
        if entry["rows"]:
            values[key] = _all_rows(file, name, values[key], state["table"], float(entry["at_rest"]), description)
    return values


def _all_rows(
    file: SafetensorsFile, name: str, rows: Tensor, table: str, at_rest: float, description: Description
) -> Tensor:
    vocabulary = description.tables[table].vocabulary
    if rows.ndim == 0 or rows.shape[0] != len(vocabulary):
        raise CheckpointError(
            f"{file.path}: {name!r}: expected {len(vocabulary):,} rows, found the shape {tuple(rows.shape)}"
        )
    full = zero_pages((vocabulary.full_size, *rows.shape[1:]), rows.dtype)
    if at_rest:
        full.fill_(at_rest)
    put_rows(full, torch.tensor(vocabulary.token_ids, device="cpu"), rows)
    return full


def _encoded(key: str, value: Any) -> Any:
    """A plain value as JSON; what JSON has no word for is an object of one key."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else {"float": str(value)}
    if isinstance(value, tuple | list):
        return {type(value).__name__: [_encoded(key, part) for part in value]}
    if isinstance(value, Tensor) and value.numel() == 1 and not isinstance(value, nn.Parameter):
        return {"tensor": value.item(), "dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
    raise OptimizerError(
        f"the optimizer's {key!r} is a {type(value).__name__}, which a delta does not hold (numbers, text, tensors)"
    )


def _decoded(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "float" in value:
        return float(value["float"])
    if "tuple" in value:
        return tuple(_decoded(part) for part in value["tuple"])
    if "list" in value:
        return [_decoded(part) for part in value["list"]]
    dtype = getattr(torch, value["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise TypeError(value["dtype"])
    return torch.full(value["shape"], value["tensor"], dtype=dtype, device="cpu")
