"""Columns of token ids, found by their names and kinds; an error that lists the columns where there is none. No torch.

All that is known of a column before its rows are read is its name and its `Kind`: how deep its lists are nested, and what
lies in them. The choice is the same for Arrow tables, arrays, batches and rows (docs/decisions/columns-counted-by-default.md).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from leanvocab.errors import DataError
from leanvocab.extras import is_instance, is_tensor

ID_NAMES = ("token_ids", "prompt_ids", "completion_ids", "chosen_ids", "rejected_ids", "target_ids")
LABEL_NAMES = ("labels", "label_ids")
# Lists of integers beside token ids that are certainly none: what tokenizers, collators and Trainers write.
OTHER_NAMES = (
    "mask", "masks", "token_type_ids", "position_ids", "word_ids", "segment_ids", "bbox", "offset_mapping", "length",
    "seq_lengths", "overflow_to_sample_mapping", "overflow_mapping",
)  # fmt: skip

Leaf = Literal["integer", "text", "empty", "other"]


@dataclass(frozen=True)
class Kind:
    """The kind of a column: lists `depth` deep (0: one number a row) of `leaf`; `shown` is its name in messages."""

    depth: int
    leaf: Leaf
    shown: str

    @property
    def may_hold_ids(self) -> bool:
        """Integers, or nothing at all."""
        return self.leaf in ("integer", "empty")


def choose_id_columns(data: Any, named: Iterable[str] | None = None, *, where: str = "") -> list[str]:
    """The columns of token ids: those that the user named, or those that their names and kinds tell.

    `data` is a data set that knows its features, an Arrow table or its schema, or a mapping (of columns, or one row);
    `where` goes into messages (`" of split 'train'"`).

    Raises:
        DataError: a named column is absent or holds no integers; or no column fits. The message lists what is there.
    """
    kinds = kinds_of_columns(data)
    if named is not None:
        return _check_named(kinds, list(dict.fromkeys(named)), where)
    inputs = _check_named(kinds, [name for name in kinds if _is_or_ends_in(name, ("input_ids",))], where)
    candidates = {name: kind.depth for name, kind in kinds.items() if kind.may_hold_ids and kind.depth > 0}
    ids = inputs + [name for name in candidates if name not in inputs and _is_or_ends_in(name, ID_NAMES)]
    # One class for each sequence is a level less deep than the sequences themselves.
    depth = kinds[ids[0]].depth if ids else 1
    classes = _class_label_columns(data)
    labels = [n for n in candidates if _is_or_ends_in(n, LABEL_NAMES) and candidates[n] >= depth and n not in classes]
    if not ids and not labels:
        raise DataError(
            f"found no column of token ids{where}: expected one whose name is or ends in 'input_ids' (or one of "
            f"{', '.join(map(repr, (*ID_NAMES, *LABEL_NAMES)))} with lists of integers), "
            f"the data has {listed(kinds)}. "
            "Tokenize the data first, or name the columns that hold token ids with columns=, or pass tokenizer= to count texts."
        )
    return [name for name in kinds if name in ids or name in labels]


def choose_columns_to_remap(data: Any, named: Iterable[str] | None = None) -> list[str]:
    """The columns of token ids to rewrite: those that the user named, or those named `input_ids` if no other may hold ids too.

    A column too many, which is harmless in counting, would turn classes into others here, and a column too few would leave
    ids that name other rows: neither would be seen. `data` is as in `choose_id_columns`.

    Raises:
        DataError: as `choose_id_columns`; or a column of lists of integers may hold token ids or something else.
    """
    if named is not None:
        return choose_id_columns(data, named)
    kinds = kinds_of_columns(data)
    inputs = _check_named(kinds, [name for name in kinds if _is_or_ends_in(name, ("input_ids",))], "")
    # In a mapping rows are a level of their own: one number for each sequence is a level less deep than the sequences.
    depth = min((kinds[name].depth for name in inputs), default=1) if isinstance(data, Mapping) else 1
    harmless = {*inputs, *_class_label_columns(data), *(name for name in kinds if _is_or_ends_in(name, OTHER_NAMES))}
    doubtful = {n: k for n, k in kinds.items() if n not in harmless and k.leaf == "integer" and k.depth >= depth}
    if doubtful:
        raise DataError(
            f"found lists of integers that may be token ids or something else (classes, say): {listed(doubtful)}; remapped "
            "or left by mistake they would be wrong without a sign. Name the columns that hold token ids: "
            f"columns={inputs or [next(iter(doubtful))]!r}, say. Labels that an output layer scores stay as they are, since "
            'with ids="partial" it is whole'
        )
    return inputs or choose_id_columns(data)


def listed(kinds: Mapping[str, Kind]) -> str:
    """Columns and what they hold, as messages show them."""
    return ", ".join(f"{name!r} ({kind.shown})" for name, kind in kinds.items()) or "no columns"


def check_ids(values: Any, what: str) -> None:
    """Raise a DataError that says what an array or tensor holds, unless it may hold token ids."""
    if refusal := _refusal(kind_of_value(values), what):
        raise DataError(refusal)


def has_token_columns(kinds: Mapping[str, Kind]) -> bool:
    """True where columns of these kinds hold inputs of a model as token ids; labels alone may be anything beside texts."""
    return any(kind.may_hold_ids and _is_or_ends_in(name, ("input_ids", *ID_NAMES)) for name, kind in kinds.items())


def kinds_of_columns(data: Any) -> dict[str, Kind]:
    """The kind of each column of what `choose_id_columns` takes."""
    if isinstance(data, Mapping):
        return {name: kind_of_value(value) for name, value in data.items() if isinstance(name, str)}
    if is_instance(data, "pyarrow", "Schema"):
        schema = data
    elif is_instance(data, "datasets", "IterableDataset"):
        schema = data.features.arrow_schema
    else:
        # `data` of a data set is the Arrow table under every format, transform and selection.
        schema = (data.data if is_instance(data, "datasets", "Dataset") else data).schema
    return {name: _kind_of_type(schema.field(name).type) for name in schema.names}


def _class_label_columns(data: Any) -> set[str]:
    """The columns that a data set's features declare to be lists of classes (token classification)."""
    columns = set()
    features = data.features if is_instance(data, "datasets", "Dataset", "IterableDataset") else {}
    for name, feature in features.items():
        while hasattr(feature, "feature"):
            feature = feature.feature
        if type(feature).__name__ == "ClassLabel":
            columns.add(name)
    return columns


def _kind_of_type(arrow_type: Any) -> Kind:
    import pyarrow as pa

    lists = (pa.ListType, pa.LargeListType, pa.FixedSizeListType, pa.ListViewType, pa.LargeListViewType)
    depth, inner = 0, arrow_type
    while isinstance(inner, (pa.BaseExtensionType, *lists)):
        is_list = isinstance(inner, lists)
        depth, inner = depth + is_list, inner.value_type if is_list else inner.storage_type
    leaf: Leaf = "other"
    if pa.types.is_integer(inner):
        leaf = "integer"
    elif pa.types.is_null(inner):
        leaf = "empty"
    elif str(inner) in ("string", "large_string", "string_view"):
        leaf = "text"
    return Kind(depth, leaf, str(arrow_type))


def kind_of_value(value: Any) -> Kind:
    """The kind of one value in a row or batch: an array, a tensor, nested lists or a number."""
    leaf: Leaf
    if is_instance(value, "pyarrow", "Array", "ChunkedArray"):
        # An array of numbers is one sequence: a level deeper than its type.
        kind = _kind_of_type(value.type)
        return Kind(kind.depth + 1, kind.leaf, kind.shown)
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
        kind = Kind(0, "empty", "nothing") if first is None else kind_of_value(first)
        return Kind(kind.depth + 1, kind.leaf, f"a list of {kind.shown}")
    return Kind(0, "other", type(value).__name__)


def _is_or_ends_in(name: str, endings: Iterable[str]) -> bool:
    return any(name == ending or name.endswith("_" + ending) for ending in endings)


def _check_named(kinds: Mapping[str, Kind], named: list[str], where: str) -> list[str]:
    for name in named:
        if name not in kinds:
            raise DataError(f"found no column {name!r}{where}: the data has {listed(kinds)}")
        if refusal := _refusal(kinds[name], f"column {name!r}{where}"):
            others = {other: kind for other, kind in kinds.items() if other != name}
            raise DataError(f"{refusal}; beside it, the data has {listed(others)}")
    return named


def _refusal(kind: Kind, what: str) -> str | None:
    if kind.leaf == "text":
        return f"{what} holds text ({kind.shown}), expected token ids: tokenize it first"
    return None if kind.may_hold_ids else f"{what} holds {kind.shown}, expected integers (token ids)"
