"""Batches that fit on a card of 8, 16 or 24 GiB: the largest batch that trains, with the full and with the partial vocabulary.

CUDA only. The process is capped with `torch.cuda.set_per_process_memory_fraction`; each try is a process of its own that
builds a model of random weights and a published size, shrinks it or not, and takes two steps with fused AdamW. Batches grow
by doubling until one runs out of memory, then by halves between the two. A model of which not one row fits has batch 0.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks._command import About, finish, parser, read_options
from benchmarks._models import SHAPES, kept_ids, make_model
from benchmarks._peers import NO_GPU
from benchmarks._results import OURS, Result, Series
from benchmarks._rounds import Budget, run_child, run_module

ABOUT = About(
    name="fits",
    measures="The largest batch that trains within 8, 16 and 24 GiB of a GPU's memory.",
    beside="full fine-tuning",
    limit="the memory",
    budget_seconds=540,
)
MODULE = "benchmarks.fits"
FULL = "full fine-tuning"
MODELS = [name for name, shape in SHAPES.items() if not name.startswith(("tiny", "bert")) and "classifier" not in name]
LARGEST = 4096
GIBIBYTE = 2**30


def largest_that_fits(fits: Callable[[int], bool], largest: int = LARGEST) -> int:
    """The largest batch for which `fits` holds, by doubling and then to within an eighth; 0 where 1 does not fit."""
    if not fits(1):
        return 0
    low = 1
    while low < largest and fits(low * 2):
        low *= 2
    high = low * 2
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return min(low, largest)


def batch_for(name: str, ids: Any, batch_size: int, length: int, device: str) -> dict[str, Any]:
    """Inputs of the model: ids among the kept ones, and labels for its task."""
    import torch

    kept = torch.from_numpy(ids)
    drawn = kept[torch.randint(2, len(kept), (batch_size, length))].to(device)
    labels = drawn if SHAPES[name].task != "classifier" else torch.zeros(batch_size, dtype=torch.long, device=device)
    return {"input_ids": drawn, "labels": labels}


def train(name: str, who: str, batch_size: int, length: int, dtype: str, device: str) -> None:
    """Two steps."""
    import torch

    import leanvocab as lv

    ids = kept_ids(name)
    model = make_model(name, dtype, device)
    if who == OURS:
        lv.shrink_(model, lv.PartialVocabulary(ids, model.get_input_embeddings().num_embeddings))
        torch.cuda.empty_cache()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    for _ in range(2):
        model(**batch_for(name, ids, batch_size, length, device)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def child(name: str, who: str, batch_size: str, length: str, dtype: str, memory: str) -> bool:
    """True where two steps fit in so many GiB."""
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, float(memory) * GIBIBYTE / total))
    try:
        train(name, who, int(batch_size), int(length), dtype, "cuda")
    except torch.OutOfMemoryError:
        return False
    return True


def measure(options: argparse.Namespace) -> Iterator[Result]:
    budget = Budget(options.seconds)
    if options.device == "cpu":
        title = "What fits on a card"
        yield Result(ABOUT.name, title, "all models", "cpu", open=(f"every model at 8, 16 and 24 GiB: {NO_GPU}",))
        return
    for number, name in enumerate(options.models):
        series, missing = [], []
        for memory in options.gibibytes:
            for who in (OURS, FULL):
                if budget.left < options.seconds / 20:
                    missing.append(f"{who}, {memory} GiB: open: over the time budget")
                    continue
                words = (options.length, options.dtype, memory)
                fits = lambda batch, who=who, words=words: run_child(MODULE, name, who, batch, *words)  # noqa: B023, E731
                found = float(largest_that_fits(fits, options.largest))
                series.append(Series("largest batch", f"{memory} GiB", who, (found,), "rows"))
        title = f"What fits on a card: {name}, rows of {options.length} tokens, {options.dtype}"
        subject = f"{name} {options.dtype}"
        part = budget.spent if number == 0 else 0.0
        yield Result(ABOUT.name, title, subject, "cuda", tuple(series), (), tuple(missing), part, options.seconds)


def main(arguments: list[str] | None = None) -> list[Result]:
    made = parser(ABOUT)
    made.add_argument("--models", nargs="+", choices=SHAPES, default=MODELS)
    made.add_argument("--gibibytes", type=float, nargs="+", default=[8, 16, 24])
    made.add_argument("--length", type=int, default=128)
    made.add_argument("--largest", type=int, default=LARGEST)
    options = read_options(made, arguments)
    return finish(measure(options), options)


if __name__ == "__main__":
    run_module(child, main)
