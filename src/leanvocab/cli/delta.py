"""`leanvocab delta`: two checkpoints on disk → a delta."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leanvocab.cli.command import Answer, as_command
from leanvocab.reports.memory_estimate import format_bytes

if TYPE_CHECKING:
    from rich.table import Table


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
    return Answer(summary, lambda: _printed(summary, merge_command(base, str(output))))


def _printed(summary: dict[str, Any], to_merge: str) -> "list[Table | str]":
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
