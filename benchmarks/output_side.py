"""The output layer's loss, forward and backward, and the optimizer's step of its matrix: full, frozen and restricted.

Hidden states of random numbers and labels among the kept rows go through an output layer tied to an input table of random
weights. Full losses: torch's plain cross-entropy, and its chunked one with several options (a whole batch in one chunk, and
chunks of a quarter, of 128 rows, and of its own choice). Gradients of the hidden states and of the matrix are made by all;
leanvocab's have the kept rows alone. Programs take turns in one process; memory is the peak of a fresh process in one
forward and backward. Liger, CCE and TRL's fused head run on CUDA only. Cases go from small to large while the budget lasts.
With `filter_eps` nearly all frozen rows are left out of a gradient, since random weights have a flat softmax: it is the most
that the option can save. `--device paper` counts that memory on a GPU, of torch's operations alone: kernels in Triton hold less.
"""

import argparse
import gc
import importlib
import json
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks._command import About, finish, parser, read_options
from benchmarks._paper import PAPER, allocated, peak_of, why_not
from benchmarks._peers import NO_GPU, installed
from benchmarks._results import OURS, Figure, Result, Series, versions
from benchmarks._rounds import Budget, run_child, run_module, take_turns

ABOUT = About(
    name="output_side",
    measures="The output layer's loss and step at 32k to 256k rows and 1k to 16k tokens: time and memory.",
    beside="plain cross-entropy, torch's chunked loss; on CUDA Liger, CCE and TRL's fused head",
    limit="the matrix products' time; rows that remain",
    budget_seconds=220,
)
MODULE = "benchmarks.output_side"
FROZEN, HOST, RESTRICTED = f"{OURS}, frozen", f"{OURS}, frozen rows on the host", f"{OURS}, restricted"
FILTER_EPS = 2.0**-12  # "auto" in bf16
FILTERED = f"{OURS}, frozen, filter_eps=2⁻¹² (not exact)"
PLAIN, LIGER, CCE, TRL = "plain cross-entropy", "Liger", "CCE", "TRL's fused head"
FUSED = {LIGER: "liger_kernel", CCE: "cut_cross_entropy", TRL: "trl"}  # their packages
ORDER = [RESTRICTED, FILTERED, PLAIN, LIGER, CCE, TRL, "torch chunked, one chunk", "torch chunked, four chunks", HOST]
PRODUCTS = "limit: the full layer's matrix products"
CHUNKED = {  # of tokens → options of torch's chunked loss
    "torch chunked, as it comes": lambda tokens: {},
    "torch chunked, one chunk": lambda tokens: {"batch_chunk_size": tokens, "chunking_method": None},
    "torch chunked, four chunks": lambda tokens: {"batch_chunk_size": -(-tokens // 4), "chunking_method": None},
    "torch chunked, chunks of 128": lambda tokens: {"batch_chunk_size": 128, "chunking_method": None},
}
ORDER += [name for name in reversed(CHUNKED) if name not in ORDER]  # the fastest first, for the budget's sake
DIM, KEPT = 640, 5_000
BAR_CASE = (262_144, 512)
ROWS = (32_768, 131_072, 262_144)
_BY_WORK = sorted(((rows, tokens) for rows in ROWS for tokens in (1024, 4096, 16_384)), key=math.prod)
CASES = {
    "full": [_BY_WORK[0], BAR_CASE, *_BY_WORK[1:]],  # the smallest first, which tells what would take too long
    "small": [(600, 32)],
}
MEMORY = "memory of a loss beyond the layer's"


def make_layer(rows: int, options: dict[str, Any], mode: Any = None, **others: Any) -> Any:
    """An output layer tied to an input table, shrunk where a mode is given, with other options of `shrink_`."""
    import torch

    import leanvocab as lv

    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(rows, options["dim"])
            self.output = torch.nn.Linear(options["dim"], rows, bias=False)
            self.output.weight = self.embedding.weight

    torch.manual_seed(0)
    with torch.device(options["device"]):
        model = Tied().to(getattr(torch, options["dtype"]))
    with torch.no_grad():
        model.embedding.weight.mul_(0.02)
    if mode is not None:
        warnings.simplefilter("ignore")  # it says that restricted is another objective
        lv.shrink_(model, lv.PartialVocabulary(kept_rows(rows, options), rows), output=mode, **others)
    return model


def kept_rows(rows: int, options: dict[str, Any]) -> Any:
    import numpy as np

    return np.sort(np.random.default_rng(0).choice(rows, min(options["kept"], rows // 4), replace=False))


def make_inputs(rows: int, tokens: int, options: dict[str, Any]) -> tuple[Any, Any]:
    """Hidden states that want a gradient, and labels in full ids."""
    import torch

    generator = torch.Generator().manual_seed(1)
    kept = torch.from_numpy(kept_rows(rows, options))
    labels = kept[torch.randint(0, len(kept), (tokens,), generator=generator)].to(options["device"])
    hidden = torch.randn(tokens, options["dim"], generator=generator)
    hidden = hidden.to(options["device"], getattr(torch, options["dtype"]))
    return hidden.requires_grad_(), labels


def losses(rows: int, tokens: int, options: dict[str, Any]) -> dict[str, Callable[[], tuple[Any, Callable[..., Any]]]]:
    """Name → a function that makes a model and its loss of (hidden, labels); only what can run here."""
    import torch
    import torch.nn.functional as F

    def full(loss: Callable[..., Any]) -> Callable[[], tuple[Any, Callable[..., Any]]]:
        def make() -> tuple[Any, Callable[..., Any]]:
            model = make_layer(rows, options)
            return model, lambda hidden, labels: loss(hidden, model.output.weight, labels)

        return make

    def lean(mode: str, **others: Any) -> Callable[[], tuple[Any, Callable[..., Any]]]:
        def make() -> tuple[Any, Callable[..., Any]]:
            model = make_layer(rows, options, mode, **others)
            return model, lambda hidden, labels: F.cross_entropy(model.output(hidden), labels)

        return make

    found = {FROZEN: lean("frozen"), HOST: lean("frozen", frozen_rows="host"), RESTRICTED: lean("restricted")}
    found[FILTERED] = lean("frozen", filter_eps=FILTER_EPS)
    found[PLAIN] = full(lambda hidden, weight, labels: F.cross_entropy(F.linear(hidden, weight), labels))
    if hasattr(F, "linear_cross_entropy"):
        for name, chosen in CHUNKED.items():
            chunks = torch.nn.LinearCrossEntropyOptions(**chosen(tokens))
            found[name] = full(lambda h, w, y, chunks=chunks: F.linear_cross_entropy(h, w, y, options=chunks))
    if options["device"] == "cuda":
        found |= {who: full(fused_loss(who)) for who, package in FUSED.items() if installed(package)}
    return found


def fused_loss(who: str) -> Callable[..., Any]:
    """A peer's loss of (hidden, weight, labels)."""
    if who == LIGER:
        return importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy  # type: ignore[no-any-return]
    if who == CCE:
        return importlib.import_module("cut_cross_entropy").linear_cross_entropy  # type: ignore[no-any-return]
    kernels = importlib.import_module("trl.kernels.chunked_logprob")
    columns_at_once = 8192
    return lambda h, w, y: (
        -kernels.ChunkedLogProbFunction.apply(h, w, None, y, 1.0, columns_at_once, None, 1.0, ())[0].mean()
    )


def does_not_fit(who: str, rows: int, tokens: int, options: dict[str, Any]) -> str | None:
    """Logits, their softmax and their gradient beside the matrix must fit in two thirds of the memory."""
    import torch

    one = tokens * rows * (2 if options["dtype"] == "bfloat16" else 4)
    if options["device"] == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if who in (PLAIN, "torch chunked, one chunk") and 3 * one > memory * 2 / 3:
        return f"{who} at {case_name(rows, tokens)}: does not fit, its logits alone take {one / 1e9:.1f} GB"
    return None


@dataclass
class Program:
    """A forward and backward, and the optimizer's step of the matrix, which lets go of the gradients."""

    forward: Callable[[], float]
    step: Callable[[], None]
    let_go: Callable[[], None]  # of the gradients
    device: str

    def take(self) -> tuple[float, float]:
        """Seconds of a loss and of a step."""
        return synchronized(self.forward, self.device), synchronized(self.step, self.device)


def program(
    make: Callable[[], tuple[Any, Callable[..., Any]]], rows: int, tokens: int, options: dict[str, Any]
) -> Program:
    import torch

    model, loss = make()
    hidden, labels = make_inputs(rows, tokens, options)
    optimizer = torch.optim.AdamW([model.output.weight], lr=1e-6, weight_decay=0.0, fused=True)

    def forward() -> float:
        value = loss(hidden, labels)
        value.backward()
        return float(value.detach())

    def let_go() -> None:
        optimizer.zero_grad()
        hidden.grad = None

    def step() -> None:
        optimizer.step()
        let_go()

    return Program(forward, step, let_go, options["device"])


def matrix_products(rows: int, tokens: int, options: dict[str, Any]) -> Callable[[], Any]:
    """Forward, both gradients, and nothing else."""
    hidden, _ = make_inputs(rows, tokens, options)
    hidden, weight = hidden.detach(), make_layer(rows, options).output.weight.detach()

    def run() -> None:
        logits = hidden @ weight.T
        logits @ weight
        logits.T @ hidden

    return run


def synchronized(work: Callable[[], Any], device: str) -> float:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def time_case(rows: str, tokens: str, rounds: str, seconds: str, given: str) -> dict[str, Any]:
    """Seconds of losses and steps of each program, in turn with leanvocab's frozen loss, and each one's first loss.

    As many in memory at once as fit: one other at a time. Those are late whose time at a smaller size says that one round
    would go over their share of the budget.
    """
    options, size = json.loads(given), (int(rows), int(tokens))
    makers = {who: make for who, make in losses(*size, options).items() if not does_not_fit(who, *size, options)}
    found: dict[str, Any] = {"pairs": {}, "values": {}, "late": [], "failed": {}}
    budget = Budget(float(seconds))
    frozen, _ = ready(makers[FROZEN], FROZEN, size, options, found["values"])
    others = sorted((who for who in makers if who != FROZEN), key=ORDER.index)
    for number, who in enumerate(others):
        share = Budget(budget.left / (len(others) - number))
        if options["seconds_per_logit"].get(who, 0.0) * size[0] * size[1] > 2 * share.seconds:
            found["late"].append(who)
            continue
        try:
            other, warm = ready(makers[who], who, size, options, found["values"])
            found["pairs"][who] = pairs_of(frozen, other, warm, int(rounds), share)
            del other
        except Exception as error:  # whatever it is, the others go on
            found["failed"][who] = f"{type(error).__name__}: {error}"[:200]
        gc.collect()
    products = matrix_products(*size, options)
    taken = take_turns({PRODUCTS: products}, 3, budget, lambda work: synchronized(work, options["device"]))
    return found | {"products": taken[PRODUCTS]}


def ready(
    make: Callable[[], Any], who: str, size: tuple[int, int], options: dict[str, Any], values: dict[str, float]
) -> tuple[Program, tuple[float, float]]:
    """A program that has taken a loss and a step, and their seconds; the loss goes into `values`."""
    made = program(make, *size, options)
    start = time.perf_counter()
    values[who] = made.forward()
    middle = time.perf_counter()
    made.step()
    return made, (middle - start, time.perf_counter() - middle)


def pairs_of(
    frozen: Program, other: Program, warm: tuple[float, float], rounds: int, share: Budget
) -> list[list[tuple[float, float]]]:
    """Seconds of (loss, step) of both in turn. Where the first time of all was over the share, it counts as the only one."""
    if share.left == 0.0:
        return [[frozen.take()], [warm]]
    return list(take_turns({"frozen": frozen.take, "other": other.take}, rounds, share, lambda take: take()).values())


def memory_of(rows: str, tokens: str, given: str, who: str) -> int:
    """Peak of this process in its first forward and backward at this size, beyond the layer and its inputs."""
    from leanvocab.reports.peak import record_peak

    options = json.loads(given)
    make_small = losses(600, 16, options)[who]
    program(make_small, 600, 16, options).forward()  # what it loads is no part of what it takes
    made = program(losses(int(rows), int(tokens), options)[who], int(rows), int(tokens), options)
    gc.collect()
    with record_peak(0.0005) as peak:
        if options["device"] == "cuda":
            import torch

            start = torch.cuda.memory_allocated()
        made.forward()
    if options["device"] == "cuda":
        return int(peak.peak_cuda_allocated_bytes - start)
    return int(peak.anonymous_growth_bytes)


def counted(rows: int, tokens: int, options: dict[str, Any], who: str) -> int:
    """The same on paper, in a second forward and backward: frozen rows that the device holds are part of it too."""

    def prepare(device: str) -> Callable[[], int]:
        here, before = options | {"device": device}, allocated(device)
        made = program(losses(rows, tokens, here)[who], rows, tokens, here)
        held = allocated(device) - before

        def step() -> int:
            made.forward()
            made.let_go()
            return held

        return step

    peak, held = peak_of(prepare)
    return peak - int(held)


def on_paper(options: argparse.Namespace) -> Iterator[Result]:
    """Memory of every program at each size."""
    start, subject = time.perf_counter(), f"tied dim {options.dim} {options.dtype}"
    title = f"The output side, counted: dim {options.dim}, {options.kept:,} rows kept, {options.dtype}"
    reason = why_not()
    if reason:
        yield Result(ABOUT.name, title, subject, PAPER, open=(f"every size: {reason}",))
        return
    given = {name: getattr(options, name) for name in ("device", "dtype", "dim", "kept")}
    series = []
    for rows, tokens in options.cases or CASES[options.size]:
        for who in losses(rows, tokens, given):
            peak = float(counted(rows, tokens, given, who))
            series.append(Series(f"counted: {MEMORY}", case_name(rows, tokens), who, (peak,), "bytes"))
    seconds = time.perf_counter() - start
    yield Result(
        ABOUT.name,
        title,
        subject,
        PAPER,
        tuple(series),
        seconds=seconds,
        budget_seconds=options.seconds,
        machine=versions(),
    )


def child(what: str, *rest: str) -> Any:
    return time_case(*rest) if what == "time" else memory_of(*rest)


def case_name(rows: int, tokens: int) -> str:
    return f"{rows:,} rows, {tokens:,} tokens"


def run_case(
    options: argparse.Namespace, rows: int, tokens: int, budget: Budget, known: dict[str, float]
) -> tuple[list[Series], list[Figure], list[str]]:
    """Series of one size, the bars where it is theirs, and what was left out; `known` learns how long programs take."""
    given = {name: getattr(options, name) for name in ("device", "dtype", "dim", "kept")} | {"seconds_per_logit": known}
    words = (rows, tokens, options.rounds or 9, budget.seconds * 2 / 3, json.dumps(given))
    found = run_child(MODULE, "time", *words)
    case = case_name(rows, tokens)
    late = [f"{who} at {case}: open: over the time budget (by its time at a smaller size)" for who in found["late"]]
    late += [f"{who} at {case}: open: it failed: {why}" for who, why in found["failed"].items()]
    if not found["pairs"]:
        return [], [], late
    series = list(time_series(found["pairs"], found["products"], case))
    for who, (_, theirs) in found["pairs"].items():
        known[who] = min(loss + step for loss, step in theirs) / (rows * tokens)
    for who in [FROZEN, *found["pairs"]]:
        if known.get(who, 0.0) * rows * tokens > max(5.0, budget.left / 2):
            late.append(f"{who} at {case}, memory: open: over the time budget")
            continue
        grown = run_child(MODULE, "memory", rows, tokens, json.dumps(given), who)
        series.append(Series(MEMORY, case, who, (float(grown),), "bytes"))
    return series, list(bars(found, case, (rows, tokens) == BAR_CASE)), late


Pairs = dict[str, list[list[tuple[float, float]]]]


def time_series(pairs: Pairs, products: list[float], case: str) -> Iterator[Series]:
    """Losses, and losses with steps, of every program beside the frozen mode in the same rounds."""
    for measure, add in (("loss, forward and backward", 0.0), ("loss and AdamW step of the matrix", 1.0)):
        seconds = {who: [[loss + add * step for loss, step in one] for one in both] for who, both in pairs.items()}
        most = max(seconds, key=lambda who: len(seconds[who][0]))
        yield Series(measure, case, FROZEN, tuple(seconds[most][0]), "s")
        for who, (ours, theirs) in seconds.items():
            yield Series(measure, case, who, tuple(theirs), "s", tuple(ours))
        if not add:
            yield Series(measure, case, PRODUCTS, tuple(products), "s", tuple(seconds[most][0][: len(products)]))


def bars(found: dict[str, Any], case: str, barred: bool) -> Iterator[Figure]:
    """Frozen and restricted against the full model's fastest loss, and how far the frozen loss is from the plain one."""
    losses = {who: [[loss for loss, _ in one] for one in both] for who, both in found["pairs"].items()}
    full = [who for who in losses if not who.startswith(OURS)]
    if full:  # none where all were late
        fastest = min(full, key=lambda who: statistics.median(losses[who][1]))
        ratio = statistics.median(ours / its for ours, its in zip(*losses[fastest], strict=True))
        yield Figure(f"frozen / the fastest full loss ({fastest}), {case}", ratio, "×", 0.85 if barred else None)
    if full and RESTRICTED in losses:
        share = statistics.median(mine / frozen for frozen, mine in zip(*losses[RESTRICTED], strict=True))
        yield Figure(f"restricted / the fastest full loss, {case}", share * ratio, "×", 0.05 if barred else None)
    if PLAIN in found["values"]:
        plain, ours = found["values"][PLAIN], found["values"][FROZEN]
        yield Figure(f"frozen loss − plain loss, relative, {case}", abs(ours - plain) / plain, "", 1e-3)


def measure(options: argparse.Namespace) -> Iterator[Result]:
    budget = Budget(options.seconds)
    series: list[Series] = []
    figures: list[Figure] = []
    is_cpu = options.device == "cpu"
    absent = [who for who, package in FUSED.items() if is_cpu or not installed(package)]
    missing = [f"{who}: {NO_GPU if is_cpu else 'open: not installed'}" for who in absent]
    cases = options.cases or CASES[options.size]
    known: dict[str, float] = {}
    last, last_work = 0.0, 1
    for number, (rows, tokens) in enumerate(cases):
        start, work = budget.spent, rows * tokens
        if number and budget.left < last * work / last_work / 4:
            missing.append(f"{case_name(rows, tokens)}: open: over the time budget of {options.seconds:.0f} s")
            continue
        settings = {"device": options.device, "dtype": options.dtype}
        missing += [reason for who in (PLAIN, *CHUNKED) if (reason := does_not_fit(who, rows, tokens, settings))]
        share = budget.left / (2 if (rows, tokens) == BAR_CASE else min(4, len(cases) - number))
        made, found, late = run_case(options, rows, tokens, Budget(share), known)
        series, figures, missing = series + made, figures + found, missing + late
        last, last_work = budget.spent - start, work
    yield Result(
        ABOUT.name,
        f"The output side: dim {options.dim}, {options.kept:,} rows kept, {options.dtype} on {options.device}",
        f"tied dim {options.dim} {options.dtype}",
        options.device,
        tuple(series),
        tuple(figures),
        tuple(missing),
        budget.spent,
        options.seconds,
    )


def size_of(text: str) -> tuple[int, int]:
    rows, _, tokens = text.partition("x")
    return int(rows), int(tokens)


def main(arguments: list[str] | None = None) -> list[Result]:
    made = parser(ABOUT, counts=True)
    made.add_argument("--cases", type=size_of, nargs="+", help="ROWSxTOKENS, such as 262144x512")
    made.add_argument("--dim", type=int)
    made.add_argument("--kept", type=int, default=KEPT)
    options = read_options(made, arguments)
    options.dim = options.dim or (DIM if options.size == "full" else 16)
    return finish(on_paper(options) if options.device == PAPER else measure(options), options)


if __name__ == "__main__":
    run_module(child, main)
