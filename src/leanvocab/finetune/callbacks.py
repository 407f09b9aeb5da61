"""Callbacks that watch a run: what it shows, and what ends it before its time.

A signal, or a loss that is not finite, neither loses nor spoils what was trained.
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from leanvocab.errors import InterruptedRunError, TrainingError
from leanvocab.finetune.earlier_runs import last_whole
from leanvocab.finetune.scores import without_prefix

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


def show_progress(trainer: Trainer, progress: bool | None) -> None:
    """Puts bars in the place of the Trainer's own; without a terminal lines; with False nothing."""
    trainer.add_callback(_LogsEnds)
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    if progress or (progress is None and sys.stderr.isatty()):
        trainer.add_callback(_Bars)
    elif progress is None:
        trainer.add_callback(_Lines)


class _LogsEnds(TrainerCallback):
    """Logs the loss before each validation and after the last step too: a short run may end before it is logged at all."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log |= control.should_evaluate or state.global_step >= state.max_steps

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log |= control.should_evaluate


class _Bars(ProgressCallback):
    """One bar for training and one for validation; the loss stands beside the bar instead of on lines of its own."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        bar: Any = self.training_bar
        if bar is not None and "loss" in (logs or {}):
            bar.set_postfix(loss=f"{logs['loss']:.4f}")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        super().on_evaluate(args, state, control, **kwargs)
        bar: Any = self.training_bar
        if bar is not None:  # none after training: the summary has the last scores
            bar.write(_scores(state, metrics), file=sys.stderr)


class _Lines(TrainerCallback):
    """A line for each logging and each validation while it trains: what a log file, or a batch queue, is read for."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trains = False  # the summary has the last scores

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trains = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and "loss" in (logs or {}):
            rate = f", learning rate {logs['learning_rate']:.3g}" if "learning_rate" in logs else ""
            print(f"step {state.global_step:,} of {state.max_steps:,}: loss {logs['loss']:.4f}{rate}", file=sys.stderr)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self._trains:
            print(_scores(state, metrics), file=sys.stderr, flush=True)


def _scores(state: Any, metrics: Any) -> str:
    scores = {name: value for name, value in without_prefix(metrics or {}).items() if isinstance(value, float)}
    said = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
    return f"step {state.global_step:,} of {state.max_steps:,}: validation {said}"
