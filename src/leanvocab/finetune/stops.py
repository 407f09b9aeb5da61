"""Ends of a run before its time: a signal, or a loss that is not finite. Neither loses or spoils what was trained."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from leanvocab.errors import InterruptedRunError, TrainingError
from leanvocab.finetune.earlier_runs import last_whole

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopsEarly(TrainerCallback):
    """Ends a run at the step that it is at, with a checkpoint, when a signal came; and at a loss that is not finite."""

    def __init__(self, trainer: "StoppableTrainer", *, saves: bool) -> None:
        self._trainer, self._saves = trainer, saves
        self._signal: int | None = None
        trainer.add_callback(self)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM are noted within the block; a second one ends the run at once."""
        if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
            yield
            return
        earlier = {number: signal.signal(number, self._note) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            raise KeyboardInterrupt
        self._signal = number

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stops = self._signal is not None
        keeps = stops or control.should_save or control.should_evaluate
        self._check_loss(args, state, keeps=keeps, asks=control.should_log)
        if stops:
            control.should_training_stop = True
            if args.load_best_model_at_end and args.save_total_limit == 1:
                args.save_total_limit = 2  # or else the Trainer, as it ends, removes all but the best
            if not _ends_epoch(args, state):
                control.should_save = self._saves

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._check_loss(args, state, keeps=True, asks=True)
        if self._signal is not None:  # the epoch may be cut off, and what there was to save is saved then
            control.should_evaluate &= _ends_epoch(args, state)
            control.should_save = self._saves and _ends_epoch(args, state)

    def _check_loss(self, args: Any, state: Any, *, keeps: bool, asks: bool) -> None:
        """Asks a device for its losses where it is waited for anyway; before a state is kept, the weights are looked at too."""
        trainer = self._trainer
        if not (keeps or asks) and trainer.first_bad_step.device.type != "cpu":
            return
        step = int(trainer.first_bad_step)
        if step >= 0:
            raise TrainingError(_not_finite(f"the loss of step {step + 1} is not finite", args))
        if keeps and (name := _not_finite_weight(trainer.model)):
            raise TrainingError(_not_finite(f"{name} is not finite after step {state.global_step}", args))

    def raise_if_stopped(self) -> None:
        """Raises `InterruptedRunError` where a signal ended the run, with the checkpoint to go on from."""
        trainer = self._trainer
        if self._signal is None or trainer.state.global_step >= trainer.state.max_steps:
            return
        step, steps = trainer.state.global_step, trainer.state.max_steps
        where = f"{signal.Signals(self._signal).name} stopped the run after step {step:,} of {steps:,}"
        last = last_whole(Path(str(trainer.args.output_dir)))
        if last is None:
            raise InterruptedRunError(
                f"{where}; no checkpoint was asked for (save_strategy 'no'), so it starts anew", self._signal
            )
        raise InterruptedRunError(f"{where}; {last} is whole: set resume to go on from there", self._signal)


class StoppableTrainer(Trainer):
    """transformers' Trainer, which keeps the number of the first step whose loss was not finite (-1: none)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.first_bad_step = torch.tensor(-1, device="cpu")

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        first = self.first_bad_step.to(loss.device)
        is_first = (first < 0) & ~torch.isfinite(loss.detach())
        self.first_bad_step = torch.where(is_first, self.state.global_step, first)
        return loss


def _ends_epoch(args: Any, state: Any) -> bool:
    """True after the last step of an epoch that has something at its end: it draws random numbers, so that a save comes after."""
    return "epoch" in (args.eval_strategy, args.save_strategy) and float(state.epoch).is_integer()


def _not_finite_weight(model: Any) -> str | None:
    trained = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    return next((name for name, parameter in trained if not torch.isfinite(parameter).all()), None)


def _not_finite(what: str, args: Any) -> str:
    last = last_whole(Path(args.output_dir))
    kept = "no checkpoint was written before" if last is None else f"the last checkpoint, {last}, is from before"
    return (
        f"{what}, so that the run ended and nothing of it was saved; {kept}. Try a lower learning_rate "
        f"(it was {args.learning_rate}), warmup, or max_grad_norm, and look for rows whose labels are all ignored"
    )
