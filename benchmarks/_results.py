"""What the benchmarks share: figures beside their bars, the machine that they were measured on, and bootstrap intervals."""

import json
import platform
import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Figure:
    """One measured figure; `bar` is the largest value that it should have, None where it is for reading only."""

    what: str
    value: float
    unit: str
    bar: float | None = None

    @property
    def holds(self) -> bool | None:
        return None if self.bar is None else self.value <= self.bar


def show(title: str, figures: Sequence[Figure], as_json: bool, **details: Any) -> None:
    """Prints figures as a table, or with `as_json` as one JSON object for machines."""
    if as_json:
        content = {"title": title, "machine": machine(), "figures": [asdict(f) | {"holds": f.holds} for f in figures]}
        print(json.dumps(content | details))
        return
    table = Table(
        "what", "figure", "at most", "", title=title, caption=", ".join(f"{k} {v}" for k, v in machine().items())
    )
    for figure in figures:
        bar = "" if figure.bar is None else f"{figure.bar:,.4g} {figure.unit}"
        verdict = {None: "", True: "[green]holds[/]", False: "[red]falls short[/]"}[figure.holds]
        table.add_row(figure.what, f"{figure.value:,.4g} {figure.unit}", bar, verdict)
    Console(width=140).print(table)


def machine() -> dict[str, str]:
    """What a figure depends on: processor, cores that were used, versions."""
    import torch

    names = {"torch": version("torch"), "transformers": version("transformers"), "leanvocab": version("leanvocab")}
    return {
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "Python": platform.python_version(),
        **names,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def median_interval(values: Sequence[float], rounds: int = 10_000) -> tuple[float, float]:
    """The 95 % bootstrap interval of the median."""
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(values, k=len(values))) for _ in range(rounds))
    return medians[int(0.025 * rounds)], medians[int(0.975 * rounds)]
