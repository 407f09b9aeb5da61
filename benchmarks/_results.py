"""Results of a benchmark: series of values beside one another, figures beside their bars, and where they were measured.

A result is one JSON file, named by benchmark, subject, hardware and date. Nothing in it is estimated: what could not be
measured is named in `open`, with the reason. Results of the device "paper" are counted, not measured, and say so.
"""

import datetime
import functools
import json
import os
import platform
import random
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks._paper import LEFT_OUT, PAPER

FOLDER = Path(__file__).parent / "results"
OURS = "leanvocab"
_PACKAGES = ("leanvocab", "torch", "transformers", "datasets", "numpy", "pyarrow", "peft", "polars", "torchao")


@functools.cache
def _machine() -> dict[str, str]:
    """Circumstances that a measured figure depends on: processor, cores, memory, versions of what was used."""
    import torch

    found = {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "threads": str(torch.get_num_threads()),
        "Python": platform.python_version(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found | versions()


def versions() -> dict[str, str]:
    """Versions of what was used, on which alone a counted figure depends."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@dataclass(frozen=True)
class Figure:
    """One derived figure; `bar` is the largest value that it should have, None where it is for reading only."""

    what: str
    value: float
    unit: str
    bar: float | None = None

    @property
    def holds(self) -> bool | None:
        return None if self.bar is None else self.value <= self.bar


@dataclass(frozen=True)
class Series:
    """The values of one program in one case, a value a round.

    `beside` holds what leanvocab took in the same rounds, so that ratios are taken pair by pair; empty for leanvocab
    itself and where the two did not take turns. `who` begins with "limit" where it is no program but what none can beat.
    """

    measure: str
    case: str
    who: str
    values: tuple[float, ...]
    unit: str
    beside: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def is_limit(self) -> bool:
        return self.who.startswith("limit")

    @property
    def ratio(self) -> float | None:
        """This program's value over leanvocab's: the median of the pairs' ratios, None where there are no pairs."""
        pairs = [value / ours for value, ours in zip(self.values, self.beside, strict=False) if ours > 0]
        return statistics.median(pairs) if pairs else None


@dataclass(frozen=True)
class Result:
    """Results of one run of a benchmark about one subject (a model, a data set) on one machine."""

    benchmark: str
    title: str
    subject: str
    device: str
    series: tuple[Series, ...] = ()
    figures: tuple[Figure, ...] = ()
    open: tuple[str, ...] = ()  # what was not measured, and why
    seconds: float = 0.0
    budget_seconds: float | None = None
    details: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, str] = field(default_factory=lambda: dict(_machine()))
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())

    @property
    def note(self) -> str:
        """Words that stand beside every figure of it; none beside what was measured."""
        return (
            f"{LEFT_OUT} Made by `python -m benchmarks {self.benchmark} --device paper`."
            if self.device == PAPER
            else ""
        )

    @property
    def file_name(self) -> str:
        return "--".join(map(_slug, (self.benchmark, self.subject, self.hardware, self.date))) + ".json"

    @property
    def hardware(self) -> str:
        if self.device == "cpu":
            return f"{self.machine['processor']} {self.machine['cores']} cores"
        return self.machine.get("gpu", self.device)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; the figures also say whether they hold."""
        content = asdict(self)
        content["figures"] = [asdict(figure) | {"holds": figure.holds} for figure in self.figures]
        return content | ({"note": self.note} if self.note else {})

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.file_name
        path.write_text(json.dumps(_rounded(self.to_dict()), indent=1) + "\n")
        return path

    @classmethod
    def read(cls, path: Path) -> "Result":
        return cls.of(json.loads(path.read_text()))

    @classmethod
    def of(cls, content: dict[str, Any]) -> "Result":
        """The result that `to_dict` described."""
        content = {name: value for name, value in content.items() if name != "note"}
        content["series"] = tuple(
            Series(**each | {"values": tuple(each["values"]), "beside": tuple(each["beside"])})
            for each in content["series"]
        )
        content["figures"] = tuple(
            Figure(**{name: value for name, value in each.items() if name != "holds"}) for each in content["figures"]
        )
        return cls(**content | {"open": tuple(content["open"])})


def beside_ours(measure: str, case: str, unit: str, found: dict[str, list[float]]) -> list[Series]:
    """Series of programs that took turns with leanvocab: what each took in each round."""
    ours = tuple(found.get(OURS, ()))
    return [
        Series(measure, case, who, tuple(values), unit, () if who == OURS else ours)
        for who, values in found.items()
        if values
    ]


def median_interval(values: Sequence[float], rounds: int = 10_000) -> tuple[float, float]:
    """The 95 % bootstrap interval of the median."""
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(values, k=len(values))) for _ in range(rounds))
    return medians[int(0.025 * rounds)], medians[int(0.975 * rounds)]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def _rounded(value: Any) -> Any:
    """Five digits are more than any of these figures is good for."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value
