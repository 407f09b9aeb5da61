"""Table 1: tokens that never occur in a corpus: any folder of text, data set or stream, read in constant memory."""

import hashlib
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm  # type: ignore[import-untyped]

from leanvocab.errors import DataError
from leanvocab.vocabulary.counts import TokenCounts, count_tokens
from reproduction.cells import Cell, make_cell
from reproduction.grid import Entry, Grid, Result, cell_grid
from reproduction.paper import GPT2, Paper
from reproduction.sources import NotHereError, Sources

WIKIPEDIA = ("wikimedia/wikipedia", "20231101.en")
"""Data set on the hub that the paper's dump of 20 GB is closest to."""
ROBERTA = "FacebookAI/roberta-base"  # the pieces of GPT-2 in another order
_BLOCK_CHARACTERS = 1 << 14
_LONGEST_BLOCK = 1 << 20  # a text without line ends is cut all the same
_BLOCKS_A_BATCH = 64
_SAMPLE_BYTES = 1 << 13
_PACKAGE_SUFFIXES = (".py", ".pyi", ".md", ".rst", ".txt")
_SHOWN = 20
_TABLE = "table1_unused_tokens"


@dataclass
class Corpus:
    """Text to read once. `num_bytes` (UTF-8) and `num_texts` count what has been read so far."""

    label: str
    texts: Iterable[str]
    is_wikipedia: bool = False
    num_bytes: int = 0
    num_texts: int = 0
    skipped: list[str] = field(default_factory=list)

    def blocks(self, max_bytes: int | None = None) -> Iterator[str]:
        """The texts in blocks of about 16,000 characters, up to so many bytes.

        A block ends where a line ends and the next does not start with a space, so that no token is cut in two.
        """
        for text in self.texts:
            self.num_texts += 1
            for block in _blocks(text):
                self.num_bytes += len(block.encode("utf-8", "surrogatepass"))
                yield block
                if max_bytes is not None and self.num_bytes >= max_bytes:
                    return


def _blocks(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _BLOCK_CHARACTERS:
        end = start + _BLOCK_CHARACTERS
        limit = min(start + _LONGEST_BLOCK, len(text))
        while (end := text.find("\n", end, limit) + 1) and end < limit and text[end].isspace():
            pass
        end = end or limit
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


# ---------------------------------------------------------------------------------------------- kinds of corpora


def folder_corpus(folder: Path, suffixes: tuple[str, ...] | None = None, label: str | None = None) -> Corpus:
    """Every text file below a folder (those of some suffixes alone, if given). Binary files are skipped and counted.

    Raises:
        DataError: there is no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"the folder of text {folder} does not exist")
    corpus = Corpus(label or f"the folder {folder.name}", ())
    corpus.texts = _file_texts([folder], suffixes, corpus.skipped)
    return corpus


def packages_corpus() -> Corpus:
    """The text that comes with Python and its installed packages: source code and documentation."""
    paths = sysconfig.get_paths()
    folders = [Path(paths[name]) for name in ("purelib", "stdlib")]
    corpus = Corpus(f"the installed Python packages ({', '.join(_PACKAGE_SUFFIXES)})", ())
    # In an order that mixes all packages, so that the first megabytes are a sample of them.
    corpus.texts = _file_texts(folders, _PACKAGE_SUFFIXES, corpus.skipped, key=_mixed)
    return corpus


def stream_corpus(lines: Iterable[str], label: str = "standard input") -> Corpus:
    """Lines as they come, gathered to blocks; never more than one block is held."""
    return Corpus(label, _gathered(lines))


def dataset_corpus(name: str, config_name: str | None, split: str, column: str) -> Corpus:
    """A data set of the hub, or files of a type that it knows, streamed.

    Raises:
        DataError: it is not there, or has no such column.
    """
    import datasets

    where = f"{name}{f' ({config_name})' if config_name else ''}, split {split}"
    try:
        rows = datasets.load_dataset(name, config_name, split=split, streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"the data set {where} cannot be had: {reason}") from error
    if rows.column_names and column not in rows.column_names:
        raise DataError(f"the data set {where} has no column {column!r}; it has {', '.join(rows.column_names)}")
    return Corpus(where, (row[column] or "" for row in rows), is_wikipedia=(name, config_name) == WIKIPEDIA)


def _mixed(path: Path) -> str:
    return hashlib.sha256(f"{path.parent.name}/{path.name}".encode(errors="replace")).hexdigest()


def _file_texts(
    folders: Iterable[Path], suffixes: tuple[str, ...] | None, skipped: list[str], key: Callable[[Path], Any] = str
) -> Iterator[str]:
    for folder in folders:
        for path in sorted(folder.rglob("*"), key=key):
            if (suffixes is None or path.suffix in suffixes) and path.is_file():
                yield from _file_text(path, skipped)


def _file_text(path: Path, skipped: list[str]) -> Iterator[str]:
    """A file in pieces of whole lines, so that a file of any size can be read."""
    with path.open("rb") as file:
        if b"\0" in file.read(_SAMPLE_BYTES):
            skipped.append(path.name)
            return
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        yield from _gathered(iter(lambda: file.readline(_LONGEST_BLOCK), ""))


def _gathered(lines: Iterable[str]) -> Iterator[str]:
    held: list[str] = []
    size = 0
    for line in lines:
        if size >= _BLOCK_CHARACTERS and not line[:1].isspace():
            yield "".join(held)
            held, size = [], 0
        held.append(line)
        size += len(line)
    if held:
        yield "".join(held)


# ------------------------------------------------------------------------------------------------------ counting


def count_corpus(
    corpus: Corpus, tokenizer: Any, max_bytes: int | None = None, progress: bool | None = None
) -> TokenCounts:
    """Counts of each token in a corpus; no special tokens are added and nothing is cut."""
    disable = None if progress is None else not progress
    with tqdm(unit="B", unit_scale=True, desc=f"reading {corpus.label}", disable=disable) as bar:
        ids = _token_ids(corpus, corpus.blocks(max_bytes), tokenizer, bar.update)
        return count_tokens(ids, full_size=len(tokenizer), progress=False)


def _token_ids(
    corpus: Corpus, blocks: Iterator[str], tokenizer: Any, advance: Callable[[int], Any]
) -> Iterator[list[int]]:
    before = 0
    while batch := list(islice(blocks, _BLOCKS_A_BATCH)):
        encoded = tokenizer(
            batch,
            add_special_tokens=False,
            truncation=False,
            verbose=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        yield from encoded["input_ids"]
        advance(corpus.num_bytes - before)
        before = corpus.num_bytes


def unused_tokens(counts: TokenCounts, tokenizer: Any) -> list[dict[str, Any]]:
    """The tokens that were not counted, with their ids, in the order of ids."""
    special = set(tokenizer.all_special_ids)
    return [
        {"token_id": token_id, "token": _readable(tokenizer, token_id), "special": token_id in special}
        for token_id in range(len(tokenizer))
        if counts.counts[token_id] == 0
    ]


def _readable(tokenizer: Any, token_id: int) -> str:
    """A token as text; as the tokenizer's own piece where its bytes alone are no text."""
    text = str(tokenizer.decode([token_id], clean_up_tokenization_spaces=False))
    return str(tokenizer.convert_ids_to_tokens(token_id)) if not text or "\ufffd" in text else text


# ------------------------------------------------------------------------------------------------------- Table 1


def table1(
    sources: Sources,
    corpus: Corpus,
    tokenizer_name: str = GPT2,
    *,
    max_bytes: int | None = None,
    progress: bool | None = None,
) -> Result:
    """Tokens that never occur in a corpus, and the paper's five examples among them."""
    tokenizer = sources.tokenizer(tokenizer_name)
    counts = count_corpus(corpus, tokenizer, max_bytes, progress)
    if counts.num_tokens == 0:
        raise DataError(f"there is no text in {corpus.label}")
    unused = unused_tokens(counts, tokenizer)
    is_whole = corpus.is_wikipedia and max_bytes is None
    cells = (*_id_cells(sources), *_occurrence_cells(sources, tokenizer, counts, corpus, is_whole))
    short = tokenizer_name.rpartition("/")[2]
    notes = (
        f"Read {corpus.num_bytes / 1e6:,.1f} MB of text from {corpus.label}: {counts.num_tokens:,} tokens of {short}, "
        f"{len(counts.token_ids):,} of its {len(tokenizer):,} tokens; {len(unused):,} never occur (all of them are listed "
        "in table1_never_used.csv).",
        *([f"{len(corpus.skipped):,} files that are no text were skipped."] if corpus.skipped else []),
        *(() if is_whole else ("The paper read 20 GB of English Wikipedia and found nearly 200 unused tokens.",)),
    )
    grids = (
        cell_grid("Table 1: ids, and occurrences in Wikipedia", "Token", cells, {"token_id": "#"}),
        _unused_grid(unused, short),
    )
    title = "Table 1: tokens that never occur in a corpus"
    return Result("table1", title, grids, cells, notes, {"table1_never_used": unused})


def _id_cells(sources: Sources) -> list[Cell]:
    """Whose vocabulary has the printed ids? Both have the same pieces, in another order."""
    cells = []
    for variant, name in (("", ROBERTA), ("gpt2", GPT2)):
        reason = "" if variant else "ids of RoBERTa's vocabulary"
        tokenizer = None
        try:
            tokenizer = sources.tokenizer(name)
        except NotHereError as error:
            reason = str(error)
        for token, published in _printed(sources.paper).items():
            found = None if tokenizer is None else _find_id(tokenizer, token)
            measured = None if found is None else float(found)
            cells.append(
                make_cell(
                    _TABLE, token, "token_id", float(published), measured, reason=reason, decimals=0, variant=variant
                )
            )
    return cells


def _occurrence_cells(
    sources: Sources, tokenizer: Any, counts: TokenCounts, corpus: Corpus, is_whole: bool
) -> list[Cell]:
    cells = []
    for token in _printed(sources.paper):
        found = _find_id(tokenizer, token)
        number = None if found is None else int(counts.counts[found])
        reason = "" if is_whole else f"Wikipedia is not at hand; {number} in {corpus.label}"
        measured = float(number) if is_whole and number is not None else None
        cells.append(make_cell(_TABLE, token, "occurrences", 0.0, measured, reason=reason, decimals=0))
    return cells


def _printed(paper: Paper) -> dict[str, int]:
    return {line["token"]: int(line["token_id"]) for line in paper.rows(_TABLE)}


def _find_id(tokenizer: Any, token: str) -> int | None:
    """The id of a token that is printed without its leading space, if it has one."""
    vocabulary = tokenizer.get_vocab()
    return next((int(vocabulary[piece]) for piece in (token, f"Ġ{token}") if piece in vocabulary), None)


def _unused_grid(unused: list[dict[str, Any]], tokenizer: str) -> Grid:
    longest = sorted(unused, key=lambda each: (-len(each["token"]), each["token_id"]))[:_SHOWN]
    rows = tuple((f"{each['token_id']:,}", (Entry(repr(each["token"])),)) for each in longest)
    title = f"The {len(rows)} longest of {len(unused):,} tokens of {tokenizer} that never occur"
    return Grid(title, ("#", "Token"), rows)


def open_corpus(
    text: str | None, packages: bool, dataset: str | None, config_name: str | None, split: str, column: str
) -> Corpus:
    """The corpus that the command's options name: by default Wikipedia, from the hub.

    Raises:
        DataError: more than one is named, or it cannot be had.
    """
    if sum((text is not None, packages, dataset is not None)) > 1:
        raise DataError("name one corpus: --text, --packages or --dataset")
    if packages:
        return packages_corpus()
    if text == "-":
        with suppress(AttributeError):
            sys.stdin.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
        return stream_corpus(sys.stdin)
    if text is not None:
        return folder_corpus(Path(text))
    if dataset is None:
        return dataset_corpus(*WIKIPEDIA, split, column)
    return dataset_corpus(dataset, config_name, split, column)
