"""Every example runs as a user runs it, on a small model and a small file, and stays short enough to read."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_text import rows, save_pretrained

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_and_saves(example: Path, tmp_path: Path) -> None:
    save_pretrained(tmp_path / "model")
    with (tmp_path / "data.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows())
    command = [
        sys.executable,
        str(example),
        str(tmp_path / "model"),
        str(tmp_path / "data.csv"),
        str(tmp_path / "output"),
    ]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    saved = {path.name for path in (tmp_path / "output").iterdir()}
    assert saved & {"model.safetensors", "adapter_model.safetensors"}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_has_at_most_forty_lines(example: Path) -> None:
    assert len(example.read_text().splitlines()) <= 40
