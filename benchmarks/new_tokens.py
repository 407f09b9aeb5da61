"""New tokens alone: ten rows train, everything else is frozen. Beside PEFT's trainable tokens, which train the same rows.

Each program is a process of its own with the same random weights of a published size and ten more rows, at work on the same
batch, which has all ten; steps are taken in turns. Memory is what torch's profiler sees allocated and freed in a step, beyond
what is held between steps. PEFT has its tied adapter, which trains the ten rows once for both matrices, and no options beside.
Then each saves a full model, which is loaded plainly.
"""

import argparse
import dataclasses
import gc
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks._command import About, finish, parser, read_options
from benchmarks._models import SHAPES, make_model
from benchmarks._peers import installed
from benchmarks._results import OURS, Figure, Result, Series
from benchmarks._rounds import Budget, answer, serve_or_run, take_turns, worker

ABOUT = About(
    name="new_tokens",
    measures="Ten new tokens of a tied language model, all else frozen: time and peak memory of a step, logits after reloading.",
    beside="PEFT trainable tokens",
    limit="a step that holds no tensor of the whole matrix",
    budget_seconds=300,
)
MODULE = "benchmarks.new_tokens"
PEFT = "PEFT trainable tokens"
NUM_NEW, LENGTH = 10, 32
MODELS = {"full": "smollm2-135m", "small": "tiny-lm"}
STEPS_A_ROUND = {"full": 10, "small": 1}


def load(who: str, size: str) -> tuple[Any, list[int]]:
    """A model all of whose tensors are frozen but for the rows of its last ids, and these ids."""
    import peft

    import leanvocab as lv

    shape = SHAPES[size]
    rows = shape.rows + NUM_NEW
    SHAPES[f"{size}, resized"] = dataclasses.replace(shape, settings=shape.settings | {"vocab_size": rows})
    model, new_ids = make_model(f"{size}, resized").requires_grad_(False), list(range(shape.rows, rows))
    del SHAPES[f"{size}, resized"]
    if who == PEFT:
        config = peft.TrainableTokensConfig(token_indices=new_ids, target_modules=["embed_tokens"])
        return peft.get_peft_model(model, config), new_ids
    model.get_input_embeddings().weight.requires_grad_(True)
    return lv.shrink_(model, lv.PartialVocabulary(new_ids, rows), on_missing="frozen"), new_ids


def prepare(who: str, size: str, steps: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Questions that a worker answers, and what it trains."""
    import torch

    warnings.simplefilter("ignore")  # peft warns of ties, and reads deprecated attributes of transformers
    model, new_ids = load(who, size)
    ids = torch.randint(3, new_ids[0], (1, LENGTH), generator=torch.Generator().manual_seed(0))
    ids[0, 5 : 5 + NUM_NEW] = torch.tensor(new_ids)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    losses: list[float] = []

    def step() -> None:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    def timed() -> dict[str, float]:
        start = time.perf_counter()
        for _ in range(int(steps)):
            step()
        return {"seconds": (time.perf_counter() - start) / int(steps)}

    questions = {
        "step": timed,
        "memory": partial(peak_of_a_step, step, matrix_bytes(model, new_ids)),
        "reloaded": partial(reloaded, who, model, ids),
        "losses": lambda: losses,
    }
    timed()
    return questions, {"trained": sum(each.numel() for each in trained)}


def matrix_bytes(model: Any, new_ids: list[int]) -> int:
    """Bytes of all rows of the matrix."""
    weight = model.get_input_embeddings().weight
    return int((new_ids[-1] + 1) * weight.shape[1] * weight.element_size())


def peak_of_a_step(step: Any, matrix: int) -> dict[str, int]:
    """The most bytes that a step has allocated at once, and those of whole matrices among them."""
    from torch.profiler import ProfilerActivity, profile

    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    events = [each for each in seen.profiler.kineto_results.events() if each.name() == "[memory]"]  # type: ignore[union-attr]
    held = peak = dense = dense_at_peak = 0
    for each in sorted(events, key=lambda event: event.start_ns()):
        held += each.nbytes()
        dense += each.nbytes() if abs(each.nbytes()) >= matrix else 0
        if held > peak:
            peak, dense_at_peak = held, dense
    return {"peak": peak, "dense": dense_at_peak}


def reloaded(who: str, model: Any, ids: Any) -> dict[str, float]:
    """How far logits of the saved model, loaded plainly, are apart from those of the trained one as it stood in memory."""
    import torch
    from transformers import AutoModelForCausalLM

    import leanvocab as lv

    def logits(of: Any) -> Any:
        with torch.no_grad():
            return of.eval()(input_ids=ids).logits.clone()

    trained = logits(model)
    with tempfile.TemporaryDirectory() as folder:
        if who == PEFT:
            model = model.merge_and_unload()
            model.save_pretrained(folder)
        else:
            lv.save_full(model, folder)
            lv.merge_(model)
        there = logits(AutoModelForCausalLM.from_pretrained(folder))
    scale = trained.abs().max()
    apart = {"merged": logits(model), "trained": trained}
    return {name: float((each - there).abs().max() / scale) for name, each in apart.items()}


def serve(*words: str) -> None:
    answer(*prepare(*words))


def bars(found: dict[str, dict[str, Any]], taken: dict[str, list[float]], at_size: bool) -> Iterator[Figure]:
    ours, theirs = found[OURS], found[PEFT]
    ratio = statistics.median(left / right for left, right in zip(taken[OURS], taken[PEFT], strict=True))
    saved, dense = theirs["memory"]["peak"] - ours["memory"]["peak"], theirs["memory"]["dense"]
    yield Figure("step / PEFT's", ratio, "×", 0.9 if at_size else None)  # of a small model it is all overhead
    yield Figure("peak of a step, below PEFT's by", float(saved), "bytes")
    yield Figure("whole matrices that live at PEFT's peak", float(dense), "bytes")
    yield Figure("those bytes / what the peak is lower by", dense / saved, "×", 1 / 0.9 if at_size else None)
    for who, its in found.items():
        yield Figure(
            f"{who}: logits of the saved model, loaded, off the merged one's", its["reloaded"]["merged"], "", 0.0
        )
        yield Figure(f"{who}: the same, off those while it trained", its["reloaded"]["trained"], "", 1e-5)
    apart = max(abs(left / right - 1) for left, right in zip(ours["losses"], theirs["losses"], strict=False))
    yield Figure("losses of the two, apart at most", apart, "", 1e-4)


def measure(options: argparse.Namespace) -> Iterator[Result]:
    budget, size = Budget(options.seconds), MODELS[options.size]
    title = f"{NUM_NEW} new tokens, {size}, 1 × {LENGTH} tokens, float32"
    if not installed("peft"):
        yield Result(ABOUT.name, title, size, options.device, open=("needs peft",))
        return
    words = size, STEPS_A_ROUND[options.size]
    with worker(MODULE, OURS, *words) as ours, worker(MODULE, PEFT, *words) as theirs:
        workers = {OURS: ours, PEFT: theirs}
        steps = {who: partial(its.ask, "step") for who, its in workers.items()}
        taken = take_turns(steps, options.rounds or 3, budget, lambda step: step()["seconds"])
        found = {
            who: {question: its.ask(question) for question in ("memory", "losses", "reloaded")}
            for who, its in workers.items()
        }
    beside = {OURS: (), PEFT: tuple(taken[OURS])}
    series = [Series("training step", "seconds", who, tuple(its), "s", beside[who]) for who, its in taken.items()]
    peaks = {who: (float(its["memory"]["peak"]),) for who, its in found.items()}
    series += [
        Series("allocated at the peak of a step", "bytes", who, its, "bytes", () if who == OURS else peaks[OURS])
        for who, its in peaks.items()
    ]
    figures = tuple(bars(found, taken, options.size == "full"))
    yield Result(ABOUT.name, title, size, options.device, tuple(series), figures, (), budget.spent, budget.seconds)


def main(arguments: list[str] | None = None) -> list[Result]:
    options = read_options(parser(ABOUT), arguments)
    return finish(measure(options), options)


if __name__ == "__main__":
    serve_or_run(serve, main)
