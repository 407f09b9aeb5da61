"""`leanvocab info`: what a checkpoint, an adapter, a delta, a vocabulary or a data file is."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from leanvocab.choices import OUTPUT_MODES
from leanvocab.cli.command import Answer, as_command
from leanvocab.cli.described import describe
from leanvocab.cli.printing import folded_at_dots, say_where_from
from leanvocab.reports.memory_estimate import format_bytes

if TYPE_CHECKING:
    from rich.table import Table

_NAME_WIDTH = 22  # of a column of names, beside five others on 80 columns


@as_command
def info_command(
    *,
    path: Annotated[
        str,
        typer.Argument(help="Folder of a checkpoint, an adapter or a delta; name on the hub; or a file."),
    ],
    base: Annotated[
        str | None, typer.Option(help="Pretrained checkpoint to compare with: which rows were trained?")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer that names tokens. By default the checkpoint's own.")
    ] = None,
) -> Answer:
    """Say what a checkpoint, an adapter, a delta, a vocabulary or a data file is, without loading weights.

    Of a checkpoint, every vocabulary-sized tensor: its share, what it is tied to, and what becomes of it when it is shrunk.
    """
    say_where_from(path, *filter(None, (base, tokenizer)))
    described = describe(path, base, tokenizer)
    return Answer(described, lambda: _printed(described))


def _printed(described: dict[str, Any]) -> "list[Table]":
    from rich.table import Column, Table

    grid = Table("", Column(overflow="fold"), title=described["name"], show_header=False)
    rows = {"vocabulary": _vocabulary_rows, "delta": _delta_rows, "checkpoint": _checkpoint_rows}
    for row in rows.get(described["kind"], _plain_rows)(described):
        grid.add_row(*row)
    return [grid, *([_inventory(described["inventory"])] if described["kind"] == "checkpoint" else [])]


def _plain_rows(described: dict[str, Any]) -> list[tuple[str, str]]:
    """What has few facts, as they are."""
    rows = []
    for name, value in described.items():
        if name != "name" and value not in (None, [], {}):
            text = format_bytes(value) if name == "num_bytes" else f"{value:,}" if type(value) is int else value
            rows.append(
                (name.removeprefix("num_").replace("_", " "), ", ".join(text) if isinstance(text, list) else str(text))
            )
    return rows


def _vocabulary_rows(described: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("kept rows", f"{described['kept_rows']:,} of {described['full_rows']:,} ({described['kept_ratio']:.1%})"),
        ("digest", described["digest"]),
    ]
    if "first_tokens" in described:
        rows.append(("first tokens", " ".join(described["first_tokens"])))
    return rows


def _checkpoint_rows(described: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("class", f"{described['model_class']} ({described['model_type']})"),
        ("parameters", f"{described['num_parameters']:,}, {format_bytes(described['num_bytes'])}"),
        ("dtypes", ", ".join(f"{dtype}: {number:,}" for dtype, number in described["dtypes"].items())),
        ("vocabulary", f"{described['full_size']:,} rows"),
    ]
    if training := described["training"]:
        rows.append(("trained with", f'output="{training["output"]}": {training["meaning"]}'))
    if trained := described.get("trained"):
        differing = f"{trained['num_rows']:,} ({trained['rows_ratio']:.1%}) differ from {trained['base']}"
        rows.append(("rows trained", differing))
        if named := trained["first_tokens"]:
            rows.append(("such as", " ".join(named) + (" …" if trained["num_rows"] > len(named) else "")))
    return rows


def _delta_rows(described: dict[str, Any]) -> list[tuple[str, str]]:
    revision = f" at {described['revision']}" if described["revision"] else ""
    rows = [
        ("kind", "delta: for leanvocab alone"),
        ("base", f"{described['base']}{revision}"),
        ("trained with", f'output="{described["output"]}"'),
    ]
    for name, table in described["tables"].items():
        kept, full = table["kept_rows"], table["full_rows"]
        named = f", such as {' '.join(table['first_tokens'])}" if table.get("first_tokens") else ""
        rows.append((name, f"{kept:,} of {full:,} rows ({kept / full:.1%}), vocabulary {table['digest'][:16]}…{named}"))
    rows += [
        ("other tensors", f"{len(described['tensors']):,}, of which {len(described['new']):,} are new"),
        ("size", f"{format_bytes(described['num_bytes'])} beside a base of {format_bytes(described['base_bytes'])}"),
        ("optimizer states", "with them" if described["has_optimizer"] else "none"),
        ("to merge", described["to_merge"]),
    ]
    return rows


def _inventory(inventory: dict[str, Any]) -> "Table":
    """Every vocabulary-sized tensor, and the modes in which it becomes partial, of those that the model can be shrunk in."""
    from rich.table import Column, Table

    marked = {mode: f"{mode}*" if mode == inventory["default_mode"] else mode for mode in OUTPUT_MODES}
    names = [[folded_at_dots(name, _NAME_WIDTH) for name in tensor["names"]] for tensor in inventory["tensors"]]
    grid = Table(
        Column("names of one memory", no_wrap=True),
        Column("what", overflow="fold"),
        Column("shape", overflow="fold"),
        Column("size", justify="right", overflow="fold"),
        Column("partial in the modes", overflow="fold"),
        title="vocabulary-sized tensors",
        caption_justify="left",
    )
    for tensor, cell in zip(inventory["tensors"], names, strict=True):
        shape = " × ".join(f"{size:,}" for size in tensor["shape"])
        size = f"{format_bytes(tensor['num_bytes'])} ({tensor['ratio']:.1%})"
        modes = ", ".join(marked[mode] for mode, outcome in tensor["outcomes"].items() if outcome == "partial")
        grid.add_row(" =\n".join(cell), tensor["kind"], f"{shape} {tensor['dtype']}", size, modes or "none")
    refusals = [f"{mode}: {reason.partition('. ')[0]}" for mode, reason in inventory["refusals"].items()]
    grid.caption = "\n".join([*(["* by default"] if inventory["default_mode"] else []), *refusals]) or None
    return grid
