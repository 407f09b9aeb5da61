"""Short runs of `finetune`, and what happens to them in the middle."""

from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from leanvocab.finetune.settings import FineTuneSettings

QUICK = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-2, "logging_steps": 1, "cpu": True, "save_total_limit": 4}


def settings(**knobs: Any) -> FineTuneSettings:
    return FineTuneSettings(**QUICK | knobs)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, do: Any) -> None:
    """Does something in the training step after so many were taken, once."""
    original = Trainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        if self.state.global_step == step and not done:
            done.append(step)
            return do(loss)
        return loss

    done: list[int] = []
    monkeypatch.setattr(Trainer, "training_step", training_step)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()
