"""One epoch from a tokenized data set to a full model in memory: counting, shrinking, steps, merging.

A checkpoint of random weights and XLM-R base's size and a data set of rows of equal length, whose ids are those of 6,000 rows of
the vocabulary, are made once. A round of a program is a fresh process that loads both, which is not timed, and then does all
that its way of training takes; programs take turns. The steps are those of `training_step`. leanvocab and the authors' code must
end with the losses of full fine-tuning. Memory is the peak of anonymous bytes beyond what the process held before it
loaded the model.
"""

import argparse
import gc
import json
import tempfile
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._command import About, finish, parser, read_options
from benchmarks._models import SHAPES, kept_ids, save_model
from benchmarks._peers import AUTHORS, NO_AUTHORS_CODE, authors_module
from benchmarks._results import OURS, Figure, Result, Series, beside_ours
from benchmarks._rounds import Budget, run_child, run_module, take_turns
from benchmarks.training_step import FULL, Program, adamw, take_step, warm_up

ABOUT = About(
    name="epoch",
    measures="One epoch from a tokenized data set to a full model, with counting, shrinking and merging: time and memory.",
    beside="full fine-tuning, the authors' code",
    limit="the steps alone",
    budget_seconds=100,
)
MODULE = "benchmarks.epoch"
STEPS = "limit: leanvocab's steps alone"


def make_data(folder: Path, size: str, options: dict[str, Any]) -> None:
    """Rows of one length whose ids are among the kept ones, on disk."""
    import datasets

    datasets.disable_progress_bars()
    shape = options["num_batches"] * options["batch_size"], options["length"]
    ids = np.random.default_rng(1).choice(kept_ids(size), shape)
    ids[:, 0] = 1  # the pad id occurs, and keeps its place among the kept ids: the authors' code insists on both
    ids[0, :4] = range(4)
    rows = {"input_ids": ids.tolist(), "labels": np.random.default_rng(2).integers(0, 2, shape[0]).tolist()}
    datasets.Dataset.from_dict(rows).save_to_disk(folder / "data")


def batches_of(dataset: Any, batch_size: int) -> Iterator[tuple[Any, Any]]:
    for batch in dataset.with_format("torch").iter(batch_size):
        yield batch["input_ids"], batch["labels"]


def train(program: Program, dataset: Any, batch_size: int) -> tuple[float, list[float]]:
    """Seconds of the steps, and their losses."""
    start = time.perf_counter()
    batches = batches_of(dataset, batch_size)
    losses = [take_step(program, batches) for _ in range(len(dataset) // batch_size)]
    return time.perf_counter() - start, losses


def with_full(model: Any, dataset: Any, options: dict[str, Any]) -> tuple[float, list[float]]:
    return train(Program(model, adamw(model)), dataset, options["batch_size"])


def with_leanvocab(model: Any, dataset: Any, options: dict[str, Any]) -> tuple[float, list[float]]:
    import leanvocab as lv

    counts = lv.count_tokens(dataset, "input_ids", progress=False)
    lv.shrink_(model, lv.PartialVocabulary.from_counts(counts, model=model))
    program = Program(model, adamw(model))
    found = train(program, dataset, options["batch_size"])
    program.optimizers.clear()
    lv.merge_(model)
    return found


def with_authors(model: Any, dataset: Any, options: dict[str, Any]) -> tuple[float, list[float]]:
    """Their front door, which counts, rewrites the data, prepares the model and restores it."""

    class Tokenizer:  # all that they ask of one
        pad_token_id = model.config.pad_token_id

        def __len__(self) -> int:
            return int(model.config.vocab_size)

    pruner = authors_module(options["authors_code"], "hf_embedding_pruner").HFEmbeddingPruner(model)
    rewritten, _ = pruner.prepare_model(Tokenizer(), dataset)
    program = Program(model, adamw(model))
    found = train(program, rewritten, options["batch_size"])
    program.optimizers.clear()
    pruner.restore_model()
    return found


PROGRAMS = {FULL: with_full, OURS: with_leanvocab, AUTHORS: with_authors}


def child(who: str, folder: str, given: str) -> dict[str, Any]:
    """Seconds and peak memory of a whole epoch, and its losses."""
    import datasets
    from transformers import AutoModelForSequenceClassification

    from leanvocab.reports.peak import record_peak

    options = json.loads(given)
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    warm_up(who, options)
    gc.collect()
    with record_peak() as before:
        pass
    dataset = datasets.load_from_disk(Path(folder, "data"))
    model = AutoModelForSequenceClassification.from_pretrained(Path(folder, "base")).train()
    with record_peak() as peak:
        start = time.perf_counter()
        steps, losses = PROGRAMS[who](model, dataset, options)
        seconds = time.perf_counter() - start
    grown = peak.peak_anonymous_bytes - before.end_anonymous_bytes
    return {"seconds": seconds, "steps": steps, "losses": losses, "bytes": grown}


def rounds_of(names: list[str], folder: str, given: str, rounds: int, budget: Budget) -> dict[str, list[Any]]:
    programs = {name: partial(run_child, MODULE, name, folder, given) for name in names}
    found = take_turns(programs, rounds, budget, lambda run: run())
    losses = [each["losses"] for rounds_of_one in found.values() for each in rounds_of_one]
    assert all(each == losses[0] for each in losses), f"losses differ: {losses}"
    return found


def measure(options: argparse.Namespace) -> Iterator[Result]:
    budget, size = Budget(options.seconds), options.model
    names = [OURS, FULL, *([AUTHORS] if options.authors_code else [])]
    settings = {name: getattr(options, name) for name in ("batch_size", "length", "num_batches")}
    settings |= {"device": "cpu", "dtype": "float32", "authors_code": str(options.authors_code or ""), "torchao": ""}
    with tempfile.TemporaryDirectory() as folder:
        save_model(size, Path(folder, "base"))
        make_data(Path(folder), size, settings)
        found = rounds_of(names, folder, json.dumps(settings), options.rounds or 3, budget)
    seconds = {who: [each["seconds"] for each in rounds] for who, rounds in found.items()}
    seconds[STEPS] = [each["steps"] for each in found[OURS]]
    peaks = {who: [float(each["bytes"]) for each in rounds] for who, rounds in found.items()}
    case = f"{options.num_batches} steps of {options.batch_size} × {options.length}"
    series: list[Series] = [
        *beside_ours("time of an epoch", case, "s", seconds),
        *beside_ours("peak anonymous memory", case, "bytes", peaks),
    ]
    ratios = [Figure(f"leanvocab / {each.who}, {each.measure}", 1 / each.ratio, "×") for each in series if each.ratio]
    yield Result(
        ABOUT.name,
        f"One epoch: {size}, {SHAPES[size].rows:,} rows",
        size,
        "cpu",
        tuple(series),
        tuple(ratios),
        () if options.authors_code else (NO_AUTHORS_CODE,),
        budget.spent,
        options.seconds,
    )


def main(arguments: list[str] | None = None) -> list[Result]:
    made = parser(ABOUT)
    made.add_argument("--model", choices=[name for name, shape in SHAPES.items() if shape.task == "classifier"])
    made.add_argument("--num-batches", type=int)
    made.add_argument("--batch-size", type=int, default=8)
    made.add_argument("--length", type=int, default=32)
    options = read_options(made, arguments)
    options.model = options.model or ("tiny" if options.size == "small" else "xlm-r-base")
    options.num_batches = options.num_batches or (2 if options.size == "small" else 8)
    return finish(measure(options), options)


if __name__ == "__main__":
    run_module(child, main)
