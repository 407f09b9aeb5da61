"""Files of a results folder: one JSON file a run, from which the CSV files, plots and tables are made.

about.json           model, settings, machine and versions
runs/CELL.json       everything that one run found
held_out.csv         a line for each run, vocabulary and held-out text
runs.csv             a line for each run and vocabulary: training, drift
generations.csv      a line for each run and prompt
"""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from studies.output_modes.grid import Cell

Run = dict[str, Any]


class Results:
    """A results folder. What was found with one model and one size is not mixed with what another gave."""

    def __init__(self, folder: Path):
        self.folder = folder

    def begin(self, about: Mapping[str, Any]) -> None:
        """Writes down what the runs have in common.

        Raises:
            ValueError: the folder holds runs of another model or size.
        """
        (self.folder / "runs").mkdir(parents=True, exist_ok=True)
        path = self.folder / "about.json"
        if path.exists() and any((self.folder / "runs").iterdir()):
            before = json.loads(path.read_text())
            for name in ("model", "settings"):
                if before[name] != about[name]:
                    raise ValueError(
                        f"{self.folder} holds runs with {name} {before[name]}, and this is {about[name]}: "
                        "name another folder with --output, or remove that one"
                    )
        write_json(path, about)

    @property
    def about(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / "about.json").read_text())
        return content

    def has(self, cell: Cell) -> bool:
        return self._path(cell).exists()

    def add(self, cell: Cell, found: Run) -> None:
        """Writes a run, whole or not at all, and the CSV files again."""
        write_json(self._path(cell), found)
        self.write_csv()

    def runs(self) -> list[Run]:
        """Every run that is there: the base first, then by mode, vocabulary, learning rate and seed."""
        found = [json.loads(path.read_text()) for path in sorted((self.folder / "runs").glob("*.json"))]
        order = ("base", "full", "frozen", "restricted")
        return sorted(
            found,
            key=lambda run: (
                order.index(run["mode"]), run["vocabulary"] or "", run["learning_rate"] or 0.0, run["seed"]
            ),
        )  # fmt: skip

    def write_csv(self) -> None:
        runs = self.runs()
        for name, rows in (
            ("held_out", held_out_rows(runs)),
            ("runs", run_rows(runs)),
            ("generations", generation_rows(runs)),
        ):
            _write_rows(self.folder / f"{name}.csv", list(rows))

    def _path(self, cell: Cell) -> Path:
        return self.folder / "runs" / f"{cell.name}.json"


def held_out_rows(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """A row for each run, vocabulary that it is measured against, and held-out text."""
    for run in runs:
        for domain, by_vocabulary in run["held_out"].items():
            for vocabulary, measures in by_vocabulary.items():
                yield {**_key(run, vocabulary), "text": domain, **measures}


def run_rows(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """A row for each run and vocabulary that it is measured against."""
    for run in runs:
        for vocabulary, moved in run["drift"].items():
            training = run["training"]
            losses = training.get("losses") or [None]
            yield {
                **_key(run, vocabulary), "first_loss": losses[0], "last_loss": losses[-1], **moved,
                **{name: training.get(name) for name in ("median_step_seconds", "median_step_cpu_seconds")},
            }  # fmt: skip


def generation_rows(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """A row for each run, vocabulary that it is measured against, and prompt."""
    for run in runs:
        for made in run["generations"]:
            for vocabulary, num_outside in made["num_outside"].items():
                yield {
                    **_key(run, vocabulary), "prompt": made["prompt"], "text": made["text"],
                    "num_tokens": made["num_tokens"], "num_outside": num_outside,
                }  # fmt: skip


def _key(run: Run, vocabulary: str) -> dict[str, Any]:
    return {
        "mode": run["mode"], "learning_rate": run["learning_rate"], "seed": run["seed"],
        "vocabulary": vocabulary, "kept_rows": run["vocabulary_rows"][vocabulary],
    }  # fmt: skip


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Beside it first, then in its place."""
    beside = path.with_suffix(".json.new")
    beside.write_text(json.dumps(_rounded(content), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _rounded(value: Any) -> Any:
    """Six digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {name: _rounded(each) for name, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value
