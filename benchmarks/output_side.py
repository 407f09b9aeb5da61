"""The output layer's loss, forward and backward, and the optimizer's step of its matrix: full, frozen and restricted.

Hidden states of random numbers and labels among the kept rows go through an output layer tied to an input table of random
weights. Full losses: torch's plain cross-entropy, and its chunked one with several options (a whole batch in one chunk, and
chunks of a quarter, of 128 rows, and of its own choice). Gradients of the hidden states and of the matrix are made by all;
leanvocab's have the kept rows alone. Programs take turns in one process; memory is the peak of a fresh process in one
forward and backward. Liger and CCE run on CUDA only. Cases go from small to large while the budget lasts.
"""

import argparse
import gc
import importlib
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks._command import About, finish, parser, read_options
from benchmarks._peers import NO_GPU, installed
from benchmarks._results import OURS, Figure, Result, Series
from benchmarks._rounds import Budget, run_child, run_module, take_turns

ABOUT = About(
    name="output_side",
    measures="The output layer's loss and step at 32k to 256k rows and 1k to 16k tokens: time and memory.",
    beside="plain cross-entropy, torch's chunked loss, Liger and CCE (on CUDA)",
    limit="the matrix products' time; rows that remain",
    budget_seconds=220,
)
MODULE = "benchmarks.output_side"
FROZEN, HOST, RESTRICTED = f"{OURS}, frozen", f"{OURS}, frozen rows on the host", f"{OURS}, restricted"
PLAIN, LIGER, CCE = "plain cross-entropy", "Liger", "CCE"
PRODUCTS = "limit: the full layer's matrix products"
CHUNKED = {  # of tokens → options of torch's chunked loss
    "torch chunked, as it comes": lambda tokens: {},
    "torch chunked, one chunk": lambda tokens: {"batch_chunk_size": tokens, "chunking_method": None},
    "torch chunked, four chunks": lambda tokens: {"batch_chunk_size": -(-tokens // 4), "chunking_method": None},
    "torch chunked, chunks of 128": lambda tokens: {"batch_chunk_size": 128, "chunking_method": None},
}
DIM, KEPT = 640, 5_000
BAR_CASE = (262_144, 512)
ROWS = (32_768, 131_072, 262_144)
CASES = {  # the bar's case, then by work
    "full": [
        BAR_CASE,
        *sorted(
            ((rows, tokens) for rows in ROWS for tokens in (1024, 4096, 16_384)), key=lambda case: case[0] * case[1]
        ),
    ],
    "small": [(600, 32)],
}


def make_layer(rows: int, options: dict[str, Any], mode: Any = None, frozen_rows: Any = "device") -> Any:
    """An output layer tied to an input table, shrunk where a mode is given."""
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
        lv.shrink_(model, lv.PartialVocabulary(kept_rows(rows, options), rows), output=mode, frozen_rows=frozen_rows)
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

    def lean(mode: str, frozen_rows: str = "device") -> Callable[[], tuple[Any, Callable[..., Any]]]:
        def make() -> tuple[Any, Callable[..., Any]]:
            model = make_layer(rows, options, mode, frozen_rows)
            return model, lambda hidden, labels: F.cross_entropy(model.output(hidden), labels)

        return make

    found = {FROZEN: lean("frozen"), HOST: lean("frozen", "host"), RESTRICTED: lean("restricted")}
    found[PLAIN] = full(lambda hidden, weight, labels: F.cross_entropy(F.linear(hidden, weight), labels))
    if hasattr(F, "linear_cross_entropy"):
        for name, chosen in CHUNKED.items():
            chunks = torch.nn.LinearCrossEntropyOptions(**chosen(tokens))
            found[name] = full(lambda h, w, y, chunks=chunks: F.linear_cross_entropy(h, w, y, options=chunks))
    if options["device"] == "cuda" and installed("liger_kernel"):
        liger = importlib.import_module("liger_kernel.transformers.functional")
        found[LIGER] = full(liger.liger_fused_linear_cross_entropy)
    if options["device"] == "cuda" and installed("cut_cross_entropy"):
        found[CCE] = full(importlib.import_module("cut_cross_entropy").linear_cross_entropy)
    return found


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


def program(make: Callable[[], tuple[Any, Callable[..., Any]]], rows: int, tokens: int, options: dict[str, Any]) -> Any:
    """(a forward and backward, the optimizer's step of the matrix, which lets go of the gradients)."""
    import torch

    model, loss = make()
    hidden, labels = make_inputs(rows, tokens, options)
    optimizer = torch.optim.AdamW([model.output.weight], lr=1e-6, weight_decay=0.0, fused=True)

    def forward_and_backward() -> float:
        value = loss(hidden, labels)
        value.backward()
        return float(value.detach())

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()
        hidden.grad = None

    return forward_and_backward, step


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
    """Seconds of losses and of steps, in turn, and each program's first loss."""
    options, size = json.loads(given), (int(rows), int(tokens))
    makers = {who: make for who, make in losses(*size, options).items() if not does_not_fit(who, *size, options)}
    parts: dict[str, list[float]] = {}
    steps: dict[str, list[float]] = {who: [] for who in makers}
    values: dict[str, float] = {}
    programs: dict[str, Callable[[], Any]] = {}

    def run(who: str) -> Callable[[], Any]:
        if who not in programs:
            forward, step = program(makers[who], *size, options)
            values[who] = forward()  # warms up
            step()
            programs[who] = lambda: (forward, step)
        return programs[who]

    def measured(work: Callable[[], Any]) -> float:
        forward, step = work()
        taken = synchronized(forward, options["device"])
        parts.setdefault("step", []).append(synchronized(step, options["device"]))
        return taken

    # As many in memory at once as fit: beside leanvocab's frozen loss, one other at a time.
    found: dict[str, Any] = {"losses": {}, "steps": {}, "values": values}
    budget = Budget(float(seconds))
    others = [who for who in makers if who != FROZEN]
    for number, who in enumerate(others):
        parts.clear()
        pair = {FROZEN: run(FROZEN), who: run(who)}
        share = Budget(budget.left / (len(others) - number))
        taken = take_turns(pair, int(rounds), share, measured)
        order = [name for turn in range(len(taken[who])) for name in ([*pair] if turn % 2 == 0 else [*pair][::-1])]
        for name in pair:
            steps[name] = [value for value, of in zip(parts["step"], order, strict=True) if of == name]
        found["losses"][who] = [taken[FROZEN], taken[who]]
        found["steps"][who] = [steps[FROZEN], steps[who]]
        del programs[who], pair
        gc.collect()
    products = matrix_products(*size, options)
    taken = take_turns({PRODUCTS: products}, 3, budget, lambda work: synchronized(work, options["device"]))
    found["products"] = taken[PRODUCTS]
    return found


def memory_of(rows: str, tokens: str, given: str, who: str) -> int:
    """Peak of this process in its first forward and backward at this size, beyond the layer and its inputs."""
    from leanvocab.peak import record_peak

    options = json.loads(given)
    make_small = losses(600, 16, options)[who]
    program(make_small, 600, 16, options)[0]()  # what it loads is no part of what it takes
    forward, _ = program(losses(int(rows), int(tokens), options)[who], int(rows), int(tokens), options)
    gc.collect()
    with record_peak(0.0005) as peak:
        if options["device"] == "cuda":
            import torch

            start = torch.cuda.memory_allocated()
        forward()
    if options["device"] == "cuda":
        return int(peak.peak_cuda_allocated_bytes - start)
    return int(peak.anonymous_growth_bytes)


def child(what: str, *rest: str) -> Any:
    return time_case(*rest) if what == "time" else memory_of(*rest)


def case_name(rows: int, tokens: int) -> str:
    return f"{rows:,} rows, {tokens:,} tokens"


def run_case(options: argparse.Namespace, rows: int, tokens: int, seconds: float) -> tuple[list[Series], list[Figure]]:
    """Series of one size, and the bars where it is theirs."""
    given = json.dumps({name: getattr(options, name) for name in ("device", "dtype", "dim", "kept")})
    found = run_child(MODULE, "time", rows, tokens, options.rounds or 9, seconds * 2 / 3, given)
    case, series = case_name(rows, tokens), []
    full = {who for who in found["losses"] if not who.startswith(OURS)}
    ours = [value for who in found["losses"] for value in found["losses"][who][0]]
    for measure, pairs in (("loss, forward and backward", "losses"), ("loss and AdamW step of the matrix", "steps")):
        added = {who: _added(found, pairs, who) for who in found["losses"]}
        series.append(Series(measure, case, FROZEN, tuple(added[PLAIN if PLAIN in added else RESTRICTED][0]), "s"))
        for who, (beside, taken) in added.items():
            series.append(Series(measure, case, who, tuple(taken), "s", tuple(beside)))
    products = tuple(found["products"])
    series.append(Series("loss, forward and backward", case, PRODUCTS, products, "s", tuple(ours[: len(products)])))
    for who in [FROZEN, *found["losses"]]:
        grown = run_child(MODULE, "memory", rows, tokens, given, who)
        series.append(Series("memory of a loss beyond the layer's", case, who, (float(grown),), "bytes"))
    return series, list(bars(found, full, case, (rows, tokens) == BAR_CASE))


def _added(found: dict[str, Any], pairs: str, who: str) -> tuple[list[float], list[float]]:
    """Seconds of leanvocab's frozen loss and of another: of the loss, or of the loss and the step together."""
    ours, theirs = found["losses"][who]
    if pairs == "losses":
        return ours, theirs
    more = found["steps"][who]
    return [a + b for a, b in zip(ours, more[0], strict=True)], [a + b for a, b in zip(theirs, more[1], strict=True)]


def bars(found: dict[str, Any], full: set[str], case: str, barred: bool) -> Iterator[Figure]:
    """Frozen and restricted against the full model's fastest loss, and how far the frozen loss is from the plain one."""
    fastest = min(full, key=lambda who: statistics.median(found["losses"][who][1]))
    frozen, taken = found["losses"][fastest]
    ratios = [ours / its for ours, its in zip(frozen, taken, strict=True)]
    ratio = statistics.median(ratios)
    yield Figure(f"frozen / the fastest full loss ({fastest}), {case}", ratio, "×", 0.85 if barred else None)
    beside, restricted = found["losses"][RESTRICTED]
    share = statistics.median(mine / its for mine, its in zip(restricted, beside, strict=True))
    yield Figure(f"restricted / the fastest full loss, {case}", share * ratio, "×", 0.05 if barred else None)
    if PLAIN in found["values"]:
        plain, ours = found["values"][PLAIN], found["values"][FROZEN]
        yield Figure(f"frozen loss − plain loss, relative, {case}", abs(ours - plain) / plain, "", 1e-3)


def measure(options: argparse.Namespace) -> Iterator[Result]:
    budget = Budget(options.seconds)
    series: list[Series] = []
    figures: list[Figure] = []
    missing = [f"{who}: {NO_GPU}" if options.device == "cpu" else f"{who}: open: not installed" for who in (LIGER, CCE)]
    missing = [each for each in missing if not _runs(each, options.device)]
    cases = options.cases or CASES[options.size]
    last, last_work = 0.0, 1
    for number, (rows, tokens) in enumerate(cases):
        start, work = budget.spent, rows * tokens
        if number and budget.left < last * work / last_work / 4:
            missing.append(f"{case_name(rows, tokens)}: open: over the time budget of {options.seconds:.0f} s")
            continue
        settings = {"device": options.device, "dtype": options.dtype}
        missing += [reason for who in (PLAIN, *CHUNKED) if (reason := does_not_fit(who, rows, tokens, settings))]
        share = budget.left / 3 if (rows, tokens) == BAR_CASE else budget.left / min(4, len(cases) - number)
        made, found = run_case(options, rows, tokens, share)
        series, figures = series + made, figures + found
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


def _runs(reason: str, device: str) -> bool:
    package = "liger_kernel" if reason.startswith(LIGER) else "cut_cross_entropy"
    return device == "cuda" and installed(package)


def size_of(text: str) -> tuple[int, int]:
    rows, _, tokens = text.partition("x")
    return int(rows), int(tokens)


def main(arguments: list[str] | None = None) -> list[Result]:
    made = parser(ABOUT)
    made.add_argument("--cases", type=size_of, nargs="+", help="ROWSxTOKENS, such as 262144x512")
    made.add_argument("--dim", type=int)
    made.add_argument("--kept", type=int, default=KEPT)
    options = read_options(made, arguments)
    options.dim = options.dim or (DIM if options.size == "full" else 16)
    return finish(measure(options), options)


if __name__ == "__main__":
    run_module(child, main)
