"""The progress bar of everything that reads or writes much data."""

import time
from typing import Any


class ProgressBar:
    """A tqdm bar that is made, and tqdm imported, only when the work has turned out long.

    Args:
        label: the words before the bar.
        total: the amount of work in `unit`; None: not known.
        wanted: True shows the bar from the start, False never. None: once the work has taken `after_seconds`.
        anywhere: show it by itself also where there is no terminal.
    """

    # tqdm's own `delay` would do, were tqdm not to be imported for it.
    def __init__(
        self,
        label: str,
        total: int | None,
        wanted: bool | None = None,
        *,
        unit: str = "B",
        after_seconds: float = 1.0,
        anywhere: bool = False,
    ) -> None:
        self._wanted, self._after_seconds = wanted, after_seconds
        # disable=None: shown on a terminal alone
        disable = False if wanted or anywhere else None
        self._look = {"desc": label, "total": total, "unit": unit, "unit_scale": True, "disable": disable}
        self._done, self._started = 0, time.monotonic()
        self._bar: Any = None

    def add(self, amount: int) -> None:
        """Note that so much more is done."""
        self._done += amount
        if self._bar is not None:
            self._bar.update(amount)
        elif self._wanted or (self._wanted is None and time.monotonic() - self._started > self._after_seconds):
            from tqdm.auto import tqdm  # type: ignore[import-untyped]

            self._bar = tqdm(initial=self._done, **self._look)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
