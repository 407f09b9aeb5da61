"""Batches that fit on a card of 8, 12, 16 or 24 GiB: peaks of a training step and the largest batch, with the full and with the
partial vocabulary, in fp32, bf16, mixed precision (fp32 with autocast in bf16) and QLoRA, with fused AdamW.

`--device paper` counts them on any machine, on a card of that size that computes nothing; each figure says that it is counted.
`--device cuda` measures them: the process is capped with `torch.cuda.set_per_process_memory_fraction`, and each try is a
process of its own. Models have a published size, random weights, and no gradient checkpointing; rows have no padding. A model
of which not one row fits has batch 0.
"""

import argparse
import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks import _paper
from benchmarks._command import About, finish, parser, read_options
from benchmarks._models import SHAPES, kept_ids, make_model
from benchmarks._peers import NO_GPU, installed
from benchmarks._results import OURS, Result, Series, versions
from benchmarks._rounds import Budget, run_child, run_module

ABOUT = About(
    name="fits",
    measures="The peak of a training step, and the largest batch that trains within 8, 12, 16 and 24 GiB of a GPU's memory.",
    beside="the same with the full vocabulary",
    limit="the memory",
    budget_seconds=540,
)
MODULE = "benchmarks.fits"
FULL = "full vocabulary"
MODELS = [
    "xlm-r-large",
    "bge-m3",
    "embeddinggemma-300m",
    "gemma-3-270m",
    "gemma-3-1b",
    "qwen3-0.6b",
    "qwen3-1.7b",
    "llama-3.2-1b",
]
PRECISIONS = ("fp32", "bf16", "mixed", "qlora")
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


def largest_by_peaks(peak_of: Callable[[int], int | None], memory: int, largest: int = LARGEST) -> int:
    """The largest batch with a peak, None being what runs out of memory: to the row, by peaks that grow about evenly."""
    low, low_peak = 0, 0
    high, slope = largest + 1, None
    guess = 1
    while high - low > 1:
        peak = peak_of(guess)
        if peak is None:
            high, slope = guess, None  # from here on by halves, unless the next one fits
        else:
            slope = (peak - low_peak) / (guess - low) if low else None
            low, low_peak = guess, peak
        step = (memory - low_peak) / slope if slope else (low or 1) if high > largest else (high - low) / 2
        guess = min(max(low + 1, low + int(step)), high - 1)
    return low


@dataclass
class Training:
    """A model of a published size, ready to train, and what a step of it needs."""

    name: str
    ids: Any
    model: Any
    optimizer: Any
    autocast: Any  # makes a block

    def take_step(self, batch_size: int, length: int) -> None:
        """Forward, backward and step; lets go of the gradients."""
        batch = batch_for(self.name, self.ids, batch_size, length, str(self.model.device))
        try:
            with self.autocast():
                loss = self.model(**batch).loss
            loss.backward()
            self.optimizer.step()
        finally:
            self.optimizer.zero_grad()


def batch_for(name: str, ids: Any, batch_size: int, length: int, device: str) -> dict[str, Any]:
    """Inputs of the model: ids among the kept ones, and labels for its task."""
    import torch

    kept = torch.from_numpy(ids)
    drawn = kept[torch.randint(2, len(kept), (batch_size, length))].to(device)
    labels = drawn if SHAPES[name].task != "classifier" else torch.zeros(batch_size, dtype=torch.long, device=device)
    return {"input_ids": drawn, "labels": labels}


def make_training(name: str, who: str, precision: str, device: str, *, filled: bool = True) -> Training:
    """Full fine-tuning, or leanvocab in its default mode."""
    import torch

    import leanvocab as lv

    ids = kept_ids(name)
    model = make_model(name, "bfloat16" if precision in ("bf16", "qlora") else "float32", device, filled=filled)
    if precision == "qlora":
        model = _paper.in_four_bits(model)
    if who == OURS:
        lv.shrink_(model, lv.PartialVocabulary(ids, model.get_input_embeddings().num_embeddings))
    if precision == "qlora":
        import peft

        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=True)
    is_mixed = precision == "mixed"
    autocast = (
        (lambda: torch.autocast(device.partition(":")[0], torch.bfloat16)) if is_mixed else contextlib.nullcontext
    )
    return Training(name, ids, model, optimizer, autocast)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def child(name: str, who: str, batch_size: str, length: str, precision: str, memory: str) -> int | None:
    """The peak of two steps where they fit in so many GiB."""
    import torch

    warnings.simplefilter("ignore")
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, float(memory) * GIBIBYTE / total))
    try:
        training = make_training(name, who, precision, "cuda")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            training.take_step(int(batch_size), int(length))
    except torch.OutOfMemoryError:
        return None
    return int(torch.cuda.max_memory_allocated())


def measured(options: argparse.Namespace, name: str, who: str, precision: str, budget: Budget) -> Iterator[Series]:
    """The peak at one batch, on all of the GPU, and the largest batch of each size of card while the budget lasts."""
    words = (options.length, precision)
    peak = run_child(MODULE, name, who, options.batch_size, *words, 1024)
    if peak is not None:
        yield Series(peak_measure(options), precision, who, (float(peak),), "bytes")
    for memory in options.gibibytes:
        if budget.left < options.seconds / 20:
            return
        fits = lambda batch, memory=memory: run_child(MODULE, name, who, batch, *words, memory) is not None  # noqa: E731
        found = float(largest_that_fits(fits, options.largest))
        yield Series(batch_measure(options, memory), precision, who, (found,), "rows")


# --- on paper ---------------------------------------------------------------------------------------------------------


def counted(options: argparse.Namespace, name: str, who: str, precision: str, device: str) -> Iterator[Series]:
    """The same on paper: the card is one of so many bytes, so that what follows the free memory does."""
    import torch

    module = torch.get_device_module(device)
    start = module.memory_allocated()
    training = make_training(name, who, precision, device, filled=False)
    gc.collect()

    def peak_of(batch_size: int) -> int | None:
        module.reset_peak_memory_stats()
        try:
            training.take_step(batch_size, options.length)
        except torch.OutOfMemoryError:
            return None
        return int(module.max_memory_allocated()) - start

    peak_of(1)  # makes the states
    peak = peak_of(options.batch_size)
    assert peak is not None
    yield Series(peak_measure(options), precision, who, (float(peak),), "bytes")
    try:
        for memory in options.gibibytes:
            _paper.set_total_memory(start + int(memory * GIBIBYTE))
            found = float(largest_by_peaks(peak_of, int(memory * GIBIBYTE), options.largest))
            yield Series(batch_measure(options, memory), precision, who, (found,), "rows")
    finally:
        _paper.set_total_memory(None)


def on_paper(options: argparse.Namespace) -> Iterator[Result]:
    from leanvocab.progress import ProgressBar

    reason = _paper.why_not()
    if reason:
        yield Result(ABOUT.name, "What fits on a card", "all models", _paper.PAPER, open=(f"every model: {reason}",))
        return
    pairs = {
        name: [(who, precision) for precision in precisions_of(options, name) for who in (OURS, FULL)]
        for name in options.models
    }
    bar = ProgressBar("counting", sum(map(len, pairs.values())), unit=" trainings")
    with _paper.on_paper() as device:
        for name in options.models:
            budget = Budget(options.seconds)
            series: list[Series] = []
            for who, precision in pairs[name]:
                series += counted(options, name, who, precision, device)
                gc.collect()
                bar.add(1)
            yield result_of(options, name, series, (), budget.spent)
    bar.close()


# --- both -------------------------------------------------------------------------------------------------------------


def peak_measure(options: argparse.Namespace) -> str:
    return f"{_kind(options)}peak of a step of {options.batch_size} × {options.length} tokens"


def batch_measure(options: argparse.Namespace, memory: float) -> str:
    return f"{_kind(options)}largest batch of {options.length} tokens a row, {memory:g} GiB"


def _kind(options: argparse.Namespace) -> str:
    return "counted: " if options.device == _paper.PAPER else ""


def precisions_of(options: argparse.Namespace, name: str) -> list[str]:
    """QLoRA is for language models."""
    can_quantize = SHAPES[name].task == "causal-lm" and installed("bitsandbytes") and installed("peft")
    return [each for each in options.precisions if each != "qlora" or can_quantize]


def result_of(
    options: argparse.Namespace, name: str, series: list[Series], missing: tuple[str, ...], seconds: float
) -> Result:
    """Series of one model; a partial and a full peak stand beside one another."""
    ours = {(each.measure, each.case): each.values for each in series if each.who == OURS}
    series = [
        Series(each.measure, each.case, each.who, each.values, each.unit, ours.get((each.measure, each.case), ()))
        if each.who == FULL and each.unit == "bytes"
        else each
        for each in series
    ]
    kept, rows = len(kept_ids(name)), SHAPES[name].rows
    if options.device == _paper.PAPER:
        title, more = f"What fits on a card, counted: {name}, {kept:,} of {rows:,} rows kept", {"machine": versions()}
    else:
        title, more = f"What fits on a card: {name}, {kept:,} of {rows:,} rows kept", {}
    peaks_first = tuple(sorted(series, key=lambda each: each.unit))
    return Result(ABOUT.name, title, name, options.device, peaks_first, (), missing, seconds, options.seconds, **more)


def measure(options: argparse.Namespace) -> Iterator[Result]:
    if options.device == _paper.PAPER:
        yield from on_paper(options)
        return
    if options.device == "cpu":
        yield Result(ABOUT.name, "What fits on a card", "all models", "cpu", open=(f"every model: {NO_GPU}",))
        return
    budget = Budget(options.seconds)
    for number, name in enumerate(options.models):
        start, series = budget.spent, []
        pairs = [(who, precision) for precision in precisions_of(options, name) for who in (OURS, FULL)]
        share = budget.part(1 / (len(options.models) - number))
        for who, precision in pairs:
            series += measured(options, name, who, precision, share)
        expected = len(pairs) * (1 + len(options.gibibytes))
        missing = (
            f"{expected - len(series)} of {expected} figures: open: over the time budget, or over this GPU's memory"
        )
        yield result_of(options, name, series, (missing,) if len(series) < expected else (), budget.spent - start)


def main(arguments: list[str] | None = None) -> list[Result]:
    made = parser(ABOUT, counts=True)
    made.add_argument("--models", nargs="+", choices=SHAPES)
    made.add_argument("--precisions", nargs="+", choices=PRECISIONS, help="all of them on paper; bf16 on a GPU")
    made.add_argument("--gibibytes", type=float, nargs="+", default=[8, 12, 16, 24])
    made.add_argument("--length", type=int, help="tokens of a row (512; small size: 16)")
    made.add_argument("--batch-size", type=int, default=8, help="rows of the step whose peak is told")
    made.add_argument("--largest", type=int, default=LARGEST)
    options = read_options(made, arguments)
    is_small = options.size == "small"
    options.models = options.models or (["tiny", "tiny-lm-64"] if is_small else MODELS)
    options.length = options.length or (16 if is_small else 512)
    options.precisions = options.precisions or (PRECISIONS if options.device == _paper.PAPER else ("bf16",))
    return finish(measure(options), options)


if __name__ == "__main__":
    run_module(child, main)
