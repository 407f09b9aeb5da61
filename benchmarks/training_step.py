"""One training step: time and memory with a partial and the full vocabulary, and what else people use to save memory.

A checkpoint of random weights and a published size is made once. Each program is a process that loads it and takes steps of
the same batches (fused AdamW, gradients clipped to norm 1 as the Trainer does). leanvocab's process takes a step before or
after each step of a peer's, in turn, so that ratios are taken pair by pair. Full fine-tuning, leanvocab and the authors' code
must give equal losses on CPU. Memory is taken over two further steps: on CPU the growth of the process beyond what it held
before the model was loaded, on CUDA what torch allocated and reserved; weights, gradients and states are added up tensor by
tensor, and activations are what is left of the peak. `--device paper` counts the bytes of the programs that are PyTorch alone.
"""

import argparse
import gc
import importlib
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks._command import About, finish, parser, read_options
from benchmarks._models import SHAPES, kept_ids, make_model, save_model
from benchmarks._paper import PAPER, peak_of
from benchmarks._peers import AUTHORS, NO_AUTHORS_CODE, NO_GPU, authors_module, installed
from benchmarks._results import OURS, Figure, Result, Series, median_interval, versions
from benchmarks._rounds import Budget, Worker, answer, run_module, turns, worker

ABOUT = About(
    name="training_step",
    measures="One training step: time, peak memory, and its split into weights, gradients, states and activations.",
    beside="full fine-tuning, the authors' code, frozen embeddings, PEFT trainable tokens, LoRA, 8-bit Adam, sparse gradients",
    limit="16 bytes × parameters that remain + activations",
    budget_seconds=400,
)
MODULE = "benchmarks.training_step"
FULL, FROZEN, TOKENS = "full fine-tuning", "frozen embeddings", "PEFT trainable tokens"
LORA, LORA_LEAN = "LoRA", "LoRA under leanvocab"
ADAM8, ADAM8_LEAN = "8-bit Adam", "8-bit Adam under leanvocab"
SPARSE, OFFLOAD = "sparse embedding gradients", "optimizer offload"


@dataclass(frozen=True)
class Case:
    """Programs beside leanvocab, the most pairs beside full fine-tuning (others: 9), its bar, a batch, a share of the time."""

    beside: tuple[str, ...]
    most_pairs: int
    bar: float | None
    batch: tuple[int, int]
    share: float


_ALL = (AUTHORS, FULL, FROZEN, TOKENS, LORA, LORA_LEAN, SPARSE, OFFLOAD, ADAM8, ADAM8_LEAN)
CASES = {  # full fine-tuning after what takes few pairs, so that it has the rest of the time
    "bert-qqp": Case((AUTHORS, FULL), 60, None, (4, 32), 0.42),
    "xlm-r-base": Case(_ALL, 12, 0.5, (8, 64), 0.58),
    "tiny": Case((AUTHORS, FULL, FROZEN, LORA_LEAN, SPARSE), 4, None, (2, 8), 1.0),
}
OTHER = Case(_ALL, 12, None, (8, 64), 1.0)
SIZES = {"full": ["bert-qqp", "xlm-r-base"], "small": ["tiny"]}


@dataclass
class Program:
    """A model ready to train: its optimizers, and what stands between a batch's ids and the model."""

    model: Any
    optimizers: list[Any]
    remap: Callable[[Any], Any] = lambda ids: ids
    losses: list[float] = field(default_factory=list)


def adamw(model: Any) -> list[Any]:
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=True)]


def shrunk(model: Any, ids: Any) -> Any:
    import leanvocab as lv

    lv.shrink_(model, lv.PartialVocabulary(ids, model.get_input_embeddings().num_embeddings))
    return model


def with_authors(model: Any, ids: Any, options: dict[str, Any]) -> Program:
    """The authors rewrite the data: batches come in partial ids, which here is no part of the step."""
    import torch

    pruner = authors_module(options["authors_code"], "embedding_pruner").EmbeddingPruner()
    remap = torch.full((model.get_input_embeddings().num_embeddings,), -1, device=model.device)
    remap[torch.from_numpy(ids)] = torch.arange(len(ids), device=model.device)
    pruner.prepare(model, model.get_input_embeddings(), torch.from_numpy(ids))
    return Program(model, adamw(model), lambda batch: remap[batch])


def with_frozen_embeddings(model: Any, ids: Any, options: dict[str, Any]) -> Program:
    model.get_input_embeddings().weight.requires_grad_(False)
    return Program(model, adamw(model))


def with_trainable_tokens(model: Any, ids: Any, options: dict[str, Any]) -> Program:
    """Only the kept rows train, and the classifier: what PEFT's method does by itself."""
    import peft

    name = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    config = peft.TrainableTokensConfig(target_modules=[name], token_indices=ids.tolist(), task_type="SEQ_CLS")
    model = peft.get_peft_model(model, config)
    return Program(model, adamw(model))


def with_lora(model: Any, ids: Any, options: dict[str, Any]) -> Program:
    import peft

    model = peft.get_peft_model(model, peft.LoraConfig(r=8, task_type="SEQ_CLS"))
    return Program(model, adamw(model))


def with_8bit_adam(model: Any, ids: Any, options: dict[str, Any]) -> Program:
    """torchao's on CPU (its kernels are compiled in the first step), bitsandbytes' or torchao's on CUDA."""
    if options["device"] == "cuda" and installed("bitsandbytes"):
        optim = importlib.import_module("bitsandbytes.optim")
        return Program(model, [optim.AdamW8bit(model.parameters(), lr=1e-5, weight_decay=0.0)])
    return Program(model, [torchao_optim(options).AdamW8bit(model.parameters(), lr=1e-5, weight_decay=0.0)])


def torchao_optim(options: dict[str, Any]) -> Any:
    sys.path += [options["torchao"]] if options["torchao"] else []
    return importlib.import_module("torchao.optim")


def with_sparse_gradients(model: Any, ids: Any, options: dict[str, Any]) -> Program:
    """torch's own: a sparse gradient, and SparseAdam (whose moments are not dense Adam's) for the table."""
    import torch

    table = model.get_input_embeddings()
    table.sparse = True
    others = [parameter for parameter in model.parameters() if parameter is not table.weight]
    dense = torch.optim.AdamW(others, lr=1e-5, weight_decay=0.0, fused=True)
    return Program(model, [dense, torch.optim.SparseAdam([table.weight], lr=1e-5)])


def with_offload(model: Any, ids: Any, options: dict[str, Any]) -> Program:
    """torchao's: states and the step on the host."""
    import torch

    optimizer = torchao_optim(options).CPUOffloadOptimizer(
        model.parameters(), torch.optim.AdamW, lr=1e-5, weight_decay=0.0
    )
    return Program(model, [optimizer])


MAKERS: dict[str, Callable[[Any, Any, dict[str, Any]], Program]] = {
    OURS: lambda model, ids, options: Program(shrunk(model, ids), adamw(model)),
    FULL: lambda model, ids, options: Program(model, adamw(model)),
    AUTHORS: with_authors,
    FROZEN: with_frozen_embeddings,
    TOKENS: with_trainable_tokens,
    LORA: with_lora,
    LORA_LEAN: lambda model, ids, options: with_lora(shrunk(model, ids), ids, options),
    ADAM8: with_8bit_adam,
    ADAM8_LEAN: lambda model, ids, options: with_8bit_adam(shrunk(model, ids), ids, options),
    SPARSE: with_sparse_gradients,
    OFFLOAD: with_offload,
}


def make_batches(ids: Any, options: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Ids and labels, the same for every program."""
    import torch

    generator = torch.Generator().manual_seed(0)
    kept = torch.from_numpy(ids)
    shape = options["batch_size"], options["length"]
    while True:
        drawn = kept[torch.randint(2, len(kept), shape, generator=generator)]
        labels = torch.randint(0, 2, shape[:1], generator=generator)
        yield drawn.to(options["device"]), labels.to(options["device"])


def clip(parameters: list[Any]) -> None:
    """To norm 1, as the Trainer does; torch's own function takes no sparse gradients."""
    import torch

    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not any(gradient.is_sparse for gradient in gradients):
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        return
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
    values = [p.grad.values() if p.grad.is_sparse else p.grad for p in parameters if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(each) for each in values]))
    for each in values:
        each.mul_((1.0 / (norm + 1e-6)).clamp(max=1.0))


def take_step(program: Program, batches: Iterator[tuple[Any, Any]], split: dict[str, int] | None = None) -> float:
    """Forward, backward, clipping, step; the loss. `split` is filled with bytes just before gradients are let go."""
    import torch

    token_ids, labels = next(batches)
    torch.manual_seed(0)
    loss = program.model(input_ids=program.remap(token_ids), labels=labels).loss
    loss.backward()
    clip([parameter for parameter in program.model.parameters() if parameter.requires_grad])
    for optimizer in program.optimizers:
        optimizer.step()
    if split is not None:
        split |= bytes_of(program)
    for optimizer in program.optimizers:
        optimizer.zero_grad()
    return float(loss.item())


def bytes_of(program: Program) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer states, tensor by tensor."""
    from leanvocab.reports.state_bytes import held_bytes

    return held_bytes(program.model.parameters(), [optimizer.state for optimizer in program.optimizers])


def memory_of(program: Program, batches: Iterator[Any], start: dict[str, int], device: str) -> dict[str, int]:
    """Peaks over two steps beyond what the process held before the model was loaded, and the split."""
    from leanvocab.reports.peak import record_peak

    split: dict[str, int] = {}
    with record_peak() as peak:
        for _ in range(2):
            take_step(program, batches, split)
    if device == "cuda":
        found = {"peak": peak.peak_cuda_allocated_bytes, "reserved": peak.peak_cuda_reserved_bytes}
    else:
        found = {
            "peak": peak.peak_anonymous_bytes - start["anonymous"],
            "resident": peak.peak_rss_bytes - start["resident"],
        }
    return found | split | {"rest": found["peak"] - sum(split.values())}


def prepare(who: str, folder: str, size: str, given: str) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    """A worker's answers to questions, and its first: it loads the checkpoint, makes the program, takes steps when asked."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from leanvocab.reports.peak import record_peak

    options = json.loads(given)
    warnings.simplefilter("ignore")  # that 8-bit states mix rows is said once, in the documentation
    warm_up(who, options)
    with record_peak() as before:
        gc.collect()
    start = {"anonymous": before.end_anonymous_bytes, "resident": before.end_rss_bytes}
    dtype = getattr(torch, options["dtype"])
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype).train().to(options["device"])
    ids = kept_ids(size, options["kept"])
    program = MAKERS[who](model, ids, options)
    del model
    batches = make_batches(ids, options)

    def step() -> dict[str, float]:
        synchronize(options["device"])
        begin = time.perf_counter()
        loss = take_step(program, batches)
        synchronize(options["device"])
        return {"seconds": time.perf_counter() - begin, "loss": loss}

    trained = sum(parameter.numel() for parameter in program.model.parameters() if parameter.requires_grad)
    memory = lambda: memory_of(program, batches, start, options["device"])  # noqa: E731
    return {"step": step, "memory": memory}, {"trained": trained}


def warm_up(who: str, options: dict[str, Any]) -> None:
    """A step of the same program with a tiny model: what it imports is no part of what a model takes."""
    program = MAKERS[who](make_model("tiny", options["dtype"], options["device"]), kept_ids("tiny"), options)
    take_step(program, make_batches(kept_ids("tiny"), options | {"length": 8}))


def synchronize(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


@dataclass
class Pairs:
    """Seconds that leanvocab and a peer took in the same rounds, and the memory of the peer's process."""

    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)


def beside(lean: Worker, who: str, words: list[Any], budget: Budget, num_pairs: int) -> Pairs:
    """Steps of leanvocab and of a peer in turn, after two of the peer's alone; then the peer's memory."""
    found = Pairs()
    with worker(MODULE, who, *words) as peer:
        for _ in range(2):
            found.losses.append(peer.ask("step")["loss"])
        for name in turns((OURS, who), num_pairs, budget, spare=2):  # the memory takes two more steps
            taken = (lean if name == OURS else peer).ask("step")
            (found.ours if name == OURS else found.theirs).append(taken["seconds"])
            if name == who:
                found.losses.append(taken["loss"])
        found.memory = peer.ask("memory")
    return found


def why_open(who: str, options: argparse.Namespace) -> str | None:
    """Reason why a program cannot run here, None where it can."""
    if who == AUTHORS and not options.authors_code:
        return NO_AUTHORS_CODE
    if who == OFFLOAD and options.device == "cpu":
        return f"{OFFLOAD}: {NO_GPU}; on CPU the states lie in host memory anyway"
    if who in (OFFLOAD, ADAM8, ADAM8_LEAN) and not (options.torchao or installed("torchao")):
        return f"{who}: open: torchao is not here; install it, or give --torchao, a folder that holds it"
    return None


def measure_case(options: argparse.Namespace, size: str, budget: Budget) -> Result:
    case = CASES.get(size, OTHER)
    batch = options.batch_size or case.batch[0], options.length or case.batch[1]
    settings = {"batch_size": batch[0], "length": batch[1], "kept": options.kept}
    settings |= {"device": options.device, "dtype": options.dtype}
    settings |= {"authors_code": str(options.authors_code or ""), "torchao": str(options.torchao or "")}
    missing = [reason for who in case.beside if (reason := why_open(who, options))]
    names = [who for who in case.beside if not why_open(who, options)]
    found: dict[str, Pairs] = {}
    with tempfile.TemporaryDirectory() as folder:
        save_model(size, Path(folder, "base"))
        words = [str(Path(folder, "base")), size, json.dumps(settings)]
        with worker(MODULE, OURS, *words) as lean:
            losses = [lean.ask("step")["loss"]]
            ours = lean.ask("memory")
            for number, who in enumerate(names):
                left = names[number:]
                share = budget.left / (len(left) + (FULL in left)) * (2 if who == FULL else 1)
                pairs = options.rounds or (case.most_pairs if who == FULL else min(case.most_pairs, 9))
                try:
                    found[who] = beside(lean, who, words, Budget(share), pairs)
                except (RuntimeError, BrokenPipeError) as error:
                    missing.append(f"{who}: open: it failed: {error}")
            trained = lean.ready["trained"]
    check_losses(found, losses, options.device)
    return Result(
        ABOUT.name,
        f"A training step: {size}, {settings['kept'] or SHAPES[size].kept:,} of {SHAPES[size].rows:,} rows, batch "
        f"{batch[0]} × {batch[1]}, {options.dtype} on {options.device}",
        f"{size} {options.dtype}",
        options.device,
        (*time_series(found), *memory_series(found, ours, trained)),
        tuple(figures_of(found, ours, trained, case.bar, options.device)),
        tuple(missing) if options.device == "cuda" else (*missing, f"time and memory on CUDA: {NO_GPU} in this run"),
        budget.spent,
        budget.seconds,
    )


ON_PAPER = (OURS, FULL, FROZEN, TOKENS, LORA, LORA_LEAN)  # the others are kernels of their own, sparse, or on the host


def count_case(options: argparse.Namespace, size: str) -> Result:
    """Peaks of a step on paper and their split, where nothing takes time."""
    budget, case = Budget(options.seconds), CASES.get(size, OTHER)
    batch = options.batch_size or case.batch[0], options.length or case.batch[1]
    settings = {"batch_size": batch[0], "length": batch[1], "kept": options.kept, "dtype": options.dtype}
    names = [who for who in ON_PAPER if who == OURS or who in case.beside]
    found = {who: Pairs(memory=counted(who, size, settings)) for who in names}
    ours = found.pop(OURS).memory
    trained = ours["trained"]
    kept, rows = options.kept or SHAPES[size].kept, SHAPES[size].rows
    title = (
        f"A training step, counted: {size}, {kept:,} of {rows:,} rows, batch {batch[0]} × {batch[1]}, {options.dtype}"
    )
    series = [replace(each, measure=f"counted: {each.measure}") for each in memory_series(found, ours, trained)]
    left_out = tuple(f"{who}: open: not on paper" for who in case.beside if who not in names)
    return Result(
        ABOUT.name, title, f"{size} {options.dtype}", PAPER, tuple(series), (), left_out, budget.spent, budget.seconds,
        machine=versions(),
    )  # fmt: skip


def counted(who: str, size: str, settings: dict[str, Any]) -> dict[str, int]:
    """The peak of one program's step, its split, and the number of parameters that train."""
    warnings.simplefilter("ignore")
    ids = kept_ids(size, settings["kept"])
    split: dict[str, int] = {}

    def prepare(device: str) -> Any:
        options = settings | {"device": device}
        program = MAKERS[who](make_model(size, settings["dtype"], device, filled=False), ids, options)
        batches = make_batches(ids, options)
        trained = sum(parameter.numel() for parameter in program.model.parameters() if parameter.requires_grad)

        def step() -> int:
            take_step(program, batches, split)
            return trained

        return step

    peak, trained = peak_of(prepare)
    return {"peak": peak, **split, "rest": peak - sum(split.values()), "trained": trained}


def check_losses(found: dict[str, Pairs], losses: list[float], device: str) -> None:
    """Programs that are the same training must give the same numbers; leanvocab's first is before its memory steps."""
    same = [found[who].losses for who in (FULL, AUTHORS) if who in found]
    if device == "cpu" and same:
        assert same[0][0] == losses[0], f"losses differ: {same[0][0]} and leanvocab's {losses[0]}"
        assert all(a == b for a, b in zip(*same, strict=False)) if len(same) > 1 else True, same


def time_series(found: dict[str, Pairs]) -> Iterator[Series]:
    yield Series("time", "a step", OURS, tuple(found[FULL].ours if FULL in found else ()), "s")
    for who, pairs in found.items():
        yield Series("time", "a step", who, tuple(pairs.theirs), "s", tuple(pairs.ours))


def memory_series(found: dict[str, Pairs], ours: dict[str, int], trained: int) -> Iterator[Series]:
    """Peaks and the split of every program, a case each."""
    kinds = [
        kind for kind in ("peak", "resident", "reserved", "weights", "gradients", "states", "rest") if kind in ours
    ]
    names = {"rest": "activations and the rest", "peak": "peak", "resident": "peak resident"}
    for kind in kinds:
        case = names.get(kind, kind)
        yield Series("memory", case, OURS, (ours[kind],), "bytes")
        for who, pairs in found.items():
            yield Series("memory", case, who, (pairs.memory[kind],), "bytes", (ours[kind],))
    if FROZEN in found:
        least = 16 * trained + found[FROZEN].memory["rest"]
        yield Series("memory", "peak", "limit: 16 bytes a parameter + activations", (least,), "bytes", (ours["peak"],))


def figures_of(
    found: dict[str, Pairs], ours: dict[str, int], trained: int, bar: float | None, device: str
) -> Iterator[Figure]:
    """A step against full fine-tuning's, with the interval of the median; the peak against the limit."""
    if FULL in found:
        pairs = found[FULL]
        ratios = [partial / whole for partial, whole in zip(pairs.ours, pairs.theirs, strict=True)]
        low, high = median_interval(ratios)
        yield Figure("leanvocab / full, median of the pairs' ratios", statistics.median(ratios), "×", bar)
        yield Figure("the ratio's 95 % interval reaches down to", low, "×", None if bar else 1.0)
        yield Figure("the ratio's 95 % interval reaches up to", high, "×")
        yield Figure("pairs", len(ratios), "")
    if FROZEN in found:
        least = 16 * trained + found[FROZEN].memory["rest"]
        yield Figure("peak / limit", ours["peak"] / least, "×", 1.05 if device == "cuda" else None)


def measure(options: argparse.Namespace) -> Iterator[Result]:
    budget = Budget(options.seconds)
    sizes = options.models or SIZES[options.size]
    if options.device == PAPER:
        yield from (count_case(options, size) for size in sizes)
        return
    shares = [CASES.get(size, OTHER).share for size in sizes]
    for number, size in enumerate(sizes):
        yield measure_case(options, size, Budget(budget.left * shares[number] / sum(shares[number:])))


def main(arguments: list[str] | None = None) -> list[Result]:
    made = parser(ABOUT, counts=True)
    classifiers = [name for name, shape in SHAPES.items() if shape.task == "classifier"]
    made.add_argument("--models", nargs="+", choices=classifiers)
    made.add_argument("--kept", type=int, help="rows to keep")
    made.add_argument("--batch-size", type=int)
    made.add_argument("--length", type=int)
    options = read_options(made, arguments)
    return finish(measure(options), options)


def child(*words: str) -> None:
    answer(*prepare(*words))


if __name__ == "__main__":
    run_module(child, main)
