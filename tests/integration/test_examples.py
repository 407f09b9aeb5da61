"""Every example runs as a user runs it, on a small model and a small file, and stays short enough to read."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_language import pairs, save_language_model
from small_text import rows, save_pretrained, write

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
LANGUAGE_MODELS = {"causal_lm": "gpt2", "masked_lm": "bert", "seq2seq_lm": "t5"}  # tied, as published ones are


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_and_saves(example: Path, tmp_path: Path) -> None:
    if example.stem in LANGUAGE_MODELS:
        save_language_model(tmp_path / "model", LANGUAGE_MODELS[example.stem], tied=True)
    else:
        save_pretrained(tmp_path / "model")
    table = pairs(48, names=("source", "target")) if example.stem == "seq2seq_lm" else rows()
    write(tmp_path / "data.csv", table)
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
    if example.stem in LANGUAGE_MODELS:
        assert "of 320 rows, output='frozen'" in done.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_has_at_most_forty_lines(example: Path) -> None:
    assert len(example.read_text().splitlines()) <= 40
