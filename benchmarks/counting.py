"""Counting tokens against one `np.bincount` over the same ids, flat and as int64, in the same process; and its peak memory.

    python -m benchmarks.counting [--num-tokens 50000000] [--vocabulary-sizes 50257 250002] [--rounds 9] [--json]

Data sets of rows of 128 tokens and of ragged rows (1 to 255), as int32 (what tokenizers give) and int64, are read from disk
(mapped, a chunk for every thousand rows, as `datasets` writes them). Ids are drawn by Zipf's law. Rounds alternate between
the two; a figure is the median of the ratio of their times. The bar is 0.8 of bincount's speed, 1.25 of its time. Each case
is a process of its own, and memory is measured in another one, where nothing else was done.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks._results import Figure, median_interval, show

MEBIBYTE = 2**20
ROW_LENGTH = 128
CASES = [(rows, dtype) for rows in ("equal", "ragged") for dtype in ("int32", "int64")]
DERIVED = ["shuffled", "split", "labels"]


def draw_ids(num_tokens: int, vocabulary_size: int) -> Any:
    """Token ids by Zipf's law, int64; frequent ids lie anywhere in the vocabulary."""
    import numpy as np

    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, vocabulary_size + 1)
    ranks = np.searchsorted(np.cumsum(share / share.sum()), rng.random(num_tokens)).clip(max=vocabulary_size - 1)
    return rng.permutation(vocabulary_size)[ranks]


def make_dataset(folder: Path, num_tokens: int, vocabulary_size: int, rows: str, dtype: str) -> None:
    """A data set on disk, and the flat ids beside it."""
    import datasets
    import numpy as np
    import pyarrow as pa

    ids = draw_ids(num_tokens, vocabulary_size)
    np.save(folder / "ids.npy", ids)
    lengths = np.full(num_tokens // ROW_LENGTH + 1, ROW_LENGTH)
    if rows == "ragged":
        lengths = np.random.default_rng(1).integers(1, 2 * ROW_LENGTH, 2 * len(lengths))
    offsets = np.append(0, np.cumsum(lengths).clip(max=num_tokens))
    offsets = offsets[: np.searchsorted(offsets, num_tokens) + 1]
    values = ids.astype(dtype)
    chunks = []
    for start in range(0, len(offsets) - 1, 1000):
        part = offsets[start : start + 1001]
        chunks.append(
            pa.ListArray.from_arrays(pa.array(part - part[0], pa.int32()), pa.array(values[part[0] : part[-1]]))
        )
    datasets.disable_progress_bars()
    datasets.Dataset(pa.table({"input_ids": pa.chunked_array(chunks)})).save_to_disk(folder / "data")


def load(folder: Path, derived: str | None) -> Any:
    """The data set as it lies on disk, or one derived from it."""
    import datasets

    dataset = datasets.load_from_disk(folder / "data")
    if derived == "shuffled":
        return dataset.shuffle(seed=0, keep_in_memory=True)
    if derived == "split":
        return dataset.train_test_split(0.2, seed=0)["train"]
    return dataset


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def time_case(folder: Path, derived: str | None, rounds: int) -> dict[str, list[float]]:
    """Seconds of bincount, of `count_tokens` as it comes, and with one worker, in turn."""
    import numpy as np

    from leanvocab import count_tokens

    ids = np.load(folder / "ids.npy")
    data = load(folder, derived)
    if derived == "labels":  # the first half of each row is a prompt, masked out
        masked = np.where(np.arange(len(ids)) % ROW_LENGTH < ROW_LENGTH // 2, -100, ids).astype(np.int32)
        data = {"labels": masked[: len(ids) // ROW_LENGTH * ROW_LENGTH].reshape(-1, ROW_LENGTH)}
        ids = data["labels"].reshape(-1).astype(np.int64) + 100  # as bincount needs them
    elif derived == "split":
        selected = data.with_format("arrow")[:]["input_ids"]
        ids = np.concatenate([chunk.flatten().to_numpy() for chunk in selected.chunks]).astype(np.int64)
    counted = count_tokens(data).counts
    offset = 100 if derived == "labels" else 0
    assert np.array_equal(counted, np.bincount(ids, minlength=len(counted) + offset)[offset:])
    found: dict[str, list[float]] = {"bincount": [], "count_tokens": [], "one worker": []}
    for _ in range(rounds):
        found["bincount"].append(seconds(lambda: np.bincount(ids)))
        found["count_tokens"].append(seconds(lambda: count_tokens(data)))
        found["one worker"].append(seconds(lambda: count_tokens(data, num_workers=1)))
    found["num_tokens"] = [len(ids)]
    return found


def measure_memory(folder: Path, in_memory: bool) -> dict[str, float]:
    """Growth of this process while it counts, which it does for the first time."""
    import datasets

    from leanvocab import count_tokens
    from leanvocab.peak import record_peak

    dataset = datasets.load_from_disk(folder / "data", keep_in_memory=in_memory)
    with record_peak(0.0005) as peak:
        count_tokens(dataset)
    return {"anonymous": peak.anonymous_growth_bytes / MEBIBYTE, "resident": peak.rss_growth_bytes / MEBIBYTE}


def run_child(*arguments: Any) -> Any:
    command = [sys.executable, "-m", "benchmarks.counting", "--child", *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def child(what: str, folder: str, *rest: str) -> None:
    path = Path(folder)
    if what == "make":
        make_dataset(path, int(rest[0]), int(rest[1]), rest[2], rest[3])
        print("null")
    elif what == "time":
        print(json.dumps(time_case(path, None if rest[0] == "None" else rest[0], int(rest[1]))))
    else:
        print(json.dumps(measure_memory(path, rest[0] == "True")))


def ratio_figures(name: str, found: dict[str, list[float]], barred: bool) -> list[Figure]:
    figures = []
    for who in ("count_tokens", "one worker"):
        ratios = [ours / its for ours, its in zip(found[who], found["bincount"], strict=True)]
        low, high = median_interval(ratios)
        label = f"{name}: {who}, time / bincount's ({low:.2f} to {high:.2f})"
        figures.append(
            Figure(label, statistics.median(ratios), "×", 1.25 if barred and who == "count_tokens" else None)
        )
    speed = found["num_tokens"][0] / statistics.median(found["count_tokens"]) / 1e6
    return [*figures, Figure(f"{name}: count_tokens", speed, "M tokens/s")]


def measure(num_tokens: int, vocabulary_size: int, rounds: int) -> list[Figure]:
    figures: list[Figure] = []
    for rows, dtype in CASES:
        with tempfile.TemporaryDirectory() as folder:
            run_child("make", folder, num_tokens, vocabulary_size, rows, dtype)
            name = f"{vocabulary_size:,} ids, {rows} {dtype}"
            figures += ratio_figures(name, run_child("time", folder, None, rounds), barred=True)
            mapped, held = (run_child("memory", folder, in_memory) for in_memory in (False, True))
            figures.append(Figure(f"{name}: mapped, anonymous memory", mapped["anonymous"], "MiB", 64))
            figures.append(Figure(f"{name}: mapped, resident (with the file's pages)", mapped["resident"], "MiB"))
            figures.append(Figure(f"{name}: in memory, resident", held["resident"], "MiB", 64))
            if (rows, dtype) == ("ragged", "int32"):
                for derived in DERIVED:
                    found = run_child("time", folder, derived, rounds)
                    figures += ratio_figures(f"{name}, {derived}", found, barred=False)
    return figures


def main() -> None:
    if "--child" in sys.argv:
        child(*sys.argv[sys.argv.index("--child") + 1 :])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-tokens", type=int, default=50_000_000)
    parser.add_argument("--vocabulary-sizes", type=int, nargs="+", default=[50_257, 250_002])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    figures = [
        figure
        for size in arguments.vocabulary_sizes
        for figure in measure(arguments.num_tokens, size, arguments.rounds)
    ]
    show(f"Counting {arguments.num_tokens:,} tokens", figures, arguments.json, num_tokens=arguments.num_tokens)


if __name__ == "__main__":
    main()
