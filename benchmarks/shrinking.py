"""Shrinking, a full state dict, a full save while shrunk, and merging: seconds and extra memory, beside the peers.

Checkpoints of random weights and published sizes are made once in a temporary folder. A round of a program is a fresh
process that loads the checkpoint and goes through the stages; programs take turns. Memory is the growth of the process's
anonymous bytes. transformer-smaller-training-vocab cannot save while shrunk: its save comes after its merge, and it makes
no full state dict. Saving stands beside `save_pretrained` of the model that was never shrunk, and `cp --reflink=never`.
"""

import argparse
import gc
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks._command import About, finish, parser, read_options
from benchmarks._models import SHAPES, kept_ids, save_model
from benchmarks._peers import AUTHORS, NO_AUTHORS_CODE, NO_SMALLER_VOCAB, SMALLER_VOCAB, authors_module
from benchmarks._results import OURS, Figure, Result, Series
from benchmarks._rounds import Budget, last_line, run_child, run_module, turns

ABOUT = About(
    name="shrinking",
    measures="Shrinking, state dict, save and merge at the sizes of published models: time and extra memory.",
    beside="the authors' code, transformer-smaller-training-vocab, save_pretrained of the full model",
    limit="bytes of the kept rows; cp for saving",
    budget_seconds=220,
)
MODULE = "benchmarks.shrinking"
FULL, COPY = "the full model, never shrunk", "limit: cp --reflink=never"
MODELS = {"full": ["bert-base", "xlm-r-base", "gemma-3-270m-classifier", "xlm-r-large"], "small": ["tiny"]}
MEBIBYTE = 2**20
STAGES = ("shrink", "state dict", "save", "merge")
TOTAL = ("shrink", "state dict", "merge")
TOGETHER = " + ".join(TOTAL)

Stages = dict[str, Callable[[], Any]]


def stages_of_leanvocab(model: Any, folder: Path, out: Path, ids: Any, code: str) -> Stages:
    import leanvocab as lv

    vocabulary = lv.PartialVocabulary(ids, model.get_input_embeddings().num_embeddings)
    return {
        "shrink": lambda: lv.shrink_(model, vocabulary),
        "state dict": lambda: model.state_dict(),
        "save": lambda: model.save_pretrained(out),
        "merge": lambda: lv.merge_(model),
    }


def stages_of_authors(model: Any, folder: Path, out: Path, ids: Any, code: str) -> Stages:
    import torch

    pruner = authors_module(code, "embedding_pruner").EmbeddingPruner()
    held: dict[str, Any] = {}

    def shrink() -> None:
        held["context"] = pruner.prepare(model, model.get_input_embeddings(), torch.from_numpy(ids))

    return {
        "shrink": shrink,
        "state dict": lambda: model.state_dict(),
        "save": lambda: model.save_pretrained(out),
        "merge": lambda: pruner.restore(held["context"]),
    }


def stages_of_full(model: Any, folder: Path, out: Path, ids: Any, code: str) -> Stages:
    return {"state dict": lambda: model.state_dict(), "save": lambda: model.save_pretrained(out)}


MAKERS = {OURS: stages_of_leanvocab, AUTHORS: stages_of_authors, FULL: stages_of_full}


def child(who: str, folder: str, code: str) -> dict[str, float]:
    """Seconds and growth of anonymous memory of each stage, in this process; and of the stages in `TOTAL` together."""
    from transformers import AutoModelForSequenceClassification

    from leanvocab.reports.peak import record_peak

    base, out = Path(folder, "base"), Path(folder, "saved")
    model = AutoModelForSequenceClassification.from_pretrained(base)
    ids = _ids(Path(folder))
    found: dict[str, float] = {}
    begin, top = None, 0
    for name, stage in MAKERS[who](model, base, out, ids, code).items():
        gc.collect()
        with record_peak() as peak:
            start = time.perf_counter()
            made = stage()
            found[f"{name}_seconds"] = time.perf_counter() - start
            del made
            gc.collect()
        found[f"{name}_bytes"] = peak.anonymous_growth_bytes
        found[f"{name}_held_bytes"] = peak.end_anonymous_bytes - peak.start_anonymous_bytes
        begin = peak.start_anonymous_bytes if begin is None else begin
        top = max(top, peak.peak_anonymous_bytes) if name in TOTAL else top
    found["total_bytes"] = top - (begin or 0)
    if who != FULL:
        _check_unchanged(base, out)
    return found


def _ids(folder: Path) -> Any:
    import numpy as np

    return np.array(json.loads((folder / "ids.json").read_text()), np.int64)


def _check_unchanged(base: Path, out: Path) -> None:
    name = "model.safetensors"
    same = subprocess.run(["cmp", "--silent", base / name, out / name]).returncode == 0
    assert same, "a model that was not trained must be saved as it was loaded"


def copy_round(folder: Path) -> dict[str, float]:
    """Copying the checkpoint's files."""
    (folder / "saved").mkdir()
    files = sorted(str(path) for path in (folder / "base").iterdir())
    start = time.perf_counter()
    subprocess.run(["cp", "--reflink=never", *files, str(folder / "saved")], check=True)
    return {"save_seconds": time.perf_counter() - start}


def take_round(who: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """One round of one program; what it saved is removed."""
    shutil.rmtree(folder / "saved", ignore_errors=True)
    if who == COPY:
        found = copy_round(folder)
    elif who == SMALLER_VOCAB:
        script = Path(__file__).with_name("_smaller_vocab.py")
        words = [script, "stages", folder / "base", folder / "ids.json", folder / "saved"]
        found = last_line([str(options.smaller_vocab_python), *map(str, words)])
    else:
        found = run_child(MODULE, who, folder, options.authors_code)
    shutil.rmtree(folder / "saved", ignore_errors=True)
    return found


def rounds_of(options: argparse.Namespace, folder: Path, names: list[str], budget: Budget) -> tuple[Any, list[str]]:
    """Rounds of every program, in turn, and what failed."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    failed: list[str] = []
    for name in turns(names, options.rounds or 3, budget):
        if any(reason.startswith(name) for reason in failed):
            continue
        try:
            found[name].append(take_round(name, folder, options))
        except RuntimeError as error:
            failed.append(f"{name}: open: it failed with: {str(error).splitlines()[-1]}")
    return found, failed


def series_of(found: dict[str, list[dict[str, float]]], kept_bytes: float) -> Iterator[Series]:
    """Time and memory of every stage and program; the stages of shrinking, state dict and merging together."""
    for what, unit in (("time", "s"), ("memory", "bytes")):
        for stage in (*STAGES, TOGETHER):
            values: dict[str, list[float]] = {}
            for who, rounds in found.items():
                taken = [value_of(each, stage, what) for each in rounds]
                values |= {who: [each for each in taken if each is not None]} if taken and taken[0] is not None else {}
            ours = tuple(values.get(OURS, ()))
            for who, each in values.items():
                yield Series(what, stage, who, tuple(each), unit, () if who == OURS else ours)
            if what == "memory" and ours:
                yield Series(what, stage, "limit: the kept rows", (kept_bytes,) * len(ours), unit, ours)


def value_of(found: dict[str, float], stage: str, what: str) -> float | None:
    """Seconds or bytes of a stage in one round, None where the program has no such stage."""
    if stage != TOGETHER:
        return found.get(stage + ("_seconds" if what == "time" else "_bytes"))
    if "merge_seconds" not in found:
        return None
    if what == "memory":
        return found["total_bytes"]
    return sum(found.get(f"{each}_seconds", 0.0) for each in TOTAL)  # who makes no full state dict spends nothing on it


def figures_of(model: str, found: dict[str, list[dict[str, float]]], kept: int, row_bytes: int) -> Iterator[Figure]:
    """The bars: against the authors, against saving the full model, and in bytes of kept rows and pages."""
    rounds = found[OURS]
    worst = {key: max(each[key] for each in rounds) for key in rounds[0]}
    yield Figure(f"{model}: shrinking, slowest round", worst["shrink_seconds"], "s", 1.0)
    bar = 1.5 * kept * row_bytes + 32 * MEBIBYTE
    yield Figure(f"{model}: shrinking, memory; 1.5 × kept rows + 32 MiB", worst["shrink_bytes"], "bytes", bar)
    bar = kept * 2 * 4096 + 32 * MEBIBYTE
    yield Figure(f"{model}: saving, memory; two pages a kept row + 32 MiB", worst["save_bytes"], "bytes", bar)
    yield Figure(f"{model}: held after saving", worst["save_held_bytes"], "bytes", 4 * MEBIBYTE)
    for who, stage, what, bar in [
        (AUTHORS, TOGETHER, "time", 0.1),
        (AUTHORS, TOGETHER, "memory", 0.1),
        (FULL, "save", "time", 1.2),
    ]:
        both = zip(rounds, found.get(who, []), strict=False)
        pairs = [(value_of(ours, stage, what), value_of(theirs, stage, what)) for ours, theirs in both]
        ratios = [ours / theirs for ours, theirs in pairs if ours is not None and theirs]
        if ratios:
            barred = bar if model in ("xlm-r-base", "tiny") or who == FULL else None
            yield Figure(f"{model}: {stage}, {what} / {who}", statistics.median(ratios), "×", barred)


def measure(options: argparse.Namespace) -> Iterator[Result]:
    names = [OURS, FULL, COPY]
    names += [AUTHORS] if options.authors_code else []
    names += [SMALLER_VOCAB] if options.smaller_vocab_python else []
    missing = [*([] if options.authors_code else [NO_AUTHORS_CODE])]
    missing += [] if options.smaller_vocab_python else [NO_SMALLER_VOCAB]
    models = options.models or MODELS[options.size]
    whole = Budget(options.seconds)
    for number, model in enumerate(models):
        budget = Budget(whole.left / (len(models) - number))
        ids = kept_ids(model, options.kept)
        row_bytes = 4 * SHAPES[model].settings["hidden_size"]
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            save_model(model, folder / "base")
            (folder / "ids.json").write_text(json.dumps(ids.tolist()))
            found, failed = rounds_of(options, folder, names, budget)
        yield Result(
            ABOUT.name,
            f"Shrinking, saving and merging: {model}, {len(ids):,} of {SHAPES[model].rows:,} rows kept",
            model,
            "cpu",
            tuple(series_of(found, len(ids) * row_bytes)),
            tuple(figures_of(model, found, len(ids), row_bytes)),
            (*missing, *failed),
            budget.spent,
            budget.seconds,
        )


def main(arguments: list[str] | None = None) -> list[Result]:
    made = parser(ABOUT)
    made.add_argument("--models", nargs="+", choices=SHAPES, help="sizes of published models")
    made.add_argument("--kept", type=int, help="rows to keep")
    options = read_options(made, arguments)
    return finish(measure(options), options)


if __name__ == "__main__":
    run_module(child, main)
