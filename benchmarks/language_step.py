"""A language model's training step: time, peak memory, and what its vocabulary matrix holds, in every output mode.

A checkpoint of random weights and a published size (or one of your own: `--model`) is made once. Each program is a process
that loads it and takes steps of the same batches with fused AdamW. Full fine-tuning comes with two losses: transformers' own,
which makes all logits, and torch's chunked one on the hidden states, the leanest that there is on every device. Times are
taken in turns with the frozen mode; memory is the peak of two further steps, beyond what the process held before the model
was loaded. `--device paper` counts the bytes of the same programs on a GPU, and takes no time.
"""

import argparse
import gc
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks._command import About, finish, parser, read_options
from benchmarks._models import SHAPES, kept_ids, make_model, save_model
from benchmarks._paper import PAPER, peak_of
from benchmarks._results import OURS, Figure, Result, Series, versions
from benchmarks._rounds import Budget, Worker, answer, serve_or_run, take_turns, worker

ABOUT = About(
    name="language_step",
    measures="A language model's training step in every output mode: time, peak memory, bytes of the vocabulary matrix.",
    beside="full fine-tuning with transformers' loss, and with torch's chunked loss",
    limit="16 bytes × kept rows; activations",
    budget_seconds=230,
)
MODULE = "benchmarks.language_step"
FULL, CHUNKED = "full fine-tuning", "full fine-tuning, torch's chunked loss"
FROZEN, HOST, RESTRICTED = f"{OURS}, frozen", f"{OURS}, frozen rows on the host", f"{OURS}, restricted"
PROGRAMS = (FULL, CHUNKED, FROZEN, HOST, RESTRICTED)
MODELS = {"full": ["smollm2-135m", "gemma-3-270m"], "small": ["tiny-lm"]}


def programs() -> dict[str, str]:
    """Programs by name, each with the reason why it cannot run here; empty where it can."""
    import torch.nn.functional as F

    absent = "" if hasattr(F, "linear_cross_entropy") else f"{CHUNKED}: open: this release of torch has no such loss"
    return {who: absent if who == CHUNKED else "" for who in PROGRAMS}


def load(who: str, folder: str, ids: Any, dtype: str, device: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).train().to(device)
    return in_mode(who, model, ids)


def in_mode(who: str, model: Any, ids: Any) -> Any:
    import leanvocab as lv

    if who not in (FULL, CHUNKED):
        vocabulary = lv.PartialVocabulary(ids, model.get_input_embeddings().num_embeddings)
        frozen_rows: Any = "host" if who == HOST else "device"
        lv.shrink_(model, vocabulary, output="restricted" if who == RESTRICTED else "frozen", frozen_rows=frozen_rows)
    return model


def loss_of(who: str, model: Any, token_ids: Any) -> Any:
    """The next-token loss; the chunked one computes it from the hidden states, and no logits."""
    if who != CHUNKED:
        return model(input_ids=token_ids, labels=token_ids).loss
    import torch.nn.functional as F

    hidden = model.model(input_ids=token_ids).last_hidden_state[:, :-1].flatten(0, 1)
    return F.linear_cross_entropy(hidden, model.lm_head.weight, token_ids[:, 1:].flatten())


def serve(who: str, folder: str, size: str, batch: str, length: str, kept: str, dtype: str, device: str) -> None:
    """A worker: loads the checkpoint and takes steps when asked."""
    import torch

    from leanvocab.reports.peak import record_peak

    warnings.simplefilter("ignore")  # it says that restricted is another objective
    ids = kept_ids(size, int(kept)) if size in SHAPES else _first_ids(folder, int(kept))
    with tempfile.TemporaryDirectory() as warm:  # what a step imports and loads is no part of what it takes
        make_model("tiny-lm").save_pretrained(warm)
        small = load(who, warm, kept_ids("tiny-lm"), dtype, device)
        loss_of(who, small, torch.from_numpy(kept_ids("tiny-lm"))[:8].view(1, 8).to(device)).backward()
        del small
        gc.collect()
    with record_peak() as before:
        gc.collect()
    model = load(who, folder, ids, dtype, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    generator, kept_tensor = torch.Generator().manual_seed(0), torch.from_numpy(ids)
    held: dict[str, int] = {}

    def step() -> dict[str, float]:
        drawn = kept_tensor[torch.randint(len(ids), (int(batch), int(length)), generator=generator)].to(device)
        start = time.perf_counter()
        loss = loss_of(who, model, drawn)
        loss.backward()
        optimizer.step()
        held.update(matrix_bytes(model, optimizer))
        optimizer.zero_grad()
        value = float(loss.detach())
        return {"seconds": time.perf_counter() - start, "loss": value}

    def memory() -> dict[str, int]:
        with record_peak() as peak:
            step()
            step()
        if device == "cuda":
            return {"peak": peak.peak_cuda_allocated_bytes, **held}
        return {"peak": peak.peak_anonymous_bytes - before.end_anonymous_bytes, **held}

    answer({"step": step, "memory": memory}, {"kept": len(ids), "rows": model.get_input_embeddings().num_embeddings})


def _first_ids(folder: str, kept: int) -> Any:
    import numpy as np
    from transformers import AutoConfig

    rows = AutoConfig.from_pretrained(folder).get_text_config().vocab_size
    return np.sort(np.random.default_rng(0).choice(rows, kept, replace=False))


def matrix_bytes(model: Any, optimizer: Any) -> dict[str, int]:
    """Weight, gradient and states of the tied vocabulary matrix."""
    from leanvocab.reports.state_bytes import held_bytes

    weight = model.get_input_embeddings().weight
    states = {
        name: value for name, value in optimizer.state[weight].items() if value.ndim > 0
    }  # without the count of steps
    return {"matrix": sum(held_bytes([weight], states).values())}


def measure_model(options: argparse.Namespace, name: str, folder: str, budget: Budget) -> Result:
    batch, length = options.batch_size, options.length
    words = [folder, name, batch, length, options.kept or _kept(name), options.dtype, options.device]
    series: list[Series] = []
    peaks: dict[str, dict[str, int]] = {}
    sizes: dict[str, int] = {}
    with worker(MODULE, FROZEN, *words) as frozen:
        sizes = frozen.ready
        frozen.ask("step")
        names = [who for who, absent in programs().items() if not absent]
        for number, who in enumerate(name for name in names if name != FROZEN):
            with worker(MODULE, who, *words) as other:
                other.ask("step")
                ours, theirs = in_turns(frozen, other, options.rounds or 8, Budget(budget.left / (5 - number)))
                series.append(Series("training step", "seconds", who, tuple(theirs), "s", tuple(ours)))
                peaks[who] = other.ask("memory")
        series.insert(0, Series("training step", "seconds", FROZEN, tuple(ours), "s"))
        peaks[FROZEN] = frozen.ask("memory")
    for who in names:
        series.append(Series("peak of a step beyond the start", "bytes", who, (float(peaks[who]["peak"]),), "bytes"))
        series.append(
            Series("weight, gradient, states of the matrix", "bytes", who, (float(peaks[who]["matrix"]),), "bytes")
        )
    title = f"{name}: {sizes['kept']:,} of {sizes['rows']:,} rows, {batch} × {length} tokens, {options.dtype}"
    figures, missing = (
        tuple(bars(peaks, sizes["kept"] / sizes["rows"], series)),
        tuple(filter(None, programs().values())),
    )
    subject = subject_of(name, options.dtype)
    return Result(
        ABOUT.name, title, subject, options.device, tuple(series), figures, missing, budget.spent, budget.seconds
    )


def subject_of(name: str, dtype: str) -> str:
    return name if dtype == "float32" else f"{name} {dtype}"


def in_turns(first: Worker, second: Worker, rounds: int, budget: Budget) -> tuple[list[float], list[float]]:
    """Seconds of steps, in turn; one pair at least, more while the budget lasts."""
    steps = {"first": partial(first.ask, "step"), "second": partial(second.ask, "step")}
    taken = take_turns(steps, rounds, budget, lambda step: step()["seconds"])
    return taken["first"], taken["second"]


def bars(peaks: dict[str, dict[str, int]], kept_ratio: float, series: list[Series]) -> Iterator[Figure]:
    full = peaks[FULL]["matrix"]
    leanest = min((who for who in (FULL, CHUNKED) if who in peaks), key=lambda who: peaks[who]["peak"])
    for who in (FROZEN, HOST, RESTRICTED):
        error = abs(peaks[who]["matrix"] / full / kept_ratio - 1)
        yield Figure(f"{who}: bytes of the matrix, off the arithmetic", error, "", 0.02)
        yield Figure(
            f"{who}: peak / the leanest full step's ({leanest})", peaks[who]["peak"] / peaks[leanest]["peak"], "×", 1.0
        )
    for each in series:
        if each.unit == "s" and each.ratio is not None and each.who in (FULL, CHUNKED):
            yield Figure(f"{FROZEN}: step / that of {each.who}", statistics.median(
                ours / theirs for ours, theirs in zip(each.beside, each.values, strict=True)
            ), "×")  # fmt: skip


def _kept(name: str) -> int:
    return SHAPES[name].kept if name in SHAPES else 5_000


def count_model(options: argparse.Namespace, name: str) -> Result:
    """Peaks on paper, of every program."""
    budget, kept = Budget(options.seconds), options.kept or _kept(name)
    words = name, kept_ids(name, kept), options.dtype, (options.batch_size, options.length)
    peaks = {who: counted(who, *words) for who in PROGRAMS}
    ours = {who: peaks[FROZEN] for who in PROGRAMS if who != FROZEN}
    series = [
        Series(
            f"counted: {measure}",
            "bytes",
            who,
            (float(its[part]),),
            "bytes",
            (float(ours[who][part]),) if who in ours else (),
        )
        for measure, part in (
            ("peak of a step beyond the start", "peak"),
            ("weight, gradient, states of the matrix", "matrix"),
        )
        for who, its in peaks.items()
    ]
    rows = SHAPES[name].rows
    title = (
        f"{name}, counted: {kept:,} of {rows:,} rows, {options.batch_size} × {options.length} tokens, {options.dtype}"
    )
    figures = tuple(bars(peaks, kept / rows, series))
    return Result(
        ABOUT.name, title, subject_of(name, options.dtype), PAPER, tuple(series), figures, (), budget.spent, budget.seconds,
        machine=versions(),
    )  # fmt: skip


def counted(who: str, name: str, ids: Any, dtype: str, shape: tuple[int, int]) -> dict[str, int]:
    """The peak of one program's step, and what the matrix holds in it."""
    import torch

    warnings.simplefilter("ignore")  # it says that restricted is another objective

    def prepare(device: str) -> Any:
        model = in_mode(who, make_model(name, dtype, device, filled=False), ids)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
        drawn = torch.from_numpy(ids)[torch.randint(len(ids), shape)].to(device)

        def step() -> dict[str, int]:
            loss_of(who, model, drawn).backward()
            optimizer.step()
            held = matrix_bytes(model, optimizer)
            optimizer.zero_grad()
            return held

        return step

    peak, held = peak_of(prepare)
    return {"peak": peak, **held}


def measure(options: argparse.Namespace) -> Iterator[Result]:
    if options.device == PAPER:
        yield from (count_model(options, name) for name in options.models or MODELS[options.size])
        return
    names = [str(options.model)] if options.model else options.models or MODELS[options.size]
    budget = Budget(options.seconds)
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            if options.model is None:
                save_model(name, Path(folder))
            yield measure_model(options, name, str(options.model or folder), budget.part(1 / len(names)))


def main(arguments: list[str] | None = None) -> list[Result]:
    made = parser(ABOUT, counts=True)
    made.add_argument("--model", type=Path, help="a causal language model's folder; several published sizes by default")
    made.add_argument("--models", nargs="+", choices=SHAPES)
    made.add_argument("--batch-size", type=int, default=4)
    made.add_argument("--length", type=int, default=128)
    made.add_argument("--kept", type=int, help="kept rows (5,000)")
    options = read_options(made, arguments)
    return finish(measure(options), options)


if __name__ == "__main__":
    serve_or_run(serve, main)
