"""Runs of the commands in this process, and runs of the main job beside one another."""

import json
from typing import Any

from click.testing import Result
from texts import files_in
from typer.testing import CliRunner

from leanvocab.cli.app import app


def run(*words: Any, code: int = 0) -> Result:
    """A command that ends with this exit code."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exit_code != code:
        raise AssertionError(f"exit code {result.exit_code}: {result.output}") from result.exception
    return result


def json_of(*words: Any, code: int = 0) -> Any:
    """The object that a command prints with --json."""
    return json.loads(run(*words, "--json", code=code).stdout)


def text_of(*words: Any) -> str:
    """The words that a command prints, without the lines of its tables."""
    return " ".join(run(*words).stdout.replace("│", " ").replace("┃", " ").split())


def assert_same_run(full: Any, partial: Any) -> None:
    """Losses, scores and files are equal, but for timings, paths, and the settings that they were given."""
    assert full.losses == partial.losses
    assert full.scores == partial.scores
    for name in files_in(full.output_dir):
        if not name.endswith(("finetune.json", "run.json", "trainer_state.json", "training_args.bin")):
            assert (full.output_dir / name).read_bytes() == (partial.output_dir / name).read_bytes(), name
