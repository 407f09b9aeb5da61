"""transformers' Trainer and Seq2SeqTrainer."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from doors import models, pairs
from doors.registry import Outcome, door

Make = Callable[[], nn.Module]


def arguments(folder: Path, *, seq2seq: bool = False, **options: Any) -> Any:
    """The Trainer's defaults on a CPU; six steps, logged one by one, nothing saved unless asked for."""
    import transformers as hf

    kind = hf.Seq2SeqTrainingArguments if seq2seq else hf.TrainingArguments
    defaults = {
        "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "report_to": [],
        "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    return kind(str(folder), **defaults | options)


def train(model: nn.Module, folder: Path, *, task: str = "classification", **options: Any) -> pairs.Run:
    """One run of the Trainer on a model, shrunk or not; its losses, its gradients' norms, its tensors, its saved files."""
    import transformers as hf

    seq2seq = task == "seq2seq-lm"
    extra = {name: options.pop(name) for name in ("callbacks", "compute_metrics", "optimizers") if name in options}
    trainer = (hf.Seq2SeqTrainer if seq2seq else hf.Trainer)(
        model,
        arguments(folder, seq2seq=seq2seq, **options),
        train_dataset=models.examples(task),
        eval_dataset=models.examples(task)[:8],
        **extra,
    )
    run = pairs.Run(folder=folder)
    with pairs.held_bytes(run, model):
        trainer.train()
    trainer.save_model(str(folder / "final"))
    history = trainer.state.log_history
    run.losses = [entry["loss"] for entry in history if "loss" in entry]
    run.others["norms"] = [entry["grad_norm"] for entry in history if "grad_norm" in entry]
    run.others["scores"] = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    run.tensors = pairs.state_of(trainer.model)
    return run


@pairs.one_thread
def pair(
    folder: Path,
    family: str = "roberta",
    *,
    tables: int = 1,
    output: str | None = None,
    change: Any = None,
    **options: Any,
) -> Outcome:
    """The same settings on the full model and on the shrunk one; for frozen rows the reference masks their gradients."""

    def made() -> nn.Module:
        model = models.make_model(family)
        return change(model) if change else model

    reference = models.mask_gradients(made()) if output == "frozen" else made()
    full = train(reference, folder / "full", **options)
    lean = train(models.lean(made(), output=output), folder / "lean", **options)
    return pairs.compare(full, lean, models.left_out(tables))


@door("Trainer, its defaults (AdamW, clipping)")
def defaults(folder: Path) -> Outcome:
    return pair(folder)
