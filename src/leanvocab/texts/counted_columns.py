"""Columns that are counted as text: by themselves, in pairs, as chats, or as prompts with what follows them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from leanvocab.errors import DataError, shortened
from leanvocab.extras import is_instance
from leanvocab.texts.chats import ChatWriter, as_messages, is_message, parsed, template_values
from leanvocab.texts.text_columns import CHATS, TEXT_GROUPS, spelled
from leanvocab.texts.text_rows import Rows
from leanvocab.vocabulary.columns import Kind, listed

Chosen = str | tuple[str, str]
"""A column of texts, or two of pairs."""

_PROMPT, _FOLLOWING = "prompt", ("completion", "chosen", "rejected")
_BESIDES = ("tools", "chat_template_kwargs")


@dataclass(frozen=True)
class Texts:
    """Some texts, or pairs (`seconds`); `is_written`: by a chat template, which writes special tokens itself."""

    firsts: pa.LargeStringArray
    seconds: pa.LargeStringArray | None = None
    is_written: bool = False


Reader = Callable[[Rows, str], Iterator[Texts]]
"""Rows, and where they come from → their texts."""


def choose_readers(
    kinds: Mapping[str, Kind] | None, columns: Sequence[Chosen] | None, tokenizer: Any, where: str
) -> tuple[list[str], list[Reader]]:
    """The names of the columns that are counted, and what reads them: those that the user named, or those of usual names.

    Raises:
        DataError: a named column is absent, or there is none of the usual names; the message lists what is there.
    """
    if kinds is None:
        if columns is not None:
            raise DataError(f"columns={[*columns]!r} names columns, but the data{where} has none")
        return [], [_plain_reader(tokenizer)]
    chosen = _usual(kinds, where) if columns is None else list(columns)
    names = [name for column in chosen for name in ((column,) if isinstance(column, str) else column)]
    if missing := [name for name in names if name not in kinds]:
        raise DataError(f"found no column {missing[0]!r}{where}: the data has {listed(kinds)}")
    if columns is None and set(names) & {*_FOLLOWING, _PROMPT}:
        return names, [_prompt_reader(names, tokenizer)]
    return names, [_reader(column, tokenizer) for column in chosen]


def _usual(kinds: Mapping[str, Kind], where: str) -> list[Chosen]:
    """The columns of the usual names: chats first, prompts with what follows, then the first of texts and pairs."""
    columns = [*kinds]
    if chats := [name for chat in CHATS for name in spelled((chat,), columns)]:
        return [*chats]
    if prompts := [name for part in (_PROMPT, *_FOLLOWING) for name in spelled((part,), columns)]:
        return [*prompts]
    for group in TEXT_GROUPS:
        if there := spelled(group, columns):
            return [there if len(there) == 2 else there[0]]
    looked_for = ", ".join([*CHATS, _PROMPT, *_FOLLOWING, *(" + ".join(group) for group in TEXT_GROUPS)])
    raise DataError(
        f"found no column of texts{where}: looked for {looked_for}; the data has {listed(kinds)}. Name the columns with columns="
    )


def _reader(column: Chosen, tokenizer: Any) -> Reader:
    if not isinstance(column, str):
        return _pair_reader(*column)
    return lambda rows, where: _read(_values(rows, column, where), rows, f" of column {column!r}{where}", tokenizer)


def _read(values: Any, rows: Rows, where: str, tokenizer: Any) -> Iterator[Texts]:
    """Texts, or chats where the first value is a list of messages."""
    if not _holds_chats(values):
        yield Texts(as_texts(values, where))
        return
    writer = ChatWriter(_with_template(tokenizer, where))
    yield Texts(
        as_texts([_written(writer, chat, rows, at, where) for at, chat in enumerate(_plain(values))], where), None, True
    )


def _plain_reader(tokenizer: Any) -> Reader:
    """Rows without columns: texts, lists of texts, pairs (tuples of two), chats."""

    def read(rows: Rows, where: str) -> Iterator[Texts]:
        values = rows.columns[None]
        if isinstance(values, list) and any(_is_pair(value) for value in values):
            pairs = [value for value in values if _is_pair(value)]
            yield Texts(*(as_texts([pair[side] for pair in pairs], where) for side in (0, 1)))
            values = [value for value in values if not _is_pair(value)]
        yield from _read(values, rows, where, tokenizer)

    return read


def _values(rows: Rows, name: str, where: str) -> Any:
    if name not in rows.columns:
        there = ", ".join(map(repr, rows.columns))
        raise DataError(f"row {rows.first_row}{where} has no column {name!r}, as rows before it have: it has {there}")
    return rows.columns[name]


def _pair_reader(first: str, second: str) -> Reader:
    def read(rows: Rows, where: str) -> Iterator[Texts]:
        sides = [as_texts(_values(rows, name, where), f" of column {name!r}{where}") for name in (first, second)]
        if {len(side) for side in sides} != {rows.num_rows}:
            raise DataError(
                f"columns {first!r} and {second!r}{where} are no pairs: rows {rows.first_row} to "
                f"{rows.first_row + rows.num_rows - 1} have gaps, or several texts. Leave those rows out, or name the columns "
                "one by one"
            )
        yield Texts(*sides)

    return read


def _prompt_reader(names: Sequence[str], tokenizer: Any) -> Reader:
    """Prompts alone, and with each of what follows, joined as trainers tokenize them; what has no prompt, alone."""
    prompt = next((name for name in names if name.casefold() == _PROMPT), None)
    following = [name for name in names if name != prompt]

    def read(rows: Rows, where: str) -> Iterator[Texts]:
        prompts = _plain(_values(rows, prompt, where)) if prompt else [None] * rows.num_rows
        here = f" of column {prompt or following[0]!r}{where}"
        if not _holds_chats(prompts if prompt else _plain(_values(rows, following[0], where))):
            yield Texts(as_texts(prompts, here))
            for name in following:
                ends = _plain(_values(rows, name, where))
                joined = [end and (start or "") + end for start, end in zip(prompts, ends, strict=True)]
                yield Texts(as_texts(joined, f" of column {name!r}{where}"))
            return
        writer = ChatWriter(_with_template(tokenizer, here))
        starts = [as_messages(value) or [] for value in prompts]
        asked = [_written(writer, chat, rows, at, here, add_generation_prompt=True) for at, chat in enumerate(starts)]
        yield Texts(as_texts(asked, here), None, True)
        for name in following:
            here = f" of column {name!r}{where}"
            chats = [
                start + (as_messages(end) or [])
                for start, end in zip(starts, _plain(_values(rows, name, where)), strict=True)
            ]
            written = [_written(writer, chat, rows, at, here) for at, chat in enumerate(chats)]
            yield Texts(as_texts(written, here), None, True)

    return read


def _written(writer: ChatWriter, chat: Any, rows: Rows, at: int, where: str, **options: Any) -> str | None:
    """What the template writes of a chat, with the tools and values that stand beside it; None of an empty one."""
    messages = as_messages(chat)
    if not messages:
        return None
    if not isinstance(messages, list) or not all(map(is_message, messages)):
        raise DataError(
            f"row {rows.first_row + at}{where} holds {shortened(chat)}; expected a list of messages, {{'role': …, 'content': …}}"
        )
    tools, values = (_plain(rows.columns[name][at : at + 1])[0] if name in rows.columns else None for name in _BESIDES)
    try:
        writer.tools, writer.values = parsed(tools) or None, template_values(values, writer.tokenizer)
        return writer.written(messages, **options)
    except DataError as error:
        raise DataError(f"row {rows.first_row + at}{where}: {error}") from error


def _with_template(tokenizer: Any, where: str) -> Any:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"found chats{where}, and the tokenizer has no chat template to write them with; set tokenizer.chat_template, or "
            "pass texts"
        )
    return tokenizer


def as_texts(values: Any, where: str) -> pa.LargeStringArray:
    """All strings in an Arrow array or nested lists, one after the other; nulls are left out.

    Raises:
        DataError: something else stands there.
    """
    if not is_instance(values, "pyarrow", "Array", "ChunkedArray"):
        try:
            values = pa.array(list(_flat(values)), pa.large_string())
        except (pa.ArrowException, TypeError, UnicodeError) as error:
            raise DataError(f"expected texts{where}: {error}") from error
    values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    while isinstance(values, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):
        values = values.flatten()
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if str(values.type) not in ("string", "large_string", "string_view", "null"):
        raise DataError(f"expected texts{where}, found {values.type}")
    return values.cast(pa.large_string()).drop_null()  # views of strings cannot be filtered


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value


def _plain(values: Any) -> list[Any]:
    return values.to_pylist() if is_instance(values, "pyarrow", "Array", "ChunkedArray") else list(values)


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(text, str) for text in value)


def _holds_chats(values: Any) -> bool:
    """True where the first value is a chat: a list of messages, or JSON of one."""
    if is_instance(values, "pyarrow", "Array", "ChunkedArray"):
        values = (value.as_py() for value in values.slice(0, 1000))
    first = next((value for value in values if value), None)
    if isinstance(first, str) and not first.lstrip().startswith("["):
        return False
    chat = as_messages(first)
    return isinstance(chat, list) and bool(chat) and all(map(is_message, chat))
