"""Kills and interrupts at any line of a run of `finetune`: the next `--resume` goes on, and ends in the same bits."""

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from interrupted_runs import run_until
from own_process import in_own_process
from texts import save_pretrained, write_splits

from leanvocab.finetune.job import finetune
from leanvocab.finetune.settings import FineTuneSettings

KNOBS: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 8,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "cpu": True,
    "save_strategy": "steps",
    "save_steps": 4,
    "save_total_limit": 2,
}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
NUM_POINTS = 60


class Runs:
    """A base, data, and the run that nothing ended, with full checkpoints or deltas."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base, self.data = save_pretrained(folder / "base"), write_splits(folder / "data")
        self.whole, self.lines = {}, {}
        for kind in ("full", "delta"):
            out = folder / f"whole-{kind}"
            _, self.lines[kind] = in_own_process(run_until, None, 0, self.paths(out), self.knobs(kind))
            self.whole[kind] = result_of(out)

    def paths(self, out: Path) -> tuple[str, str, str]:
        return str(self.base), str(self.data), str(out)

    def knobs(self, kind: str) -> dict[str, Any]:
        return {**KNOBS, "checkpoints": kind}


def result_of(out: Path) -> tuple[bytes, Any, Any]:
    """Weights, losses and scores of a run that came to its end."""
    account = json.loads((out / "finetune.json").read_text())
    return (out / "model.safetensors").read_bytes(), account["losses"], account["scores"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("interrupts"))


def points() -> list[Any]:
    """(kind of checkpoints, signal, where in the run): a seeded few in each test run, the rest where there is time."""
    chance = random.Random(0)
    drawn = [
        (("full", "delta")[at % 2], SIGNALS[at % 3], (at + chance.random()) / NUM_POINTS) for at in range(NUM_POINTS)
    ]
    return [pytest.param(*point, marks=() if at % 15 == 14 else pytest.mark.slow) for at, point in enumerate(drawn)]


@pytest.mark.parametrize(("kind", "sent", "where"), points())
def test_a_run_that_a_signal_ends_anywhere_goes_on_to_the_same_bits(
    runs: Runs, tmp_path: Path, kind: str, sent: int, where: float
) -> None:
    number, out = 1 + int(where * runs.lines[kind]), tmp_path / "out"
    try:
        ended, _ = in_own_process(run_until, number, sent, runs.paths(out), runs.knobs(kind))
    except AssertionError:  # it died, as it was told
        assert sent in (signal.SIGKILL, signal.SIGTERM)  # before training, and behind it, nothing waits for SIGTERM
        ended = "killed"
    if ended == "finished":
        assert sent != signal.SIGKILL
    else:
        finetune(runs.base, runs.data, out, FineTuneSettings(**runs.knobs(kind), resume=True), progress=False)
    assert result_of(out) == runs.whole[kind]
    assert not [path for path in out.rglob("*") if ".leanvocab-" in path.name]
