"""Trimming a checkpoint on disk beside the least that it takes: the base hashed once, and what stays copied.

A checkpoint of XLM-R base's size (1.1 GB, random weights) of which 6,000 rows stay. leanvocab's `export_trimmed` digests all
that it reads, and syncs what it writes; the limit is sha256 of the file, by one thread, and a copy of the kept bytes, synced;
safetensors loads all, selects and saves. They take turns on one disk, each into a new folder, the base in the page cache.
Memory is the growth of anonymous bytes in a process of its own. The tokenizer is no part of it: its files are read whole.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks._command import About, finish, parser, read_options
from benchmarks._models import SHAPES, kept_ids, save_model
from benchmarks._results import OURS, Figure, Result, Series, beside_ours
from benchmarks._rounds import Budget, run_child, run_module, seconds_on_disk, take_turns
from leanvocab.files.headers import read_weights
from leanvocab.trimming.export import export_trimmed
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

ABOUT = About(
    name="trimming",
    measures="Trimming a checkpoint on disk to 6,000 rows: time and memory, without its tokenizer.",
    beside="safetensors load, select and save",
    limit="hashing the base and copying what stays",
    budget_seconds=90,
)
MODULE = "benchmarks.trimming"
LIMIT, SAFETENSORS = "limit: sha256 of the base, copy of the rest", "safetensors load, select and save"
_TABLE = "word_embeddings.weight"


def _is_table(name: str) -> bool:
    return name.endswith(_TABLE)


def with_leanvocab(folder: Path, target: Path) -> None:
    size = json.loads((folder / "size.json").read_text())
    vocabulary = PartialVocabulary(kept_ids(size), SHAPES[size].rows)
    export_trimmed(folder / "base", vocabulary, target, tokenizer=False, progress=False)


def with_limit(folder: Path, target: Path) -> None:
    target.mkdir()
    path = folder / "base" / "model.safetensors"
    with path.open("rb") as source:
        hashlib.file_digest(source, "sha256")
    ids = kept_ids(json.loads((folder / "size.json").read_text()))
    with (target / "model.safetensors").open("wb") as written, path.open("rb", buffering=0) as source:
        for name, (_, entry) in read_weights(folder / "base").tensors.items():
            if _is_table(name):
                rows = np.memmap(path, np.uint8, "r", entry.start, (entry.shape[0], entry.row_bytes))
                written.write(rows[ids].tobytes())
            else:
                written.flush()
                source.seek(entry.start)
                shutil.copyfileobj(_Part(source, entry.num_bytes), written, 8 << 20)
        written.flush()
        os.fsync(written.fileno())


class _Part:
    """So many bytes of a file, from where it is."""

    def __init__(self, source: object, left: int) -> None:
        self._source, self._left = source, left

    def read(self, most: int) -> bytes:
        block: bytes = self._source.read(min(most, self._left))  # type: ignore[attr-defined]
        self._left -= len(block)
        return block


def with_safetensors(folder: Path, target: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    ids = torch.from_numpy(kept_ids(json.loads((folder / "size.json").read_text())))
    tensors = load_file(folder / "base" / "model.safetensors")
    cut = {name: tensor.index_select(0, ids) if _is_table(name) else tensor for name, tensor in tensors.items()}
    target.mkdir()
    save_file(cut, target / "model.safetensors", metadata={"format": "pt"})
    subprocess.run(["sync", str(target / "model.safetensors")], check=True)


PROGRAMS: dict[str, Callable[[Path, Path], None]] = {
    OURS: with_leanvocab,
    SAFETENSORS: with_safetensors,
    LIMIT: with_limit,
}


def make_folder(folder: Path, size: str) -> None:
    save_model(size, folder / "base")
    (folder / "size.json").write_text(json.dumps(size))


def time_all(folder: Path, rounds: int, budget: Budget) -> dict[str, list[float]]:
    """Seconds of each program, in turn; the base is in the page cache for all."""

    def measured(work: Callable[[], None]) -> float:
        return seconds_on_disk(work, folder / "trimmed")

    for who in PROGRAMS:  # warms up; all must write the same weights
        measured(lambda who=who: check(folder, who))  # type: ignore[misc]
    programs = {who: lambda run=run: run(folder, folder / "trimmed") for who, run in PROGRAMS.items()}
    return take_turns(programs, rounds, budget, measured)


def check(folder: Path, who: str) -> None:
    """Fails where a program has other rows than those that were to stay."""
    PROGRAMS[who](folder, folder / "trimmed")
    if who == LIMIT:
        return
    ids = kept_ids(json.loads((folder / "size.json").read_text()))
    parts = []
    for where in ("base", "trimmed"):
        (entry,) = (e for name, (_, e) in read_weights(folder / where).tensors.items() if _is_table(name))
        path = folder / where / "model.safetensors"
        parts.append(np.memmap(path, np.uint8, "r", entry.start, (entry.shape[0], entry.row_bytes)))
    assert np.array_equal(parts[0][ids], parts[1]), f"{who} kept other rows"


def child(who: str, folder: str) -> int:
    """Growth of this process's anonymous bytes while it trims, in the second run: the first has built the model's class."""
    from leanvocab.reports.peak import record_peak

    path = Path(folder)
    PROGRAMS[who](path, path / "trimmed")
    shutil.rmtree(path / "trimmed")
    with record_peak() as peak:
        PROGRAMS[who](path, path / "trimmed")
    shutil.rmtree(path / "trimmed")
    return peak.anonymous_growth_bytes


def measure(options: argparse.Namespace) -> Iterator[Result]:
    size, budget = "tiny" if options.size == "small" else "xlm-r-base", Budget(options.seconds)
    with tempfile.TemporaryDirectory(dir=options.folder) as made:
        folder = Path(made)
        make_folder(folder, size)
        os.sync()
        times = time_all(folder, options.rounds or 5, Budget(budget.left * 0.7))
        series = beside_ours("time", "trimming, synced", "s", times)
        ours = (float(run_child(MODULE, OURS, folder)),)
        series.append(Series("anonymous memory, growth", "trimming", OURS, ours, "bytes"))
        grown = (float(run_child(MODULE, SAFETENSORS, folder)),)
        series.append(Series("anonymous memory, growth", "trimming", SAFETENSORS, grown, "bytes", ours))
        ratio = statistics.median(a / b for a, b in zip(times[OURS], times[LIMIT], strict=True))
        figures = (
            Figure("trimming / hashing the base and copying the rest, median of pairs", ratio, "×", 1.3),
            Figure("trimming: anonymous memory", ours[0], "bytes", 150e6),
        )
    title = f"Trimming on disk: {size}"
    yield Result(ABOUT.name, title, size, "cpu", tuple(series), figures, (), budget.spent, options.seconds)


def main(arguments: list[str] | None = None) -> list[Result]:
    made = parser(ABOUT)
    made.add_argument("--folder", type=Path, help="on the disk to measure; the temporary folder by default")
    options = read_options(made, arguments)
    return finish(measure(options), options)


if __name__ == "__main__":
    run_module(child, main)
