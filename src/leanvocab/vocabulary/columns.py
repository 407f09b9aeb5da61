"""Which columns hold token ids, and what to say when none does. Imports neither torch nor pyarrow.

A column is described by a `Kind`: how deep its lists are nested, and what lies in them. The choice by name is then a
pure function of names and kinds, the same for Arrow tables, arrays, batches and rows (see
docs/decisions/columns-counted-by-default.md).
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from leanvocab.errors import DataError

ID_NAMES = ("token_ids", "prompt_ids", "completion_ids", "chosen_ids", "rejected_ids", "target_ids")
LABEL_NAMES = ("labels", "label_ids")

_LIST_TYPES = ("ListType", "LargeListType", "FixedSizeListType", "ListViewType", "LargeListViewType")

Leaf = Literal["integer", "text", "empty", "other"]


@dataclass(frozen=True)
class Kind:
    """What a column holds: lists `depth` deep (0: one number a row) of `leaf`; `shown` is its name in messages."""

    depth: int
    leaf: Leaf
    shown: str

    @property
    def may_hold_ids(self) -> bool:
        """Integers, or nothing at all."""
        return self.leaf in ("integer", "empty")


def choose_id_columns(
    kinds: Mapping[str, Kind], named: Sequence[str] | None = None, *, where: str = "", class_labels: Iterable[str] = ()
) -> list[str]:
    """The columns of token ids: those that the user named, or those that their names and kinds tell.

    `where` goes into messages (`" of split 'train'"`); `class_labels` are columns known to hold classes.

    Raises:
        DataError: a named column is absent or holds no integers; or no column fits. The message lists what is there.
    """
    if named is not None:
        return _check_named(kinds, list(dict.fromkeys(named)), where)
    inputs = [name for name in kinds if _is_or_ends_in(name, ("input_ids",))]
    _check_named(kinds, inputs, where)
    others = [n for n, kind in kinds.items() if _is_or_ends_in(n, ID_NAMES) and kind.may_hold_ids and kind.depth > 0]
    ids = inputs + [name for name in others if name not in inputs]
    # One class for each sequence is a level less deep than the sequences themselves.
    depth = max(1, kinds[ids[0]].depth) if ids else 1
    classes = set(class_labels)
    labels = [
        name
        for name, kind in kinds.items()
        if _is_or_ends_in(name, LABEL_NAMES) and kind.may_hold_ids and kind.depth >= depth and name not in classes
    ]
    if not ids and not labels:
        raise DataError(
            f"found no column of token ids{where}: expected one whose name is or ends in 'input_ids' (or one of "
            f"{', '.join(map(repr, (*ID_NAMES, *LABEL_NAMES)))} with lists of integers), "
            f"the data has {_listed(kinds)}. "
            "Tokenize the data first, or name the columns that hold token ids with columns=."
        )
    chosen = {*ids, *labels}
    return [name for name in kinds if name in chosen]


def check_kind(kind: Kind, what: str) -> None:
    """Raise a DataError that says what `what` holds, unless it may hold token ids."""
    if kind.leaf == "text":
        raise DataError(f"{what} holds text ({kind.shown}), expected token ids: tokenize it first")
    if not kind.may_hold_ids:
        raise DataError(f"{what} holds {kind.shown}, expected integers (token ids)")


def arrow_kind(arrow_type: Any) -> Kind:
    """The kind of an Arrow type."""
    import pyarrow as pa

    lists = tuple(getattr(pa, name) for name in _LIST_TYPES if hasattr(pa, name))
    depth, inner = 0, arrow_type
    while True:
        if isinstance(inner, pa.BaseExtensionType):
            inner = inner.storage_type
        elif isinstance(inner, lists):
            depth, inner = depth + 1, inner.value_type
        else:
            break
    leaf: Leaf = "other"
    if pa.types.is_integer(inner):
        leaf = "integer"
    elif pa.types.is_null(inner):
        leaf = "empty"
    elif str(inner) in ("string", "large_string", "string_view"):
        leaf = "text"
    return Kind(depth, leaf, str(arrow_type))


def value_kind(value: Any) -> Kind:
    """The kind of one value in a row or batch: an array, a tensor, nested lists or a number."""
    if is_arrow(value, "Array", "ChunkedArray"):
        # An array of numbers is one sequence: a level deeper than its type.
        kind = arrow_kind(value.type)
        return Kind(kind.depth + 1, kind.leaf, kind.shown)
    leaf: Leaf
    if is_tensor(value):
        numbers = not (value.is_floating_point() or value.is_complex() or str(value.dtype) == "torch.bool")
        # An empty tensor is float unless told otherwise; it holds nothing wrong.
        leaf = "integer" if numbers else "empty" if value.numel() == 0 else "other"
        return Kind(value.ndim, leaf, f"a tensor of {value.dtype}")
    if isinstance(value, np.ndarray) and value.dtype != object:
        leaf = "integer" if value.dtype.kind in "iu" else "empty" if value.size == 0 else "other"
        return Kind(value.ndim, "text" if value.dtype.kind in "US" else leaf, f"an array of {value.dtype}")
    if isinstance(value, str | bytes):
        return Kind(0, "text", type(value).__name__)
    if value is None:
        return Kind(0, "empty", "None")
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return Kind(0, "integer", "int")
    if isinstance(value, Sequence | np.ndarray):
        first = next((item for item in value if item is not None), None)
        kind = Kind(0, "empty", "nothing") if first is None else value_kind(first)
        return Kind(kind.depth + 1, kind.leaf, f"a list of {kind.shown}")
    return Kind(0, "other", type(value).__name__)


def class_label_columns(features: Mapping[str, Any] | None) -> list[str]:
    """The columns that a data set's features declare to be lists of classes (token classification)."""
    found = []
    for name, feature in (features or {}).items():
        while hasattr(feature, "feature"):
            feature = feature.feature
        if type(feature).__name__ == "ClassLabel":
            found.append(name)
    return found


def is_tensor(value: Any) -> bool:
    """Whether a value is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and hasattr(torch, "Tensor") and isinstance(value, torch.Tensor)


def is_arrow(value: Any, *names: str) -> bool:
    """Whether a value is one of pyarrow's classes, without importing pyarrow."""
    return _is_of(value, "pyarrow", names)


def is_datasets(value: Any, *names: str) -> bool:
    """Whether a value is one of datasets' classes, without importing datasets."""
    return _is_of(value, "datasets", names)


def _is_of(value: Any, module_name: str, names: Iterable[str]) -> bool:
    module = sys.modules.get(module_name)
    classes = tuple(getattr(module, name) for name in names if hasattr(module, name))
    return isinstance(value, classes)


def _is_or_ends_in(name: str, endings: Iterable[str]) -> bool:
    return any(name == ending or name.endswith("_" + ending) for ending in endings)


def _check_named(kinds: Mapping[str, Kind], named: list[str], where: str) -> list[str]:
    for name in named:
        if name not in kinds:
            raise DataError(f"found no column {name!r}{where}: the data has {_listed(kinds)}")
        if not kinds[name].may_hold_ids:
            what = f"column {name!r}{where}"
            rest = {n: k for n, k in kinds.items() if n != name}
            try:
                check_kind(kinds[name], what)
            except DataError as error:
                raise DataError(f"{error}; beside it, the data has {_listed(rest)}") from None
    return named


def _listed(kinds: Mapping[str, Kind]) -> str:
    return ", ".join(f"{name!r} ({kind.shown})" for name, kind in kinds.items()) or "no columns"
