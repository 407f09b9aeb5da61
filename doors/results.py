"""The last result of each door, one file a kind: what was found, with which versions, when and on what."""

import datetime
import json
import os
import platform
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from doors.registry import Door, Outcome

FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Result:
    """A row of the table."""

    name: str
    combined: str
    verdict: str
    difference: float
    detail: str
    why: str
    saved_per_element: float | None
    versions: dict[str, str]
    date: str
    device: str


def result_of(door: Door, outcome: Outcome) -> Result:
    """Parts of an outcome that are kept; paths of this machine are not."""
    saved = None if outcome.saved_per_element is None else round(outcome.saved_per_element, 2)
    detail = outcome.detail.replace(tempfile.gettempdir(), "…").replace(str(Path.cwd()), "…")
    # "close" is for rounding alone: where the algorithm is another one, a small difference is a difference
    verdict = "different" if door.expects == "different" and outcome.verdict == "close" else outcome.verdict
    return Result(
        door.name, door.combined, verdict, float(f"{outcome.difference:.2g}"), detail, door.why, saved,
        door.versions(), datetime.date.today().isoformat(), _device(),
    )  # fmt: skip


def read_results() -> dict[str, Result]:
    """All results by the door's name."""
    found = {}
    for path in sorted(FOLDER.glob("*.json")):
        for entry in json.loads(path.read_text()):
            found[entry["name"]] = Result(**entry)
    return found


def write_result(door: Door, result: Result, known: list[str]) -> None:
    """Puts a result in its kind's file, in the order of `known`; results of doors that are no more are dropped."""
    path = FOLDER / f"{door.kind}.json"
    entries = {each["name"]: each for each in json.loads(path.read_text())} if path.exists() else {}
    entries[result.name] = asdict(result)
    FOLDER.mkdir(exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(
        json.dumps([entries[name] for name in known if name in entries], indent=1, ensure_ascii=False) + "\n"
    )
    os.replace(new, path)


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}"
