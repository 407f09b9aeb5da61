"""Every vocabulary-sized tensor of a model, by storage and shape, and what becomes of it in each output mode. Also on "meta".

Whole tensors are never of a wrong size: ids and logits outside the shrunk modules are those of the full vocabulary. What can
go wrong is code that reads a partial matrix around its module; where each forward does so, that mode is refused
(docs/decisions/whole-tensors.md).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from leanvocab.choices import OUTPUT_MODES
from leanvocab.errors import LeanVocabError
from leanvocab.model.find import find_tables, output_layers
from leanvocab.model.full_table import FullTable
from leanvocab.partial.module import partial_modules
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary
from leanvocab.vocabulary.special_ids import model_full_size

PARTIAL, WHOLE = "partial", "stays whole"
NOT_UNDERSTOOD = "not understood"
# Segments are no vocabulary, though BERT calls them so.
_VOCABULARY_FIELD = re.compile(r"(?<!^type)(^|_)vocab_size(_|$)")


@dataclass(frozen=True)
class VocabularyTensor:
    """One tensor of which a dimension is a vocabulary. Several names: they are tied, to one memory."""

    names: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    outcomes: Mapping[str, str] = field(default_factory=dict)  # mode → what becomes of it there

    @property
    def is_understood(self) -> bool:
        """True where leanvocab knows what the model does with it."""
        return self.kind != NOT_UNDERSTOOD


@dataclass(frozen=True)
class Inventory:
    """The vocabulary-sized tensors of a model, the largest first; `num_bytes` is of all its tensors."""

    tensors: tuple[VocabularyTensor, ...]
    num_bytes: int
    # What `shrink_` does to the output layer by itself; None where it refuses the model, or there is none.
    default_mode: str | None
    refusals: Mapping[str, str]  # mode → why the model cannot be shrunk in it

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        tensors = [
            {**asdict(tensor), "ratio": tensor.num_bytes / self.num_bytes, "outcomes": dict(tensor.outcomes)}
            for tensor in self.tensors
        ]
        return {"tensors": tensors, "default_mode": self.default_mode, "refusals": dict(self.refusals)}


def take_inventory(model: nn.Module, embedding: str | None = None) -> Inventory:
    """Lists every vocabulary-sized tensor of a model that is not shrunk, on any device; nothing is changed.

    `embedding` is the path of the table in a module that does not name its own, as for `shrink_`.
    """
    plans, refusals = _plans(model, embedding)
    default, _ = _plan(model, embedding, None)
    takers = (*_inputs_of(default, *plans.values()), *_named_inputs(model, embedding))
    inputs = {id(module): module for module in takers}
    outputs = output_layers(model, inputs.values())
    sizes = _full_sizes(model, [*inputs.values(), *outputs])
    groups = _groups(model, sizes)
    roles = _Roles(inputs, {id(layer) for layer in outputs}, {int(layer.weight.shape[0]) for layer in outputs})  # type: ignore[index]
    tensors = [_describe(group, roles, plans) for group in groups]
    mode = next((table.output for table in default or () if table.output), "full" if outputs and default else None)
    return Inventory(
        tuple(sorted(tensors, key=lambda tensor: -tensor.num_bytes)),
        sum(tensor.nbytes for tensor in _distinct(model)),
        mode,
        refusals,
    )


def _plans(model: nn.Module, embedding: str | None) -> tuple[dict[str, list[FullTable]], dict[str, str]]:
    """Mode → the tables that would be partial; mode → why not."""
    plans, refusals = {}, {}
    for mode in OUTPUT_MODES:
        plan, refusal = _plan(model, embedding, mode)
        if plan is None:
            refusals[mode] = refusal
        else:
            plans[mode] = plan
    return plans, refusals


def _plan(model: nn.Module, embedding: str | None, mode: Any) -> tuple[list[FullTable] | None, str]:
    if partial_modules(model):
        return None, f"{type(model).__name__} is shrunk; merge_(model) first"
    full_size = model_full_size(model) if embedding is None else None
    if embedding is not None:
        full_size = getattr(dict(model.named_modules()).get(embedding), "num_embeddings", None)
    if not full_size:
        return (
            None,
            f"{type(model).__name__} does not say which table its ids go to; name it: embedding='path.to.module'",
        )
    try:
        return find_tables(model, PartialVocabulary([0], full_size), embedding, mode), ""
    except LeanVocabError as error:
        return None, str(error)


def _inputs_of(*plans: list[FullTable] | None) -> Iterator[nn.Module]:
    tables = (table for plan in plans for table in plan or ())
    return (module for table in tables for module in table.modules if isinstance(module, nn.Embedding))


def _named_inputs(model: nn.Module, embedding: str | None) -> Iterator[nn.Module]:
    """The module that takes the ids, in a model that cannot be shrunk at all."""
    try:
        named = model.get_submodule(embedding) if embedding is not None else model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        return
    if isinstance(named, nn.Embedding):
        yield named


# --- which tensors ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """One memory: the tensor, and where it hangs."""

    tensor: Tensor
    holders: tuple[tuple[str, nn.Module, str], ...]  # (name, module, its attribute)


def _full_sizes(model: nn.Module, modules: list[nn.Module]) -> set[int]:
    """Rows of what takes or scores ids, and whatever a config calls a vocabulary's size."""
    sizes = {int(each.weight.shape[0]) for each in modules if isinstance(each.weight, Tensor)}
    seen: set[int] = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and id(config) not in seen:
            seen.add(id(config))
            sizes.update(_sizes_in(config))
    return sizes


def _sizes_in(config: Any) -> Iterator[int]:
    for name, value in vars(config).items():
        if type(value) is int and value > 1 and _VOCABULARY_FIELD.search(name):
            yield value
        elif hasattr(value, "to_dict") and value is not config:
            yield from _sizes_in(value)


def _distinct(model: nn.Module) -> list[Tensor]:
    return list({_memory(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values())


def _memory(tensor: Tensor) -> int:
    """A number for the memory that tensors lie in, of whatever shape; on the meta device too."""
    return int(tensor.untyped_storage()._cdata)


def _groups(model: nn.Module, sizes: set[int]) -> list[_Group]:
    tensors: dict[int, Tensor] = {}
    holders: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and sizes.intersection(tensor.shape):
                name = f"{path}.{attribute}" if path else attribute
                tensors.setdefault(_memory(tensor), tensor)
                holders.setdefault(_memory(tensor), []).append((name, module, attribute))
    return [_Group(tensor, tuple(holders[memory])) for memory, tensor in tensors.items()]


# --- what they are ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Roles:
    inputs: Mapping[int, nn.Module]
    outputs: set[int]
    output_rows: set[int]


def _describe(group: _Group, roles: _Roles, plans: Mapping[str, list[FullTable]]) -> VocabularyTensor:
    tensor = group.tensor
    outcomes = {mode: PARTIAL if any(each.weight is tensor for each in plan) else WHOLE for mode, plan in plans.items()}
    return VocabularyTensor(
        names=tuple(name for name, _, _ in group.holders),
        kind=_kind(group, roles),
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        num_bytes=tensor.nbytes,
        outcomes=outcomes,
    )


def _kind(group: _Group, roles: _Roles) -> str:
    weights = [module for _, module, attribute in group.holders if attribute == "weight"]
    is_input = any(id(each) in roles.inputs for each in weights)
    is_output = any(id(each) in roles.outputs for each in weights)
    if is_input or is_output:
        return " and ".join(["input table"] * is_input + ["output weight"] * is_output)
    if not isinstance(group.tensor, nn.Parameter):
        return "buffer"
    if group.tensor.ndim == 1:
        return "output bias" if group.tensor.shape[0] in roles.output_rows else "bias"
    if any(isinstance(each, nn.Embedding) for each in weights):
        return "another table"
    if any(isinstance(each, nn.Linear) for each in weights):
        return "another layer"
    return NOT_UNDERSTOOD
