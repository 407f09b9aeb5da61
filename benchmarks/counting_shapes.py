"""Counting beside one `np.bincount` over the same ids, flat and as int64: dtypes, shapes and derived data sets.

Rows of 128 tokens and ragged rows, int32 and int64, mapped from disk; a shuffled one, a split, and labels with masked prompts.
The bar is 0.8 of bincount's speed, 1.25 of its time, for data sets as they lie on disk, and 64 MiB of memory. Memory is
measured in a fresh process that counts for the first time.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks._command import About, finish, parser, read_options
from benchmarks._results import OURS, Figure, Result, Series, beside_ours
from benchmarks._rounds import Budget, run_child, run_module, take_turns
from benchmarks._token_data import ROW_LENGTH, load_rows, write_ids, write_rows

ABOUT = About(
    name="counting_shapes",
    measures="Counting ids of every dtype and shape, and derived data sets: time, and memory of a fresh process.",
    beside="np.bincount on the flat ids as int64",
    limit="np.bincount on one core; 64 MiB",
    budget_seconds=80,
)
BINCOUNT = "limit: np.bincount, flat int64"
ONE_WORKER = "leanvocab, one worker"
CASES = [(rows, dtype) for rows in ("equal", "ragged") for dtype in ("int32", "int64")]
DERIVED = ["shuffled", "split", "labels"]


def data_and_ids(folder: Path, rows: str, derived: str) -> tuple[Any, Any]:
    """A data set as it lies on disk, or one derived from it; and its flat ids as bincount needs them."""
    import numpy as np

    ids = np.load(folder / "ids.npy").astype(np.int64)
    ids = ids[: len(ids) // ROW_LENGTH * ROW_LENGTH] if rows == "equal" else ids
    data = load_rows(folder / "data")
    if derived == "shuffled":
        return data.shuffle(seed=0, keep_in_memory=True), ids
    if derived == "split":
        data = data.train_test_split(0.2, seed=0)["train"]
        selected = data.with_format("arrow")[:]["input_ids"]
        return data, np.concatenate([chunk.flatten().to_numpy() for chunk in selected.chunks]).astype(np.int64)
    if derived == "labels":  # the first half of each row is a prompt, masked out
        masked = np.where(np.arange(len(ids)) % ROW_LENGTH < ROW_LENGTH // 2, -100, ids).astype(np.int32)
        data = {"labels": masked[: len(ids) // ROW_LENGTH * ROW_LENGTH].reshape(-1, ROW_LENGTH)}
        return data, data["labels"].reshape(-1).astype(np.int64) + 100
    return data, ids


def time_case(folder: str, rows: str, derived: str, rounds: str, seconds: str) -> dict[str, list[float]]:
    """Seconds of bincount, of `count_tokens` as it comes, and with one worker, in turn."""
    import numpy as np

    from leanvocab import count_tokens

    data, ids = data_and_ids(Path(folder), rows, derived)
    counted = count_tokens(data).counts
    offset = 100 if derived == "labels" else 0
    assert np.array_equal(counted, np.bincount(ids, minlength=len(counted) + offset)[offset:])
    programs = {
        OURS: lambda: count_tokens(data, progress=False),
        ONE_WORKER: lambda: count_tokens(data, num_workers=1, progress=False),
        BINCOUNT: lambda: np.bincount(ids),
    }
    return take_turns(programs, int(rounds), Budget(float(seconds)))


def memory_of(folder: str, in_memory: str) -> dict[str, int]:
    """Growth of this process while it counts, which it does for the first time."""
    from leanvocab import count_tokens
    from leanvocab.reports.peak import record_peak

    dataset = load_rows(Path(folder, "data"), in_memory=in_memory == "held")
    with record_peak(0.0005) as peak:
        count_tokens(dataset, progress=False)
    return {"anonymous": peak.anonymous_growth_bytes, "resident": peak.rss_growth_bytes}


def make_data(folder: str, num_tokens: str, vocabulary_size: str, rows: str, dtype: str) -> None:
    write_ids(Path(folder, "ids.npy"), int(num_tokens), int(vocabulary_size), dtype)
    write_rows(Path(folder, "data"), Path(folder, "ids.npy"), rows, dtype)


def child(what: str, *rest: str) -> Any:
    programs: dict[str, Callable[..., Any]] = {"make": make_data, "time": time_case, "memory": memory_of}
    return programs[what](*rest)


def run_case(options: argparse.Namespace, vocabulary_size: int, rows: str, dtype: str, seconds: float) -> Iterator[Any]:
    """Series and figures of one data set."""
    name = f"{vocabulary_size:,} rows, {rows} {dtype}"
    module = "benchmarks.counting_shapes"
    derived = ["", *DERIVED] if (rows, dtype) == ("ragged", "int32") else [""]
    with tempfile.TemporaryDirectory() as folder:
        run_child(module, "make", folder, options.num_tokens, vocabulary_size, rows, dtype)
        for which in derived:
            case = f"{name} {which}".strip()
            found = run_child(module, "time", folder, rows, which, options.rounds or 9, seconds / 2 / len(derived))
            yield from beside_ours("time", case, "s", found)
            pairs = zip(found[OURS], found[BINCOUNT], strict=True)
            ratio = statistics.median(ours / its for ours, its in pairs)
            yield Figure(f"time / bincount's, {case}", ratio, "×", None if which else 1.25)
        if dtype == "int32":
            mapped, held = (run_child(module, "memory", folder, kind) for kind in ("mapped", "held"))
            yield Figure(f"anonymous memory, data mapped, {name}", mapped["anonymous"], "bytes", 64 * 2**20)
            yield Figure(f"resident memory, data held in memory, {name}", held["resident"], "bytes", 64 * 2**20)


def measure(options: argparse.Namespace) -> Iterator[Result]:
    budget = Budget(options.seconds)
    sizes = options.vocabulary_sizes
    cases = CASES if options.size == "full" else [("equal", "int64"), ("ragged", "int32")]
    found: list[Any] = []
    for number, (size, (rows, dtype)) in enumerate(both := [(size, case) for size in sizes for case in cases]):
        found += run_case(options, size, rows, dtype, budget.left / (len(both) - number))
    yield Result(
        ABOUT.name,
        f"Counting {options.num_tokens:,} tokens of every dtype and shape",
        "zipf",
        "cpu",
        tuple(each for each in found if isinstance(each, Series)),
        tuple(each for each in found if isinstance(each, Figure)),
        (),
        budget.spent,
        options.seconds,
    )


def main(arguments: list[str] | None = None) -> list[Result]:
    made = parser(ABOUT)
    made.add_argument("--num-tokens", type=int)
    made.add_argument("--vocabulary-sizes", type=int, nargs="+")
    options = read_options(made, arguments)
    small = options.size == "small"
    options.num_tokens = options.num_tokens or (20_000 if small else 50_000_000)
    options.vocabulary_sizes = options.vocabulary_sizes or ([1_000] if small else [50_257, 250_002])
    return finish(measure(options), options)


if __name__ == "__main__":
    run_module(child, main)
