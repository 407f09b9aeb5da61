"""Tensors of a checkpoint of which a dimension is the vocabulary: those whose shape differs between a model of the config and
one of the trimmed config, so that plain loading fits by construction. Models without memory; no weight is read."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from leanvocab.checkpoints.tensor_names import TensorNames
from leanvocab.errors import CheckpointError, ModelError
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
    smaller = {name: tuple(tensor.shape) for name, tensor in after.state_dict().items()}
    trimmed: dict[str, TrimmedTensor] = {}
    known: set[str] = set()
    for name, tensor in before.state_dict().items():
        shape = tuple(tensor.shape)
        in_base = names.in_base(name)
        change = _change(name, shape, smaller.get(name), new_ids)
        if change is None and (sizes & set(shape)) - explained:
            raise ModelError(
                f"{name} {shape} has the size of the vocabulary, and a model with fewer tokens would have it of the same size: "
                f"how {type(before).__name__} comes to it is not understood, so that it cannot be trimmed"
            )
        if in_base is None:
            continue
        known.add(in_base)
        if change is not None:
            _check_shape(in_base, shapes[in_base], shape)
            trimmed[in_base] = change
    rest = {name: shape for name, shape in shapes.items() if name not in known}
    return trimmed | dict(_unnamed(rest, new_ids, sizes, explained))


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


def _check_shape(name: str, found: _Shape, expected: _Shape) -> None:
    if found != expected:
        raise CheckpointError(
            f"{name} has the shape {found} in the checkpoint, and {expected} by its config: they are not of one model"
        )


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
