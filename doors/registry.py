"""A door: a function that runs a pair of runs, with leanvocab and without, and says what came of it."""

import importlib
import importlib.metadata
import importlib.util
import math
import os
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import doors

Verdict = Literal["identical", "close", "different", "refused", "works"]
# Modules of this package that hold no doors.
_ROOMS = {"__main__", "registry", "pairs", "models", "ranks", "results", "table"}

SLOW: dict[str, Any] = {"fast": False}  # two or three of a kind are enough in each test run


@dataclass(frozen=True)
class Outcome:
    """Outcome that a door measured."""

    verdict: Verdict
    detail: str = ""  # by how much, in which tensor; or the text of the refusal
    difference: float = 0.0  # largest relative difference of a tensor, by norm
    saved_per_element: float | None = None  # bytes held less at a step, for each element of a row that is left out


@dataclass(frozen=True)
class Door:
    """One combination. `expects` is what it must give: the tests and `python -m doors` fail where it gives another."""

    name: str  # kind.function, unique
    kind: str  # the file it stands in
    combined: str  # what was combined, as the table says it
    run: Callable[[Path], Outcome]
    expects: Verdict
    within: float  # for "close": the largest relative difference that is allowed
    why: str  # which operation makes it close or different, or why it is refused
    needs: tuple[str, ...]  # distributions beside leanvocab's own dependencies, as pip calls them
    pip: str  # what to install for it
    fast: bool  # whether `make test` runs it
    gpu: bool  # whether it needs one
    refuses: str = field(default="", repr=False)  # for "refused": a part of the error's text
    files: tuple[str, ...] = ()  # real models and data that it needs, as `real_file` names them

    def missing(self) -> str:
        """Reason why it cannot run here, with the pip line; empty where it can."""
        absent = [each for each in self.needs if not _is_installed(each)]
        if absent:
            return f"needs {', '.join(absent)}: pip install {self.pip or ' '.join(absent)}"
        if self.gpu and not _has_gpu():
            return "needs a GPU"
        lacking = [each for each in self.files if not real_file(each).exists()]
        return (
            f"needs {', '.join(lacking)}, which make doors fetches where shared data lie beside the project"
            if lacking
            else ""
        )

    def versions(self) -> dict[str, str]:
        """Versions of what was combined."""
        return {each: importlib.metadata.version(each) for each in ("torch", "transformers", *self.needs)}


_doors: dict[str, Door] = {}


def door(
    combined: str,
    *,
    expects: Verdict = "identical",
    within: float = 0.0,
    why: str = "",
    refuses: str = "",
    needs: str | tuple[str, ...] = (),
    pip: str = "",
    fast: bool = True,
    gpu: bool = False,
    name: str = "",
    files: tuple[str, ...] = (),
) -> Callable[[Callable[[Path], Outcome]], Callable[[Path], Outcome]]:
    """Registers a function that gets an empty folder and returns an `Outcome`; see README.md."""

    def register(function: Callable[[Path], Outcome]) -> Callable[[Path], Outcome]:
        kind = function.__module__.rpartition(".")[2]
        full_name = f"{kind}.{name or function.__name__}"
        if full_name in _doors:
            raise ValueError(f"two doors are called {full_name}")
        if expects in ("close", "different", "refused") and not why:
            raise ValueError(f"{full_name} expects {expects!r}, and does not say why")
        listed = (needs,) if isinstance(needs, str) else tuple(needs)
        _doors[full_name] = Door(
            full_name, kind, combined, function, expects, within, why, listed, pip, fast, gpu, refuses, files
        )
        return function

    return register


def all_doors() -> list[Door]:
    """Every door, in the order of files and of lines. Files import what they need inside their functions."""
    for module in pkgutil.iter_modules(doors.__path__):
        if module.name not in _ROOMS:
            importlib.import_module(f"doors.{module.name}")
    return list(_doors.values())


def problem(each: Door, outcome: Outcome) -> str:
    """Difference from what the door expects; empty where all is well."""
    allowed = {"close": ("close", "identical"), "different": ("close", "different")}.get(each.expects, (each.expects,))
    if outcome.verdict not in allowed:
        return f"{each.name}: expected {each.expects}, found {outcome.verdict}: {outcome.detail}"
    if each.expects == outcome.verdict == "close" and outcome.difference > each.within:
        return f"{each.name}: differs by {outcome.difference:.1e}, expected at most {each.within:.1e}: {outcome.detail}"
    if each.expects == outcome.verdict == "different" and not math.isfinite(outcome.difference):
        return f"{each.name}: expected numbers that differ, found {outcome.detail}"
    if each.refuses and each.refuses not in outcome.detail:
        return f"{each.name}: expected a refusal that says {each.refuses!r}, found: {outcome.detail}"
    return ""


def real_file(name: str) -> Path:
    """ "models/…" are those that shared/tools/fetch_models.py made in .cache; anything else lies in the folder of real data."""
    root = Path(doors.__path__[0]).parent
    shared = Path(os.environ.get("LEANVOCAB_SHARED", root.parent / "shared"))
    return root / ".cache" / name if name.startswith("models/") else shared / name


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
