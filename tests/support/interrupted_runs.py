"""A run of `finetune` in a process of its own that a signal meets at one of its lines, and then goes on."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

# Where a run's own lines are: what it does itself, and what the Trainer does as it steps and saves.
_FILES = (
    "/leanvocab/finetune/",
    "/leanvocab/checkpoints/",
    "/leanvocab/files/",
    "/leanvocab/trainers/",
    "/transformers/trainer.py",
)


class _AtLine:
    """Counts the lines that a run comes to, and calls something at one of them."""

    def __init__(self, number: int | None, then: Callable[[], None]) -> None:
        self.number, self.then, self.seen = number, then, 0

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self._line if any(part in frame.f_code.co_filename for part in _FILES) else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            self.seen += 1
            if self.seen == self.number:
                self.then()
        return self._line


def run_until(number: int | None, sent: int, paths: tuple[str, str, str], knobs: dict[str, Any]) -> tuple[str, int]:
    """(how the run ended, lines that it came to); with no number it ends by itself. Killed, it returns nothing."""
    from leanvocab.errors import InterruptedRunError
    from leanvocab.finetune.job import finetune
    from leanvocab.finetune.settings import FineTuneSettings

    lines = _AtLine(number, lambda: os.kill(os.getpid(), sent))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    base, data, out = map(Path, paths)
    sys.settrace(lines)
    try:
        finetune(base, data, out, FineTuneSettings(**knobs), progress=False)
        ended = "finished"
    except (InterruptedRunError, KeyboardInterrupt) as error:
        ended = type(error).__name__
    finally:
        sys.settrace(None)
    return ended, lines.seen
