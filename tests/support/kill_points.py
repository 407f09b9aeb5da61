"""Kills one writer at one line after another: `python kill_points.py FOLDER OPERATION NUMBER` prints what was left, as JSON.

In a process of its own, which forks a child for each point: the child runs the operation, and sends itself SIGKILL when it
comes to its line. Then what lies on disk is compared with what lay there before and with what the operation gives, and the
operation is run again, as a user would, without cleaning up.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from comparing import train
from disk import content, trained_pair
from models import used_vocabulary

from leanvocab.checkpoints.delta_saving import save_delta
from leanvocab.checkpoints.full_saving import save_full
from leanvocab.checkpoints.merge import merge_checkpoint
from leanvocab.checkpoints.training_runs import make_delta_of_checkpoint
from leanvocab.files import atomic_folders
from leanvocab.files.atomic_folders import clear_leftovers
from leanvocab.trimming.export import export_trimmed, trim_by_recipe

# Where a writer's own lines are: in these files, from the operation down.
_FILES = ("/leanvocab/", "/shutil.py", "/safetensors/torch.py", "/transformers/modeling_utils.py")
_STAGES = {
    "header": {"make_header", "read_header", "read_weights", "make_plan", "write_signs"},
    "tensor": {"copy_range", "kept_blocks", "write_at", "write_model", "sha256_of_range", "row_blocks"},
    "sync": {"sync", "sync_tree"},
    "swap": {"swap", "put", "exchange"},
    "cleanup": {"rmtree", "clear_leftovers"},
}


def stage_of(frame: FrameType) -> str:
    """The stage that the innermost function of a known stage belongs to."""
    at: FrameType | None = frame
    while at is not None:
        for stage, names in _STAGES.items():
            if at.f_code.co_name in names:
                return stage
        at = at.f_back
    return "prepare"


class Tracer:
    """Counts the lines that an operation comes to, and kills the process at one of them."""

    def __init__(self, kill_at: int | None):
        self.kill_at, self.stages, self.places = kill_at, [], []

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not any(part in frame.f_code.co_filename for part in _FILES):
            return None
        return self._line

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            if self.kill_at is None:
                self.stages.append(stage_of(frame))
                self.places.append((frame.f_code.co_filename, frame.f_lineno))
            elif self.kill_at == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            else:
                self.kill_at -= 1
        return self._line


def make_operation(folder: Path, name: str) -> tuple[Callable[[], Any], Path, Path]:
    """(the operation, the folder that it writes, the folder of everything that it must not harm)."""
    start = folder / "start"
    _, model = trained_pair(start)
    saved = start / "saved"
    save_full(model, saved)
    save_delta(model, start / "delta")
    shutil.copytree(saved, start / "checkpoint-4")
    train(model, steps=1)
    here = folder / "here"
    if name == "save_full_without_exchange":
        atomic_folders.exchange = lambda first, second: False  # as on a file system that cannot
    operations: dict[str, tuple[Callable[[], Any], str]] = {
        "save_full": (lambda: save_full(model, here / "saved", max_shard_size="100KB"), "saved"),
        "save_full_without_exchange": (lambda: save_full(model, here / "saved", max_shard_size="100KB"), "saved"),
        "save_full_new": (lambda: save_full(model, here / "fresh"), "fresh"),
        "save_delta": (lambda: save_delta(model, here / "delta", base=here / "base"), "delta"),
        "delta_checkpoint": (lambda: make_delta(model, here), "checkpoint-4"),
        "merge": (lambda: merge_checkpoint(base=here / "base", delta=here / "delta", output=here / "out"), "out"),
        "merge_verify": (
            lambda: merge_checkpoint(base=here / "base", delta=here / "delta", output=here / "out", verify=True),
            "out",
        ),
        "merge_in_place": (
            lambda: merge_checkpoint(base=here / "base", delta=here / "delta", in_place=True),
            "base",
        ),
        "merge_overwrite": (
            lambda: merge_checkpoint(base=here / "base", delta=here / "delta", output=here / "saved", overwrite=True),
            "saved",
        ),
        "trim": (lambda: trim(here, "out"), "out"),
        "trim_overwrite": (lambda: trim(here, "saved", delta=here / "delta", overwrite=True), "saved"),
        "trim_recipe": (
            lambda: trim_by_recipe(here / "recipe" / "trimming.json", here / "out", base=here / "base"),
            "out",
        ),
    }
    if name == "trim_recipe":
        trim(start, "recipe")
    operation, target = operations[name]
    return operation, here / target, here


def trim(folder: Path, output: str, **options: Any) -> None:
    export_trimmed(
        folder / "base",
        used_vocabulary(),
        folder / output,
        tokenizer=False,
        pad_to_multiple_of=8,
        **options,
    )


def make_delta(model: torch.nn.Module, here: Path) -> None:
    clear_leftovers(here / "checkpoint-4")  # as the callback does when training begins
    if (here / "checkpoint-4" / "model.safetensors").exists():
        make_delta_of_checkpoint(here / "checkpoint-4", model, None, here / "base")


def in_child(run: Callable[[], Any]) -> int:
    """How a forked child that runs `run` ended: 0, or minus the signal's number."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def traced(operation: Callable[[], Any], tracer: Tracer) -> None:
    sys.settrace(tracer)
    try:
        operation()
    finally:
        sys.settrace(None)


def choose(places: list[Any], stages: list[str], number: int) -> list[int]:
    """As many points of each stage as of another, every line once before one comes again, evenly spread."""
    first = {place: index for index, place in reversed(list(enumerate(places)))}
    chosen: set[int] = set()
    names = sorted(set(stages), key=stages.count)  # what a scarce stage leaves goes to the others
    for position, stage in enumerate(names):
        share = (number - len(chosen)) // (len(names) - position)
        own = sorted(index for index in first.values() if stages[index] == stage)
        others = sorted(index for index, each in enumerate(stages) if each == stage and first[places[index]] != index)
        chosen |= set(spread(own, share))
        chosen |= set(spread(others, share - min(share, len(own))))
    return sorted(chosen)


def spread(values: list[int], number: int) -> list[int]:
    return values if len(values) <= number else [values[int(i * len(values) / number)] for i in range(number)]


def main(folder: Path, name: str, number: int) -> None:
    torch.set_num_threads(1)
    operation, target, here = make_operation(folder, name)
    start = folder / "start"
    shutil.copytree(start, here, symlinks=True)
    before = {each.name: content(each) for each in start.iterdir()}
    dry = Tracer(None)
    traced(operation, dry)  # in this process: its cached digests are what a training run has too
    after = {each.name: content(each) for each in here.iterdir()}
    report = {"points": 0, "losses": [], "leftovers": [], "missing_until_next_run": 0, "stages": {}}
    for point in choose(dry.places, dry.stages, number):
        shutil.rmtree(here)
        shutil.copytree(start, here, symlinks=True)
        ended = in_child(lambda point=point: traced(operation, Tracer(point)))
        if ended != -signal.SIGKILL:
            continue
        report["points"] += 1
        stage = dry.stages[point]
        report["stages"][stage] = report["stages"].get(stage, 0) + 1
        left = {each.name: content(each) for each in here.iterdir() if ".leanvocab-" not in each.name}
        where = f"{stage}, {dry.places[point]}"
        for each, was in before.items():
            if each != target.name and left.get(each) != was:
                report["losses"].append(f"{each} was harmed: {where}")
        if left.get(target.name) not in (before.get(target.name), after[target.name]):
            if name.endswith("without_exchange") and target.name not in left:
                report["missing_until_next_run"] += 1
            else:
                report["losses"].append(f"{target.name} is neither old nor new: {where}")
        if in_child(operation) != 0:
            report["losses"].append(f"the next run failed: {where}")
        found = {each.name: content(each) for each in here.iterdir()}
        if found != after:
            report["leftovers"].append(f"{sorted(found)}: {where}")
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
