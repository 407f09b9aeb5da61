"""`leanvocab merge` and `leanvocab delta`, on disk: base + delta → full checkpoint, and two checkpoints → a delta."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leanvocab.cli.command import Answer, as_command
from leanvocab.errors import CheckpointError, SettingsError
from leanvocab.files.presence import is_file
from leanvocab.reports.memory_estimate import format_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from leanvocab.checkpoints.merge import MergeResult


@dataclass(frozen=True)
class MergeOptions:
    """Options that `merge_checkpoint` has by the same names."""

    in_place: Annotated[bool, typer.Option("--in-place", help="Replace the base, once the output is complete.")] = False
    verify: Annotated[bool, typer.Option("--verify", help="Re-read the output and prove it, before it appears.")] = (
        False
    )
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what lies in OUTPUT.")] = False
    vocabulary: Annotated[
        Path | None, typer.Option(help="Vocabulary file of the rows, where DELTA is a partial checkpoint.")
    ] = None
    allow_nan: Annotated[bool, typer.Option("--allow-nan", help="Take rows that hold NaN.")] = False
    allow_rounding: Annotated[
        bool, typer.Option("--allow-rounding", help="Round values that the base's dtype cannot hold.")
    ] = False


@as_command
def merge_command(
    *,
    base: Annotated[
        Path,
        typer.Argument(help="The pretrained checkpoint that was fine-tuned: a folder, or a name in the hub's cache."),
    ],
    delta: Annotated[Path, typer.Argument(help="Folder of the delta.")],
    output: Annotated[Path | None, typer.Argument(help="Folder to make; it appears whole or not at all.")] = None,
    options: MergeOptions,
) -> Answer:
    """Make a full checkpoint of a base and a delta, without building the model."""
    if (output is None) != options.in_place:
        raise SettingsError("give OUTPUT, a folder to make, or --in-place to replace the base: one of the two")
    from leanvocab.checkpoints.merge import merge_checkpoint

    try:
        result = merge_checkpoint(base=base, delta=delta, output=output, **vars(options))
    except OSError as error:  # a full disk, a folder that is read-only: nothing has changed
        raise CheckpointError(f"nothing was written: {error}") from error
    speed = result.num_bytes / 1e6 / max(result.seconds, 1e-9)
    return Answer(
        {**vars(result), "megabytes_per_second": speed}, lambda: [_summary(result), *next_step(result.output)]
    )


def next_step(output: Path) -> list[str]:
    """The line that loads a model, to copy; none where its config names no class."""
    config = json.loads((output / "config.json").read_bytes()) if is_file(output / "config.json") else {}
    return [
        f"to use it: transformers.{name}.from_pretrained({json.dumps(str(output))})"
        for name in config.get("architectures") or ()
    ][:1]


def _summary(result: "MergeResult") -> str:
    where, proof = result.output, " and proved" if result.verified else ""
    if result.already_there:
        return f"{where} is this merge's result already{proof}; nothing was written"
    others = f", {result.num_replaced:,} other tensors replaced" if result.num_replaced else ""
    others += f", {result.num_added:,} added" if result.num_added else ""
    left = f"; left out, since they are not merged: {', '.join(result.left_out)}" if result.left_out else ""
    done = f"{result.num_bytes / 1e6:,.1f} MB in {result.seconds:.1f} s"
    return f"{where}: {result.num_rows:,} rows{others}; written{proof}, {done}{left}"


# --- the other way ------------------------------------------------------------------------------------------------------


@as_command
def delta_command(
    *,
    model: Annotated[Path, typer.Argument(help="Folder of the fine-tuned checkpoint, whatever trained it.")],
    base: Annotated[
        str, typer.Argument(help="The checkpoint that it was trained from: a folder, or a name in the hub's cache.")
    ],
    output: Annotated[Path, typer.Argument(help="Folder to make; it appears whole or not at all.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what lies in OUTPUT.")] = False,
) -> Answer:
    """Make a delta of two checkpoints: the rows and tensors in which they differ. `leanvocab merge` gives MODEL back."""
    from leanvocab.checkpoints.delta_format import merge_command
    from leanvocab.checkpoints.delta_making import make_delta
    from leanvocab.reports.inspection import inspect_delta

    made = make_delta(model, base, output, overwrite=overwrite)
    delta = inspect_delta(made.output).to_dict()
    summary = {"output": str(output), "delta": delta, "left_out": made.left_out}
    return Answer(summary, lambda: _delta_printed(summary, merge_command(base, str(output))))


def _delta_printed(summary: dict[str, Any], to_merge: str) -> "list[Table | str]":
    from rich.table import Column, Table

    delta = summary["delta"]
    grid = Table("", Column(overflow="fold"), title=summary["output"], show_header=False)
    for name, table in delta["tables"].items():
        grid.add_row(name, f"{table['kept_rows']:,} of {table['full_rows']:,} rows differ")
    grid.add_row("other tensors", f"{len(delta['tensors']):,} differ, of which {len(delta['new']):,} are new")
    grid.add_row("size", f"{format_bytes(delta['num_bytes'])} beside a base of {format_bytes(delta['base_bytes'])}")
    lines = [f"to merge: {to_merge}"]
    if summary["left_out"]:
        lines.append(
            f"not carried, since a delta holds no such files: {_folded(summary['left_out'])}; a merge takes the base's"
        )
    return [grid, *lines]


def _folded(names: Iterable[str]) -> str:
    """Names of files; those of a folder as the folder, and how many they are."""
    tops = Counter(name.partition("/")[0] + "/" * ("/" in name) for name in names)
    return ", ".join(f"{top} ({number:,} files)" if top.endswith("/") else top for top, number in tops.items())
