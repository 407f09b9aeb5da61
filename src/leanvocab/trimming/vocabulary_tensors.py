"""Tensors of a checkpoint of which a dimension is the vocabulary: those whose shape differs between a model of the config and
one of the trimmed config, so that plain loading fits by construction. Models without memory; no weight is read."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from leanvocab.checkpoints.tensor_names import TensorNames
from leanvocab.errors import CheckpointError, ModelError
from leanvocab.model.full_table import LOOKUPS, ask
from leanvocab.trimming.id_fields import NewIds

_Shape = tuple[int, ...]


@dataclass(frozen=True)
class TrimmedTensor:
    """Dimensions of a tensor in a checkpoint that are the vocabulary, and its shape afterwards.

    What stays of such a dimension are the kept ids below its size, in their order; then padding, where there is any.
    """

    dims: tuple[int, ...]
    shape: _Shape


def trimmed_tensors(
    before: Any, after: Any, shapes: Mapping[str, _Shape], new_ids: NewIds, sizes: set[int], explained: set[int]
) -> dict[str, TrimmedTensor]:
    """Name of a tensor in the checkpoint → what becomes of it, for those that change.

    `before` and `after` are models without memory, `shapes` the checkpoint's, `sizes` those of the vocabulary, `explained`
    numbers that something else in the config accounts for. Raises `ModelError` and `CheckpointError` that name a tensor of the
    vocabulary's size which is not understood: none is left whole where that could be wrong.
    """
    names = TensorNames(before, shapes)
    changes = _changes(before, after, new_ids, sizes - explained)
    in_base = {name: base for name in before.state_dict() if (base := names.in_base(name)) is not None}
    trimmed = {in_base[name]: change for name, (_, change) in changes.items() if name in in_base}
    for name, (shape, _) in changes.items():
        if name in in_base and shapes[in_base[name]] != shape:
            raise CheckpointError(
                f"{in_base[name]} has the shape {shapes[in_base[name]]} in the checkpoint, and {shape} by its config: they "
                "are not of one model"
            )
    rest = {name: shape for name, shape in shapes.items() if name not in in_base.values()}
    unnamed = dict(_unnamed(rest, new_ids, sizes, explained))
    for name in changes:
        is_there = any(tied in in_base for tied in names.ties[name])
        if not is_there and not unnamed and isinstance(_holder(before, name), LOOKUPS):
            raise ModelError(
                f"{name} is in the checkpoint under no name that is known, or is merged of several tensors when it is loaded: "
                f"which rows of which are tokens of {type(before).__name__} is not understood, so that it cannot be trimmed"
            )
    return trimmed | unnamed


def _changes(before: Any, after: Any, new_ids: NewIds, sizes: set[int]) -> dict[str, tuple[_Shape, TrimmedTensor]]:
    """Name in the model → shape and what becomes of it, for tensors whose shape changes.

    Raises `ModelError` where one that looks tokens up, or scores them, is of one of the sizes and does not change.
    """
    smaller = {name: tuple(tensor.shape) for name, tensor in after.state_dict().items()}
    scoring = [ask(part, "get_output_embeddings") for part in before.modules()]
    changes = {}
    for name, tensor in before.state_dict().items():
        shape = tuple(tensor.shape)
        change = _change(name, shape, smaller.get(name), new_ids)
        holder = _holder(before, name)
        if change is not None:
            changes[name] = shape, change
        elif shape and shape[0] in sizes and (isinstance(holder, LOOKUPS) or holder in scoring):
            raise ModelError(
                f"{name} {shape} has the size of the vocabulary, and a model with fewer tokens would have it of the same size: "
                f"how {type(before).__name__} comes to it is not understood, so that it cannot be trimmed"
            )
    return changes


def _holder(model: Any, name: str) -> Any:
    """The module of a tensor's name."""
    return model.get_submodule(name.rpartition(".")[0])


def _change(name: str, shape: _Shape, smaller: _Shape | None, new_ids: NewIds) -> TrimmedTensor | None:
    if smaller is None or len(smaller) != len(shape):
        raise ModelError(f"{name} {shape} would be {smaller or 'missing'} in a model with fewer tokens: not understood")
    dims = tuple(dim for dim, size in enumerate(shape) if size != smaller[dim])
    for dim in dims:
        if smaller[dim] != new_ids.size(shape[dim]):
            raise ModelError(
                f"{name} {shape} would be {smaller} in a model with fewer tokens, and {new_ids.size(shape[dim]):,} of its "
                f"{shape[dim]:,} rows are kept: which rows those are is not understood"
            )
    return TrimmedTensor(dims, smaller) if dims else None


def _unnamed(
    rest: Mapping[str, _Shape], new_ids: NewIds, sizes: set[int], explained: set[int]
) -> Iterator[tuple[str, TrimmedTensor]]:
    """Tensors that the model has no name for: merged with others when it is loaded, or of a head that it does not have."""
    for name, shape in rest.items():
        dims = tuple(dim for dim, size in enumerate(shape) if size in sizes)
        if any(shape[dim] in explained for dim in dims) or len(dims) > 1:
            raise CheckpointError(
                f"{name} {shape} has the size of the vocabulary, and the model has no tensor of that name: whether its rows are "
                "tokens cannot be told"
            )
        if dims:
            yield name, TrimmedTensor(dims, tuple(new_ids.size(size) if size in sizes else size for size in shape))
