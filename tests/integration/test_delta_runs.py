"""Trainer runs whose checkpoints are deltas: stopped, killed, resumed, widened, and the best of them loaded."""

from pathlib import Path
from typing import Any

import pytest
from comparing import differing
from disk import read_all
from models import small_model
from test_trainer import ALL_IDS, run, run_all

from leanvocab.checkpoints.merge import merge_checkpoint

DELTA_CHECKPOINT = {
    "README.md",
    "config.json",
    "delta.safetensors",
    "leanvocab.json",
    "model_config.json",
    "optimizer.json",
    "optimizer.safetensors",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
    "training_args.bin",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """A run with full checkpoints and one with deltas that stops half way, and both with the best one loaded at the end."""
    folder = tmp_path_factory.mktemp("delta-runs")
    small_model().save_pretrained(folder / "base")
    options = {
        "full": {"token_ids": "used"},
        "delta": {"token_ids": "used", "checkpoints": "delta", "interrupt_at": 4},
        "full-best": {"token_ids": "used", "best": True},
        "delta-best": {"token_ids": "used", "best": True, "checkpoints": "delta"},
    }
    base = str(folder / "base")
    return folder, run_all(
        {name: {"output": str(folder / name), "base": base, **each} for name, each in options.items()}
    )


def test_a_checkpoint_is_a_delta_with_partial_states(runs: tuple[Path, Any]) -> None:
    folder, _ = runs
    checkpoint = folder / "delta" / "checkpoint-4"
    assert {path.name for path in checkpoint.iterdir()} == DELTA_CHECKPOINT
    states = read_all(checkpoint)
    rows = states["roberta.embeddings.word_embeddings.weight"]
    assert rows.shape[0] < 500
    assert sum(states[f"{i}.exp_avg"].shape == rows.shape for i in range(40) if f"{i}.exp_avg" in states) == 1
    assert sorted(path.name for path in (folder / "delta").iterdir()) == ["checkpoint-2", "checkpoint-4", "final"]


def test_resuming_from_a_delta_equals_never_having_stopped(runs: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    folder, results = runs
    checkpoint, base = str(folder / "delta" / "checkpoint-4"), str(folder / "base")
    resumed = run(
        output=str(folder / "again"), base=base, token_ids="used", checkpoints="delta", resume_delta=checkpoint
    )
    assert resumed["losses"][-4:] == results["full"]["losses"][-4:]
    assert differing(read_all(folder / "again" / "final"), read_all(folder / "full" / "final")) == []
    assert not [path for path in (folder / "delta").iterdir() if path.name.startswith(".")]
    merge_checkpoint(base=base, delta=folder / "again" / "checkpoint-8", output=folder / "merged", verify=True)
    assert differing(read_all(folder / "merged"), read_all(folder / "full" / "checkpoint-8")) == []


def test_another_vocabulary_is_refused_before_a_step_or_widened(runs: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    folder, results = runs
    options = {"base": str(folder / "base"), "resume_delta": str(folder / "delta" / "checkpoint-4")}
    refused = run(output=str(folder / "refused"), token_ids=ALL_IDS[:450], **options)
    assert refused["error"] == "CheckpointError"
    assert "of another vocabulary" in refused["message"]
    assert not list((folder / "refused").glob("checkpoint-*"))
    widened = run(output=str(folder / "widened"), token_ids=ALL_IDS[:450], widen=True, **options)
    assert widened["losses"][-4:] == results["full"]["losses"][-4:]
    assert differing(read_all(folder / "widened" / "final"), read_all(folder / "full" / "final")) == []


def test_an_ordinary_resume_from_a_delta_is_refused(runs: tuple[Path, Any]) -> None:
    folder, _ = runs
    checkpoint = str(folder / "delta" / "checkpoint-4")
    found = run(output=str(folder / "ordinary"), base=str(folder / "base"), library=False, resume=checkpoint)
    assert (found["error"], "Can't find a valid checkpoint" in found["message"]) == ("ValueError", True)


def test_the_best_checkpoint_is_loaded_though_it_is_a_delta(runs: tuple[Path, Any]) -> None:
    folder, _ = runs
    assert differing(read_all(folder / "delta-best" / "final"), read_all(folder / "full-best" / "final")) == []
