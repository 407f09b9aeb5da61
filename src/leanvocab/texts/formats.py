"""Formats of files with rows: CSV, JSON and Parquet → Arrow tables, in which nothing stands that the file does not say.

Numbers are made of a CSV's column only where each value is written as numbers are: 01 is a string, and so are texts of digits
in a column that is known to hold texts. JSON is read by Python's own reader: Arrow's gives all objects the same keys, refuses
long rows, arrays and mixed types, and ends the process at `null`. In the table, objects of different keys are JSON, and so is
what stands beside the strings of a column of mixed types.
"""

import csv
import gzip
import io
import json
from collections.abc import Callable, Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet

from leanvocab.errors import DataError, first_line, shortened
from leanvocab.files.presence import is_file

_INTEGER = r"^(0|-?[1-9][0-9]*)$"
_NUMBER = r"^[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?$|^[-+]?inf$"
_ABSENT = ("", "NA", "N/A", "n/a", "NULL", "null", "NaN", "nan", "-nan", "None")  # in columns of numbers
_SEPARATORS = (",", ";", "\t")
_LARGEST_BLOCK = 1 << 30  # bytes of a CSV that Arrow reads at once: no row may be longer
_ROWS_AT_ONCE = 10_000
_MADE_STRINGS = b"leanvocab.made_strings"  # in the metadata of a table that was read


class MadeStrings(NamedTuple):
    """Values of a column that are no strings in its file, and were made strings beside others: how many, and the first."""

    num_values: int
    first: str


def made_strings(table: pa.Table) -> tuple[pa.Table, dict[str, MadeStrings]]:
    """A table of `read_table`, and its columns in which values were made strings, as JSON writes them."""
    others = dict(table.schema.metadata or {})
    noted = json.loads(others.pop(_MADE_STRINGS, b"{}"))
    return table.replace_schema_metadata(others), {name: MadeStrings(*values) for name, values in noted.items()}


def format_of(path: Path) -> str:
    """The suffix by which a file is read, .gz left out; empty where it is none of `FORMATS`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    suffix = suffixes[-2] if len(suffixes) > 1 and suffixes[-1] == ".gz" else "".join(suffixes[-1:])
    return suffix if suffix in FORMATS else ""


def read_table(path: Path) -> pa.Table:
    """The rows of a file; those of a CSV are all strings (`with_numbers`).

    Raises:
        DataError: the file is missing, of another type, cannot be read, or has a column twice.
    """
    suffix = format_of(path)
    if not suffix:
        raise DataError(f"{path} is of an unknown type; expected one of {', '.join(FORMATS)}, or such with .gz")
    if not is_file(path):
        raise DataError(f"{path} does not exist")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else _bytes_of(path, suffix)
        if FORMATS[suffix].is_text:
            _check_encoding(path, content)
        table = FORMATS[suffix].read(content)
    except DataError:
        raise
    except (pa.ArrowException, OSError, EOFError, ValueError) as error:
        raise DataError(f"{path} cannot be read as {suffix}: {first_line(error)}") from error
    if twice := next((name for name in table.column_names if table.column_names.count(name) > 1), None):
        raise DataError(f"{path} has the column {twice!r} more than once; give its columns names of their own")
    return table


def with_numbers(table: pa.Table, texts: Collection[str] = ()) -> pa.Table:
    """A table of strings, of which columns became numbers where each value is one in its usual writing, but for `texts`."""
    for at, name in enumerate(table.column_names):
        if name not in texts and name.casefold() not in texts:
            table = table.set_column(at, name, _numbers(table.column(name)))
    return table


def _numbers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    is_absent = pa.compute.is_in(column, pa.array(_ABSENT))
    values = pa.compute.if_else(is_absent, None, column)
    if values.null_count < len(values):
        for pattern, kind in ((_INTEGER, pa.int64()), (_NUMBER, pa.float64())):
            if pa.compute.all(pa.compute.match_substring_regex(values, pattern)).as_py():
                try:
                    return values.cast(kind)
                except pa.ArrowInvalid:  # beyond 64 bits: an identifier
                    return column
    return column


# --- bytes ------------------------------------------------------------------------------------------------------------


def _bytes_of(path: Path, suffix: str) -> Any:
    """The bytes of a file; those of Parquet are not read ahead."""
    return path if suffix == ".parquet" else path.read_bytes()


def _check_encoding(path: Path, content: bytes) -> None:
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(_not_utf8(path, "it begins as UTF-16 does", "UTF-16"))
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(_not_utf8(path, f"byte 0x{content[error.start]:02x} in line {line}", "LATIN1")) from error


def _not_utf8(path: Path, sign: str, encoding: str) -> str:
    return (
        f"{path} is not in UTF-8 ({sign}): save it as UTF-8, for example by "
        f"iconv -f {encoding} -t UTF-8 {path.name} > utf8-{path.name}"
    )


# --- formats ----------------------------------------------------------------------------------------------------------


def _read_csv(content: bytes, separator: str | None = None) -> pa.Table:
    if not content.strip():
        raise ValueError("it is empty; expected a line with the names of columns, and rows")
    header = content.removeprefix(b"\xef\xbb\xbf").lstrip(b"\r\n").split(b"\n", 1)[0].decode("utf-8")
    columns = {known: next(csv.reader([header.rstrip("\r")], delimiter=known)) for known in _SEPARATORS}
    separator = separator or max(columns, key=lambda known: len(columns[known]))
    return pyarrow.csv.read_csv(
        io.BytesIO(content),
        read_options=pyarrow.csv.ReadOptions(block_size=min(_LARGEST_BLOCK, max(len(content), 1 << 20))),
        # A text may hold line breaks, and the word null or NA is a text.
        parse_options=pyarrow.csv.ParseOptions(delimiter=separator, newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(columns[separator], pa.string())),
    )


def _read_tsv(content: bytes) -> pa.Table:
    return _read_csv(content, "\t")


def _read_json(content: bytes) -> pa.Table:
    if not content.strip():
        raise ValueError("it is empty; expected a row in each line, {…}, or a list of rows")
    content = content.removeprefix(b"\xef\xbb\xbf")
    if content.lstrip()[:1] != b"[":
        return _table_of(_lines_of(content))
    rows = _loads(content)
    wrong = next((number for number, row in enumerate(rows) if not isinstance(row, dict)), None)
    if wrong is not None:
        raise ValueError(f"row {wrong} is a {type(rows[wrong]).__name__}; expected an object, {{…}}")
    return _table_of(iter(rows))


def _lines_of(content: bytes) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = _loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} is no JSON ({error}); expected a row in each line, {{…}}") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is a {type(row).__name__}; expected a row in each line, {{…}}")
        yield row


def _loads(text: bytes) -> Any:
    try:
        return _DECODER.decode(text.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError(f"an object has a key twice: {', '.join(name for name, _ in pairs)}")
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_object)  # json.loads would make one for each line


def _table_of(rows: Iterator[dict[str, Any]]) -> pa.Table:
    """The table of rows, made some thousand rows at a time: as Python's objects they take many times the memory."""
    parts: dict[str, list[pa.Array]] = {}
    num_rows, noted = 0, dict[str, MadeStrings]()
    while batch := list(islice(rows, _ROWS_AT_ONCE)):
        for name in dict.fromkeys([*parts, *(name for row in batch for name in row)]):
            parts.setdefault(name, [pa.nulls(num_rows)] if num_rows else [])
            parts[name].append(_array_of([row.get(name) for row in batch], name, noted))
        num_rows += len(batch)
    table = pa.table({name: _together(arrays, name, noted) for name, arrays in parts.items()})
    return table.replace_schema_metadata({_MADE_STRINGS: json.dumps(noted)} if noted else None)


def _array_of(values: list[Any], name: str, noted: dict[str, MadeStrings]) -> pa.Array:
    """An array that gives the values back as they are, which objects of different keys do not; or strings, and JSON."""
    try:
        array = pa.array(values)
        if not pa.types.is_nested(array.type) or array.to_pylist() == values:
            return array
    except (pa.ArrowException, OverflowError):
        pass
    return _as_written(values, name, noted)


def _together(arrays: list[pa.Array], name: str, noted: dict[str, MadeStrings]) -> pa.ChunkedArray:
    """Parts of a column as one: of the type that holds them all, or as written."""
    kinds = {array.type for array in arrays if not pa.types.is_null(array.type)}
    if len(kinds) <= 1:
        kind = kinds.pop() if kinds else pa.null()
        return pa.chunked_array([array.cast(kind) for array in arrays], kind)
    if all(pa.types.is_integer(kind) or pa.types.is_floating(kind) for kind in kinds):
        return pa.chunked_array([array.cast(pa.float64()) for array in arrays], pa.float64())
    return pa.chunked_array([_as_written(array.to_pylist(), name, noted) for array in arrays], pa.string())


def _as_written(values: list[Any], name: str, noted: dict[str, MadeStrings]) -> pa.Array:
    others = [value for value in values if value is not None and not isinstance(value, str)]
    if others:
        earlier = noted.get(name, MadeStrings(0, shortened(_written(others[0]))))
        noted[name] = MadeStrings(earlier.num_values + len(others), earlier.first)
    return pa.array([_written(value) for value in values], pa.string())


def _written(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _read_lines(content: bytes) -> pa.Table:
    lines = content.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    return pa.table({"text": pa.array([line for line in lines if line.strip()], pa.string())})


def _read_parquet(content: Any) -> pa.Table:
    return pyarrow.parquet.read_table(io.BytesIO(content) if isinstance(content, bytes) else content)


class Format(NamedTuple):
    """A format's reader, of bytes (or of a path, where it is no text)."""

    read: Callable[[Any], pa.Table]
    is_text: bool = True


FORMATS = {
    ".csv": Format(_read_csv),
    ".tsv": Format(_read_tsv),
    ".jsonl": Format(_read_json),
    ".json": Format(_read_json),
    ".parquet": Format(_read_parquet, is_text=False),
    ".txt": Format(_read_lines),
}
