"""Counting tokens beside the authors' counter, `datasets.map` with numpy, polars, and `np.bincount` on the flat ids.

Data sets of 10⁶ to 10⁹ tokens (int32, as tokenizers give them; ids by Zipf's law) in rows of 128 and in ragged rows of 1 to
255 are read from disk, mapped. Every program gives the same counts, which is checked. They take turns in one process, which
has read the data before; memory is that of a fresh process that counts for the first time. The authors' counter takes rows
of equal length alone; it runs as it comes, and with the batch size and number of processes that were fastest for it here.
"""

import argparse
import functools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks._command import About, finish, parser, read_options
from benchmarks._peers import AUTHORS, NO_AUTHORS_CODE, authors_module, installed
from benchmarks._results import OURS, Figure, Result, Series, beside_ours
from benchmarks._rounds import Budget, run_child, run_module, seconds_of, take_turns
from benchmarks._token_data import ROW_LENGTH, load_rows, write_ids, write_rows

ABOUT = About(
    name="counting",
    measures="Counting 10⁶ to 10⁹ tokens in equal-length and ragged rows: time and memory.",
    beside="the authors' token counter, datasets.map with numpy, polars, np.bincount on the flat ids",
    limit="one pass over the ids at memory bandwidth",
    budget_seconds=330,
)
SIZES = {"full": [10**6, 10**7, 10**8, 10**9], "small": [20_000]}
BINCOUNT = "np.bincount, flat ids"
BINCOUNT_BLOCKS = "np.bincount, flat ids in blocks"
MAP_ARROW, MAP_NUMPY = "datasets.map + numpy, arrow format", "datasets.map + numpy, numpy format"
LIMIT = "limit: one pass over the ids"
AUTHORS_TUNED = f"{AUTHORS}, best settings"
AUTHORS_DEFAULT = (1000, None)  # batch size, processes
AUTHORS_SETTINGS = [(10_000, None), (100_000, None), (100_000, 2)]
_POWERS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_BLOCK = 1 << 20


def bincount_in_blocks(ids: Any, vocabulary_size: int) -> Any:
    """Counting by a user who knows that bincount makes int64 of int32 first: in blocks that fit in the cache."""
    import numpy as np

    counts = np.zeros(vocabulary_size, np.int64)
    for start in range(0, len(ids), _BLOCK):
        counts += np.bincount(ids[start : start + _BLOCK], minlength=vocabulary_size)
    return counts


def with_map(dataset: Any, vocabulary_size: int, style: str) -> Any:
    """`datasets.map` over batches of ten thousand rows, adding up outside, so that nothing is written."""
    import numpy as np

    counts = np.zeros(vocabulary_size, np.int64)

    def add(batch: Any) -> None:
        column = batch["input_ids"]
        if style == "arrow":
            ids = column.combine_chunks().flatten().to_numpy()
        else:
            ids = column.reshape(-1) if column.ndim > 1 else np.concatenate(column)
        counts[:] += np.bincount(ids, minlength=vocabulary_size)

    dataset.with_format(style).map(add, batched=True, batch_size=10_000, load_from_cache_file=False)
    return counts


def with_polars(dataset: Any, vocabulary_size: int) -> Any:
    import numpy as np
    import polars

    ids = polars.Series(polars.from_arrow(dataset.data.table.column("input_ids"))).explode()
    found = ids.value_counts()
    counts = np.zeros(vocabulary_size, np.int64)
    counts[found[:, 0].to_numpy()] = found[:, 1].to_numpy()
    return counts


def with_authors(dataset: Any, vocabulary_size: int, code: Path, settings: tuple[int, int | None]) -> Any:
    """The authors' counter, made to count anew each time; it sets the data set's format, so it gets one of its own."""
    counter = authors_module(code, "data.token_counter").TokenCounter(
        batch_size=settings[0], num_proc=settings[1], load_from_cache_file=False
    )
    return counter.count(dataset.with_format(None), vocabulary_size, ["input_ids"])


def programs(folder: Path, case: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Each program that can take these rows, as a function that gives the counts."""
    import numpy as np

    from leanvocab import count_tokens

    size = case["vocabulary_size"]
    dataset = load_rows(folder / case["rows"])
    flat = np.load(folder / "ids.npy", mmap_mode="r")
    flat = flat[: len(flat) // ROW_LENGTH * ROW_LENGTH] if case["rows"] == "equal" else flat
    found: dict[str, Callable[[], Any]] = {OURS: lambda: count_tokens(dataset, full_size=size, progress=False).counts}
    if len(flat) <= 10**8:  # larger ones, made int64, do not fit beside the rest
        wide = np.asarray(flat, np.int64)
        found[BINCOUNT] = lambda: np.bincount(wide, minlength=size)
    found[BINCOUNT_BLOCKS] = functools.partial(bincount_in_blocks, flat, size)
    found[MAP_ARROW] = functools.partial(with_map, dataset, size, "arrow")
    found[MAP_NUMPY] = functools.partial(with_map, dataset, size, "numpy")
    if installed("polars"):
        found["polars"] = functools.partial(with_polars, dataset, size)
    if case["authors_code"] and case["rows"] == "equal":
        run = functools.partial(with_authors, dataset, size, case["authors_code"])
        if not case["authors_settings"]:
            run(AUTHORS_DEFAULT)  # the first run imports
            case["authors_settings"] = min(AUTHORS_SETTINGS, key=lambda each: seconds_of(lambda: run(each)))
        found[AUTHORS] = functools.partial(run, AUTHORS_DEFAULT)
        found[AUTHORS_TUNED] = functools.partial(run, tuple(case["authors_settings"]))
    found[LIMIT] = lambda: int(flat[: len(flat) // 2 * 2].view(np.int64).sum())  # reads every byte once
    return found


def time_case(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each program, in turn, and those left out since ten times the last size's time is over the budget."""
    import datasets
    import numpy as np

    datasets.disable_progress_bars()
    budget = Budget(case["seconds"])
    ready = programs(folder, case)
    expected_seconds = {name: 10 * case["last_seconds"].get(name, 0.0) for name in ready}
    late = [name for name, seconds in expected_seconds.items() if seconds and seconds > case["seconds"]]
    late = [name for name in late if name != OURS]
    ready = {name: program for name, program in ready.items() if name not in late}
    expected = ready[OURS]()
    if len(load_rows(folder / case["rows"])) < 10**6:  # which also warms up; checked at the smaller sizes
        for name, program in ready.items():
            assert name == LIMIT or np.array_equal(program(), expected), f"{name} counts otherwise"
    found = take_turns(ready, case["rounds"], budget)
    return {"seconds": found, "late": late, "authors_settings": case["authors_settings"]}


def memory_of(folder: Path, case: dict[str, Any], name: str) -> dict[str, int]:
    """Growth of this process while it counts, which it does for the first time."""
    import datasets

    from leanvocab.reports.peak import record_peak

    datasets.disable_progress_bars()
    program = programs(folder, case)[name]
    with record_peak(0.0005) as peak:
        program()
    return {"anonymous": peak.anonymous_growth_bytes, "resident": peak.rss_growth_bytes}


def child(what: str, folder: str, case: str, *rest: str) -> Any:
    path, settings = Path(folder), json.loads(case)
    if what == "time":
        return time_case(path, settings)
    if what == "memory":
        return memory_of(path, settings, rest[0])
    if what == "ids":
        return write_ids(path / "ids.npy", settings["num_tokens"], settings["vocabulary_size"])
    return write_rows(path / settings["rows"], path / "ids.npy", settings["rows"])


def measure(options: argparse.Namespace) -> Iterator[Result]:
    budget = Budget(options.seconds)
    series: list[Series] = []
    late: list[str] = []
    last: dict[str, dict[str, float]] = {"equal": {}, "ragged": {}}
    case: dict[str, Any] = {"authors_settings": None, "rounds": options.rounds or 9}
    case |= {"authors_code": options.authors_code and str(options.authors_code)}
    case |= {"vocabulary_size": options.vocabulary_size}
    small, sizes = options.size == "small", options.num_tokens or SIZES[options.size]
    for number, num_tokens in enumerate(sizes):
        with tempfile.TemporaryDirectory() as folder:
            case |= {"num_tokens": num_tokens}
            if number and budget.left < options.seconds / 4:
                late.append(f"{num_tokens:,} tokens: over the time budget of {options.seconds:.0f} s")
                continue
            run_child("benchmarks.counting", "ids", folder, json.dumps(case))
            for rows in ("equal", "ragged"):
                # Half of what is left for the last size, which takes most; a quarter for the one before it.
                share = budget.left / 2 ** (len(sizes) - number) * (1 if rows == "equal" else 1.8)
                case |= {"rows": rows, "seconds": share, "last_seconds": last[rows]}
                measured = () if num_tokens != sizes[min(1, len(sizes) - 1)] else (OURS,) if small else None
                series += run_case(folder, case, late, last, measured)
    yield Result(
        ABOUT.name,
        f"Counting tokens, {options.vocabulary_size:,} rows",
        f"zipf {options.vocabulary_size}",
        "cpu",
        tuple(series),
        tuple(bars(series)),
        (*([] if options.authors_code else [NO_AUTHORS_CODE]), *late),
        budget.spent,
        options.seconds,
        {"authors' batch size and processes": case["authors_settings"]},
    )


def power_of_ten(number: int) -> str:
    """1_000_000 → 10⁶; other numbers in digits."""
    power = len(str(number)) - 1
    return f"10{str(power).translate(_POWERS)}" if number == 10**power else f"{number:,}"


def run_case(
    folder: str,
    case: dict[str, Any],
    late: list[str],
    last: dict[str, dict[str, float]],
    measured: tuple[str, ...] | None,
) -> list[Series]:
    """Times of one size and shape of rows, and the memory of the programs in `measured` (None: of all)."""
    run_child("benchmarks.counting", "rows", folder, json.dumps(case))
    found = run_child("benchmarks.counting", "time", folder, json.dumps(case))
    case["authors_settings"] = found["authors_settings"]
    name = f"{power_of_ten(case['num_tokens'])} tokens, {case['rows']}"
    late += [f"{who} at {name}: over the time budget (by its time at a tenth of the size)" for who in found["late"]]
    times = found["seconds"]
    last[case["rows"]] = {who: min(values) for who, values in times.items()}
    series = beside_ours("time", name, "s", times)
    for who in (who for who in times if who != LIMIT and (measured is None or who in measured)):
        grown = run_child("benchmarks.counting", "memory", folder, json.dumps(case), who)
        for kind, growth in grown.items():
            series.append(Series(f"{kind} memory of a fresh process, growth", name, who, (growth,), "bytes"))
    return series


def bars(series: list[Series]) -> Iterator[Figure]:
    """Beside the authors: at least ten times as fast on rows of equal length. Beside the limit: for reading."""
    for each in series:
        if each.ratio and each.who in (AUTHORS, AUTHORS_TUNED):
            yield Figure(f"time / {each.who}, {each.case}", 1 / each.ratio, "×", bar=0.1)
        if each.ratio and each.is_limit:
            yield Figure(f"time / one pass over the ids, {each.case}", 1 / each.ratio, "×")


def main(arguments: list[str] | None = None) -> list[Result]:
    made = parser(ABOUT)
    made.add_argument("--num-tokens", type=int, nargs="+", help="sizes of the data sets, the smallest first")
    made.add_argument("--vocabulary-size", type=int, default=250_002)
    options = read_options(made, arguments)
    return finish(measure(options), options)


if __name__ == "__main__":
    run_module(child, main)
