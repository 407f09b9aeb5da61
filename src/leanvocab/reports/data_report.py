"""Numbers of a report on one's own data: coverage, frequent tokens, scripts, unused ids, splits, and what a run made of them."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvocab.errors import VocabularyError
from leanvocab.reports.memory_estimate import MemoryEstimate
from leanvocab.vocabulary.counts import TokenCounts
from leanvocab.vocabulary.coverage import counts_by_rank, rows_to_cover
from leanvocab.vocabulary.scripts import script_of, token_texts

_CURVE_POINTS = 200
_MOST_FREQUENT = 20
_MOST_STRETCHES = 10
_MOST_UNSEEN = 15


@dataclass(frozen=True)
class TokenUse:
    """A token, None where there is no tokenizer or it has none of this id, and how often it occurs."""

    token_id: int
    token: str | None
    count: int


@dataclass(frozen=True)
class ScriptUse:
    """The tokens of a script: how often they occur, and how many rows of the vocabulary do and do not."""

    script: str
    num_tokens: int
    used_rows: int
    unused_rows: int


@dataclass(frozen=True)
class UnusedStretch:
    """Neighbouring ids that do not occur, the last one included."""

    first_id: int
    last_id: int
    num_rows: int
    first_token: str | None
    last_token: str | None


@dataclass(frozen=True)
class SplitUse:
    """A split: its tokens and rows, and those of them that the training split lacks."""

    num_tokens: int
    used_rows: int
    unseen_tokens: int
    unseen_rows: int
    most_frequent_unseen: tuple[TokenUse, ...]


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """A fine-tuning: (step, loss) as logged, (step, scores) of each validation while it ran, and the scores of its result.

    `seconds` are those of its parts, `peak_bytes` the memory of the process, and of a GPU where there is one, at its peak.
    """

    num_steps: int
    losses: tuple[tuple[int, float], ...]
    validations: tuple[tuple[int, Mapping[str, float]], ...]
    scores: Mapping[str, float]
    seconds: Mapping[str, float]
    peak_bytes: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """All numbers of a report. `leanvocab.reports.html_report.write_report` makes a page of it.

    `curve`: (rank, occurrences of the token at that rank, tokens of all ranks up to it), some 200 ranks by equal ratios.
    `rows_to_cover[percent]`: the fewest rows whose tokens make up that share of all. `outside_tokens` were counted at ids
    beyond the table, which a model looks up elsewhere, and are in no other number. `kept_rows` is None without a vocabulary.
    """

    title: str
    full_rows: int
    kept_rows: int | None
    num_tokens: int
    outside_tokens: int
    used_rows: int
    once_rows: int
    rows_to_cover: Mapping[float, int]
    curve: tuple[tuple[int, int, int], ...]
    most_frequent: tuple[TokenUse, ...]
    scripts: tuple[ScriptUse, ...]
    unused_stretches: tuple[UnusedStretch, ...]
    training_split: str
    splits: Mapping[str, SplitUse]
    memory: MemoryEstimate | None = None
    run: RunReport | None = None
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Everything above as plain values, ready for JSON."""
        return asdict(self) | {
            "rows_to_cover": {f"{percent:g}": rows for percent, rows in self.rows_to_cover.items()},
            "memory": self.memory and self.memory.to_dict(),
        }


def report_on_data(
    counts: Mapping[str, TokenCounts],
    *,
    full_size: int,
    tokenizer: Any = None,
    title: str = "Use of a vocabulary",
    training_split: str | None = None,
    **others: Any,
) -> DataReport:
    """Makes a report of the counts of each split.

    Args:
        counts: split → its counts.
        full_size: rows of the full vocabulary.
        tokenizer: of transformers; without it tokens have no names and no scripts.
        training_split: by default `train`, or else the first.
        others: fields of the report that are not counted: kept_rows, memory, run, notes.
    """
    if training_split is None:
        training_split = "train" if "train" in counts else next(iter(counts))
    by_split = {name: _of_rows(of.counts, full_size) for name, of in counts.items()}
    total = sum(by_split.values(), np.zeros(full_size, np.int64))
    texts, why_none = _texts(tokenizer)
    name = _namer(tokenizer, texts)
    return DataReport(
        title=title,
        outside_tokens=sum(of.num_tokens for of in counts.values()) - int(total.sum()),
        scripts=() if why_none else _scripts(total, texts, name),
        training_split=training_split,
        splits={split: _split(of, by_split[training_split], name) for split, of in by_split.items()},
        **_use(total, name),
        **{"kept_rows": None} | others | {"notes": (*why_none, *others.get("notes", ()))},
    )


def _use(counts: NDArray[np.int64], name: Callable[[int], str | None]) -> dict[str, Any]:
    """Fields of the report that all splits together have."""
    return {
        "full_rows": len(counts),
        "num_tokens": int(counts.sum()),
        "used_rows": int((counts > 0).sum()),
        "once_rows": int((counts == 1).sum()),
        "rows_to_cover": rows_to_cover(counts),
        "curve": _curve(counts),
        "most_frequent": _most_frequent(counts, name, _MOST_FREQUENT),
        "unused_stretches": _unused_stretches(counts, name),
    }


def _of_rows(counts: NDArray[np.int64], full_size: int) -> NDArray[np.int64]:
    """Counts of the rows that there are, one each."""
    return np.pad(counts[:full_size], (0, max(full_size - len(counts), 0)))


# --- tokens -----------------------------------------------------------------------------------------------------------


def _texts(tokenizer: Any) -> tuple[dict[int, str | bytes], tuple[str, ...]]:
    """Texts of tokens by id, and a sentence where there are none."""
    if tokenizer is None:
        return {}, ("Tokens have no names and no scripts here: the data were counted without a tokenizer.",)
    try:
        return token_texts(tokenizer), ()
    except VocabularyError as error:
        return {}, (f"Tokens have no scripts here: {error}.",)


def _namer(tokenizer: Any, texts: Mapping[int, str | bytes]) -> Callable[[int], str | None]:
    """A function: id → its token, written as the tokenizer does, or as text where that writes bytes."""

    def name(token_id: int) -> str | None:
        text = texts.get(token_id)
        if isinstance(text, bytes):
            return text.decode("utf-8", "backslashreplace")
        try:
            token = tokenizer.convert_ids_to_tokens(token_id)
        except Exception:  # of an id that it does not know: tokenizers in Python raise whatever they meet
            return None
        return token if isinstance(token, str) else None

    return name if tokenizer is not None else lambda token_id: None


def _most_frequent(counts: NDArray[np.int64], name: Callable[[int], str | None], most: int) -> tuple[TokenUse, ...]:
    """The most frequent tokens; of equally frequent ones the lower ids come first."""
    ids = np.argsort(-counts, kind="stable")[:most]
    return tuple(TokenUse(i, name(i), int(counts[i])) for i in ids[counts[ids] > 0].tolist())


# --- the vocabulary ---------------------------------------------------------------------------------------------------


def _curve(counts: NDArray[np.int64]) -> tuple[tuple[int, int, int], ...]:
    by_rank = counts_by_rank(counts)
    if not len(by_rank):
        return ()
    ranks = np.unique(np.geomspace(1, len(by_rank), _CURVE_POINTS).round().astype(np.int64))
    return tuple(zip(ranks.tolist(), by_rank[ranks - 1].tolist(), np.cumsum(by_rank)[ranks - 1].tolist(), strict=True))


def _scripts(
    counts: NDArray[np.int64], texts: Mapping[int, str | bytes], name: Callable[[int], str | None]
) -> tuple[ScriptUse, ...]:
    """Scripts by the tokens in them, the most frequent first; then by rows."""
    of_texts = {token_id: script_of(text) for token_id, text in texts.items()}
    named = [of_texts.get(i) or ("no token" if name(i) is None else "added tokens") for i in range(len(counts))]
    scripts, of_rows = np.unique(np.array(named), return_inverse=True)
    num_tokens = np.zeros(len(scripts), np.int64)
    np.add.at(num_tokens, of_rows, counts)
    used = np.bincount(of_rows[counts > 0], minlength=len(scripts))
    unused = np.bincount(of_rows[counts == 0], minlength=len(scripts))
    uses = map(ScriptUse, scripts.tolist(), num_tokens.tolist(), used.tolist(), unused.tolist())
    return tuple(sorted(uses, key=lambda use: (-use.num_tokens, -use.unused_rows, use.script)))


def _unused_stretches(counts: NDArray[np.int64], name: Callable[[int], str | None]) -> tuple[UnusedStretch, ...]:
    """The longest stretches of unused ids, the longest first."""
    used = np.concatenate(([-1], np.flatnonzero(counts), [len(counts)]))
    lengths = np.diff(used) - 1
    longest = np.argsort(-lengths, kind="stable")[:_MOST_STRETCHES]
    return tuple(
        UnusedStretch(first, last, last - first + 1, name(first), name(last))
        for first, last in ((int(used[at]) + 1, int(used[at + 1]) - 1) for at in longest[lengths[longest] > 0])
    )


def _split(counts: NDArray[np.int64], training: NDArray[np.int64], name: Callable[[int], str | None]) -> SplitUse:
    unseen = np.where(training == 0, counts, 0)
    return SplitUse(
        num_tokens=int(counts.sum()),
        used_rows=int((counts > 0).sum()),
        unseen_tokens=int(unseen.sum()),
        unseen_rows=int((unseen > 0).sum()),
        most_frequent_unseen=_most_frequent(unseen, name, _MOST_UNSEEN),
    )
