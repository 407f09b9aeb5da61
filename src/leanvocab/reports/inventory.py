"""Every vocabulary-sized tensor of a model, by storage and shape, and what becomes of it in each output mode. Also on "meta".

Whole tensors are never of a wrong size: ids and logits outside the shrunk modules are those of the full vocabulary. What can
go wrong is code that reads a partial matrix around its module; where each forward does so, that mode is refused
(docs/decisions/whole-tensors.md).
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

from torch import Tensor, nn

from leanvocab.choices import OUTPUT_MODES
from leanvocab.errors import LeanVocabError, ModelError
from leanvocab.model.find import find_tables, output_layers
from leanvocab.model.full_table import LOOKUPS, FullTable
from leanvocab.partial.module import partial_modules
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary
from leanvocab.vocabulary.special_ids import model_full_size

PARTIAL, WHOLE = "partial", "stays whole"
NOT_UNDERSTOOD = "not understood"
_Holder: TypeAlias = tuple[str, nn.Module, str]  # name, module, its attribute
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
    inputs = dict.fromkeys(_inputs_of(model, embedding, plans))
    outputs = output_layers(model, inputs)
    default = plans.pop(None, ())
    refusals.pop(None, None)
    tensors = [
        VocabularyTensor(
            names=tuple(name for name, _, _ in holders),
            kind=_kind(tensor, holders, inputs, outputs),
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            num_bytes=tensor.nbytes,
            outcomes={
                mode: PARTIAL if any(table.weight is tensor for table in plan) else WHOLE
                for mode, plan in plans.items()
            },
        )
        for tensor, holders in _groups(model, _full_sizes(model, [*inputs, *outputs]))
    ]
    mode = next((table.output for table in default if table.output), "full" if outputs and default else None)
    return Inventory(
        tuple(sorted(tensors, key=lambda tensor: -tensor.num_bytes)),
        sum(tensor.nbytes for tensor in _distinct(model)),
        mode,
        refusals,
    )


def _plans(model: nn.Module, embedding: str | None) -> tuple[dict[Any, list[FullTable]], dict[Any, str]]:
    """Mode (None: the one that `shrink_` chooses) → the tables that would be partial; mode → why not."""
    plans, refusals = {}, {}
    for mode in (None, *OUTPUT_MODES):
        try:
            plans[mode] = _plan(model, embedding, mode)
        except LeanVocabError as error:
            refusals[mode] = str(error)
    return plans, refusals


def _plan(model: nn.Module, embedding: str | None, mode: Any) -> list[FullTable]:
    if partial_modules(model):
        raise ModelError(f"{type(model).__name__} is shrunk; merge_(model) first")
    full_size = model_full_size(model) if embedding is None else None
    if embedding is not None:
        full_size = getattr(dict(model.named_modules()).get(embedding), "num_embeddings", None)
    if not full_size:
        raise ModelError(
            f"{type(model).__name__} does not say which table its ids go to; name it: embedding='path.to.module'"
        )
    return find_tables(model, PartialVocabulary([0], full_size), embedding, mode)


def _inputs_of(model: nn.Module, embedding: str | None, plans: Mapping[Any, list[FullTable]]) -> Iterator[nn.Module]:
    """The tables that would be partial, and the one that takes the ids in a model that cannot be shrunk at all."""
    tables = (table for plan in plans.values() for table in plan)
    yield from (module for table in tables for module in table.modules if isinstance(module, LOOKUPS))
    try:
        named = model.get_submodule(embedding) if embedding is not None else model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        return
    if isinstance(named, LOOKUPS):
        yield named


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


def _groups(model: nn.Module, sizes: set[int]) -> list[tuple[Tensor, list[_Holder]]]:
    """The tensors of one memory each, and where they hang."""
    groups: dict[int, tuple[Tensor, list[_Holder]]] = {}
    for path, module in model.named_modules():
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and sizes.intersection(tensor.shape):
                name = f"{path}.{attribute}" if path else attribute
                groups.setdefault(_memory(tensor), (tensor, []))[1].append((name, module, attribute))
    return list(groups.values())


def _kind(tensor: Tensor, holders: list[_Holder], inputs: Collection[nn.Module], outputs: Collection[nn.Module]) -> str:
    weights = [module for _, module, attribute in holders if attribute == "weight"]
    is_input = any(module in inputs for module in weights)
    is_output = any(module in outputs for module in weights)
    if is_input or is_output:
        return " and ".join(["input table"] * is_input + ["output weight"] * is_output)
    if not isinstance(tensor, nn.Parameter):
        return "buffer"
    if tensor.ndim == 1:
        return "output bias" if tensor.shape[0] in [len(layer.weight) for layer in outputs] else "bias"  # type: ignore[arg-type]
    if any(isinstance(each, LOOKUPS) for each in weights):
        return "another table"
    if any(isinstance(each, nn.Linear) for each in weights):
        return "another layer"
    return NOT_UNDERSTOOD
