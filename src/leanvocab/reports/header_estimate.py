"""Bytes that training holds, from config.json and the headers of safetensors files: no torch, no transformers, no model.

What the class of the model makes is read from its constructor's text, and has to agree with the tensors in the files; the
sizes are theirs. Where either is not certain there is no answer, and the model is built without memory instead
(docs/decisions/estimates-from-headers.md).
"""

import ast
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leanvocab.errors import CheckpointError
from leanvocab.files.headers import TensorEntry, read_weights
from leanvocab.files.presence import is_folder
from leanvocab.files.untrusted_files import read_json
from leanvocab.reads.constructors import Leaf, Module, construct, input_embeddings, output_embeddings
from leanvocab.reads.transformers_text import UNKNOWN, ClassText, Config, Unsure
from leanvocab.reports.memory_estimate import (
    FP32_BYTES,
    MemoryEstimate,
    Parameter,
    TableRows,
    frozen_bytes,
    make_footprint,
    remap_bytes,
)

_FLOATS = ("F16", "BF16", "F32", "F64")
# Bytes of states: a multiple of the parameter's, and beside it.
_STATES = {"adamw": (2, FP32_BYTES), "sgd": (0, 0), "sgd_momentum": (1, 0)}
_VALUE_BYTES = {"fp32": 4, "mixed": 4, "bf16": 2}
_NOT_PLAIN = ("auto_map", "quantization_config")  # fields of a config with which more is loaded than its class makes


@dataclass(eq=False)
class _Tensor:
    """A parameter or saved buffer of the model: its names, the modules that hold it, and its entry in the files."""

    leaf: Leaf
    names: list[str] = field(default_factory=list)
    holders: dict[str, Module] = field(default_factory=dict)  # path → module
    shape: tuple[int, ...] = ()
    num_bytes: int = 0

    @property
    def embeddings(self) -> list[str]:
        """Paths of the embeddings that hold it."""
        return [path for path, holder in self.holders.items() if holder.kind == "nn.Embedding"]

    @property
    def num_values(self) -> int:
        return math.prod(self.shape)


def estimate_from_headers(
    folder: Path,
    kept: Any,
    *,
    auto_class: str,
    precision: str,
    optimizer: str = "adamw",
    output: str | None = None,
    frozen_rows: str = "device",
) -> MemoryEstimate:
    """What `estimate_memory` says without a step, to the byte, of the checkpoint in a folder; `kept` is a vocabulary or a number.

    Raises:
        Unsure: headers and text do not decide it, be it since something is wrong. `estimate_memory` says what.
    """
    if optimizer not in _STATES or precision not in _VALUE_BYTES:
        raise Unsure("only some optimizers and precisions are counted here")
    network, tensors = _read(folder, auto_class)
    rows, tables, layer = _tables(network, tensors, kept, output)
    value_bytes = _VALUE_BYTES[precision]
    factor, beside = _STATES[optimizer]
    saved_buffers = sum(tensor.num_bytes for tensor in tensors if tensor.leaf.is_buffer)

    def footprint(partial_rows: Mapping[_Tensor, int], **others: int) -> Any:
        parameters = [
            _parameter(tensor, partial_rows.get(tensor), value_bytes, tensor in tables)
            for tensor in tensors
            if not tensor.leaf.is_buffer
        ]
        states = {each: factor * each.num_bytes + beside for each in parameters}
        return make_footprint(parameters, states, precision == "mixed", 0, buffers_bytes=saved_buffers, **others)

    held_twice = [tensor for tensor, mode in tables.items() if mode == "frozen" and frozen_rows == "device"]
    computed_bytes = 2 if precision == "mixed" else value_bytes
    return MemoryEstimate(
        model=folder.name,
        optimizer=optimizer,
        precision=precision,
        output=None if layer is None else tables.get(layer) or "full",
        tables=tuple(TableRows([*tensor.embeddings, *tensor.holders][0], tensor.shape[0], rows) for tensor in tables),
        full=footprint({}),
        partial=footprint(
            dict.fromkeys(tables, rows),
            remap_bytes=sum(
                remap_bytes(t.shape[0], rows, len(t.embeddings), len(t.holders) - len(t.embeddings) if mode else 0)
                for t, mode in tables.items()
            ),
            frozen_bytes=sum(frozen_bytes(t.shape[0], rows, t.shape[1], computed_bytes) for t in held_twice),
        ),
    )


def folder_of(model: str) -> Path | None:
    """The folder of a checkpoint on this machine: itself, or the one in the hub's cache; None where there is none."""
    if is_folder(model):
        return Path(model)
    from huggingface_hub import constants

    cached = Path(constants.HF_HUB_CACHE, f"models--{model.replace('/', '--')}")
    try:
        return cached / "snapshots" / (cached / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None


def _parameter(tensor: _Tensor, rows: int | None, value_bytes: int, is_table: bool) -> Parameter:
    return Parameter(
        shape=tensor.shape if rows is None else (rows, *tensor.shape[1:]),
        value_bytes=value_bytes,
        trains=tensor.leaf.trains,
        in_embedding=bool(tensor.embeddings),
        in_layer=any(_is_layer(holder) for holder in tensor.holders.values()),
        is_table=is_table,
    )


def _is_layer(module: Module) -> bool:
    weight = module.attributes.get("weight")
    return isinstance(weight, Leaf) and len(weight.shape or ()) >= 2 and module.kind != "nn.Embedding"


# --- the tensors of the model, by its constructor and its files --------------------------------------------------------


def _read(folder: Path, auto_class: str) -> tuple[Module, list[_Tensor]]:
    try:
        _, config = read_json(folder, "config.json")
        entries = {name: entry for name, (_, entry) in read_weights(folder).tensors.items()}
    except CheckpointError as error:
        raise Unsure(str(error)) from error
    if any(config.get(name) for name in _NOT_PLAIN):
        raise Unsure("more is loaded than the config's class makes")
    network = construct(str(config.get("model_type")), auto_class, config)
    _check_trains(network)
    _tie(network)
    tensors = _tensors(network)
    names = {name: tensor for tensor in tensors for name in tensor.names}
    by_tensor, others = dict[_Tensor, TensorEntry](), dict[str, TensorEntry]()
    for name, entry in _as_in_model(network, entries).items():
        tensor = names.get(name)
        if tensor is None:
            others[name] = entry
        elif by_tensor.setdefault(tensor, entry) is not entry:
            raise Unsure(f"{name} is one tensor in the model, and several in the files")
    for tensor in tensors:
        _give_size(tensor, by_tensor.get(tensor))
    _check_others(network, others, [tensor for tensor in tensors if tensor not in by_tensor])
    return network, tensors


def _as_in_model(network: Module, entries: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Tensors by their names in a model with a head, where the files may be of a model without one."""
    prefix = network.source.value("base_model_prefix") if network.source else None
    if not prefix or prefix not in network.attributes or any(name.startswith(f"{prefix}.") for name in entries):
        return entries
    return {f"{prefix}.{name}": entry for name, entry in entries.items()}


def _tie(network: Module) -> None:
    """Ties what transformers does, in each model within the model."""
    for _, module in reversed(list(network.named_modules())):
        config = module.attributes.get("config")
        ties = None if module.source is None else module.source.value("_tied_weights_keys")
        ties = module.attributes.get("_tied_weights_keys", ties)
        if not ties or not isinstance(config, Config) or not _certain(_is_tied(config)):
            continue
        if not isinstance(ties, dict):
            raise Unsure("ties that are no literals")
        for target, source in ties.items():
            path, _, attribute = target.rpartition(".")
            holder, leaf = module.at(path) if path else module, module.at(source)
            if not isinstance(leaf, Leaf) or not isinstance(holder, Module) or attribute not in holder.attributes:
                raise Unsure(f"the tie of {target} to {source}")
            if holder.attributes[attribute] is not None:
                holder.attributes[attribute] = leaf


def _is_tied(config: Config) -> Any:
    return config.field("tie_word_embeddings") if config.has("tie_word_embeddings") else False


def _certain(value: Any) -> Any:
    if value is UNKNOWN:
        raise Unsure("a field of the config is not known")
    return value


def _tensors(network: Module) -> list[_Tensor]:
    """Parameters and saved buffers, each once."""
    tensors, seen = dict[int, _Tensor](), set[int]()
    for path, module in network.named_modules():
        for name, leaf in module.attributes.items():
            if isinstance(leaf, Leaf) and (leaf.is_saved or not leaf.is_buffer):
                tensor = tensors.setdefault(id(leaf), _Tensor(leaf))
                tensor.names.append(f"{path}.{name}" if path else name)
                if id(module) not in seen:
                    tensor.holders[path] = module
        seen.add(id(module))
    return list(tensors.values())


def _check_others(network: Module, entries: Mapping[str, TensorEntry], tensors: list[_Tensor]) -> None:
    """Raises `Unsure` where tensors of files are neither left aside when they are loaded, nor those of a module in another form.

    What transformers renames, or joins (experts), when it loads is as many values below the same module.
    """
    num_values = dict[str, int]()
    for name, entry in entries.items():
        path = _deepest(network, name)
        if path is None:
            raise Unsure(f"{name} is not known to the model's class")
        if path:
            num_values[path] = num_values.get(path, 0) + math.prod(entry.shape)
    for path, its in num_values.items():
        below = [tensor for tensor in tensors if tensor.names[0].startswith(f"{path}.")]
        if below and its != sum(tensor.num_values for tensor in below):
            raise Unsure(f"{path} has other tensors in the files")


def _deepest(network: Module, name: str) -> str | None:
    """The path of the deepest module on the way to a tensor; "" for another head, None where it cannot be said."""
    value: Any = network
    parts = name.split(".")
    for position, part in enumerate(parts):
        below = value.attributes.get(part) if isinstance(value, Module) else UNKNOWN
        if below is None:  # what is not there, and is not to be
            is_absent = position == 0 or part in value.attributes
            return "" if is_absent else ".".join(parts[:position])
        if below is UNKNOWN:
            return None
        if isinstance(below, Leaf):
            return "" if below.is_buffer else None
        value = below
    return None


def _give_size(tensor: _Tensor, entry: TensorEntry | None) -> None:
    """The size that a tensor has in the files, or the one that the constructor gives what is not there."""
    shape = tensor.leaf.shape
    is_known = shape is not None and all(type(size) is int for size in shape)
    if entry is None:
        if not is_known or shape is None:
            raise Unsure(f"{tensor.names[0]} is not in the files")
        tensor.shape, tensor.num_bytes = shape, FP32_BYTES * math.prod(shape)
    elif is_known and shape != entry.shape:
        raise Unsure(f"{tensor.names[0]} is {shape} in the model, and {entry.shape} in the files")
    elif not tensor.leaf.is_buffer and entry.dtype not in _FLOATS:
        raise Unsure(f"{tensor.names[0]} is of {entry.dtype}")
    else:
        tensor.shape, tensor.num_bytes = entry.shape, entry.num_bytes
    tensor.leaf.shape = tensor.shape


# --- tables, as model.find finds them ----------------------------------------------------------------------------------


def _tables(
    network: Module, tensors: list[_Tensor], kept: Any, output: str | None
) -> tuple[int, dict[_Tensor, str | None], _Tensor | None]:
    """Rows kept, the tables with what becomes of the output layers among them, and the output layer's matrix."""
    by_leaf = {id(tensor.leaf): tensor for tensor in tensors}
    if any("get_per_layer_input_embeddings" in text for text in _texts(network)):
        raise Unsure("tables for each layer")

    def matrix_of(module: Any, kind: str) -> _Tensor:
        weight = module.attributes.get("weight") if isinstance(module, Module) and module.kind == kind else None
        if weight is None:
            raise Unsure(f"{module} is no {kind}")
        return by_leaf[id(weight)]

    table = matrix_of(input_embeddings(network), "nn.Embedding")
    full_rows = table.shape[0]
    of_this_size = [each for each in tensors if each.embeddings and each.shape[0] == full_rows]
    if of_this_size != [table]:
        raise Unsure("several tables have as many rows")
    rows = _num_rows(kept, full_rows)
    named = output_embeddings(network)
    layer = None if named is None else matrix_of(named, "nn.Linear")
    if layer is None and len(table.holders) > len(table.embeddings):
        raise Unsure("a layer that is tied to the table, and not named")
    mode = output or ("frozen" if layer is table else "full")
    if layer is (table if mode == "full" else None):
        raise Unsure("the table is tied to what stays whole, or nothing is scored")
    tables: dict[_Tensor, str | None] = {table: mode if layer is table else None}
    if layer is not None and layer is not table and mode != "full":
        if layer.shape[0] != full_rows:
            raise Unsure("the output layer scores other ids")
        tables[layer] = mode
    for each in tables:
        _check_reads(network, each)
    return rows, tables, layer


def _num_rows(kept: Any, full_rows: int) -> int:
    if not isinstance(kept, int):
        kept = len(kept) if kept.full_size == full_rows else 0
    if not 1 <= kept <= full_rows:
        raise Unsure("the vocabulary is not of the table's size")
    return int(kept)


def _check_reads(network: Module, table: _Tensor) -> None:
    """Raises `Unsure` where any code of the model may read the table around the modules that hold it: it may be refused."""
    for holder in table.holders.values():
        forward = None if holder.source is None else holder.source.function("forward")
        if forward is not None and "super().forward" not in ast.unparse(forward[1]):
            raise Unsure("a forward of its own")
    attributes = "|".join({re.escape(name.split(".")[-2]) for name in table.names})
    read = re.compile(rf"\b(?:{attributes})\.weight\b(?!\s*=[^=])")
    for text in _texts(network):
        if read.search(text):
            raise Unsure(f"{attributes}.weight is read")


def _check_trains(network: Module) -> None:
    """Raises `Unsure` where code that builds a model may say what trains, or make ties, beside what was read."""
    config = network.attributes.get("config", {})
    sinusoidal = any(value for name, value in config.items() if "sinusoidal" in name)
    for text in _texts(network):
        is_set = re.search(r"\.requires_grad\s*=\s*False|\brequires_grad_\(False", text)
        if is_set or (sinusoidal and "sinusoidal_embeddings(" in text):
            raise Unsure("what trains is said somewhere")
        if "self._tied_weights_keys" in text:
            raise Unsure("ties are made by code")


def _texts(network: Module) -> list[str]:
    """The text of the classes that a model is made of, without strings, comments and what gives first values."""
    sources = {module.source for _, module in network.named_modules() if module.source is not None}
    above = {each for source in sources for each in source.above() if isinstance(each, ClassText)}
    return [_without_strings(each.text) for each in above]


def _without_strings(text: str) -> str:
    return re.sub(r'"""(?s:.*?)"""|"[^"\n]*"|#.*|\binit\.\w+\(.*', "", text)
