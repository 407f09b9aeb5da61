"""`leanvocab info`: what a checkpoint, a delta or a vocabulary file is."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leanvocab.cli.command import Answer, as_command
from leanvocab.cli.data_counts import describe_vocabulary, load_tokenizer
from leanvocab.errors import ModelError, SettingsError

if TYPE_CHECKING:
    from rich.table import Table

_NUM_NAMED = 8


@as_command
def info_command(
    *,
    path: Annotated[
        str, typer.Argument(help="Folder of a checkpoint or a delta, name on the hub, or vocabulary file (.json).")
    ],
    base: Annotated[
        str | None, typer.Option(help="Pretrained checkpoint to compare with: which rows were trained?")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer that names tokens. By default the checkpoint's own.")
    ] = None,
) -> Answer:
    """Say what a checkpoint, a delta or a vocabulary file is, without loading weights.

    Of a checkpoint, every vocabulary-sized tensor: its share, what it is tied to, and what becomes of it when it is shrunk.
    """
    if Path(path).is_file() and Path(path).suffix == ".json":
        described = _vocabulary(path, tokenizer)
    elif (Path(path) / "leanvocab.json").is_file():
        described = _delta(path, base, tokenizer)
    else:
        described = _checkpoint(path, base, tokenizer)
    return Answer(described, lambda: _printed(described))


def _printed(described: dict[str, Any]) -> "list[Table]":
    return [_grid(described), *([_inventory(described)] if described["kind"] == "checkpoint" else [])]


def _vocabulary(path: str, tokenizer: str | None) -> dict[str, Any]:
    from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

    vocabulary = PartialVocabulary.load(path)
    named = {"first_tokens": _tokens(vocabulary.token_ids, tokenizer)} if tokenizer else {}
    return {"kind": "vocabulary", "name": path, **describe_vocabulary(vocabulary), **named}


def _checkpoint(path: str, base: str | None, tokenizer: str | None) -> dict[str, Any]:
    from leanvocab.reports.inspection import inspect_checkpoint, trained_rows

    checkpoint = inspect_checkpoint(path)
    described: dict[str, Any] = {"kind": "checkpoint", **checkpoint.to_dict()}
    if base is not None:
        rows = trained_rows(checkpoint, inspect_checkpoint(base))
        described["trained"] = {
            "base": base,
            "num_rows": len(rows),
            "rows_ratio": len(rows) / checkpoint.full_size,
            "token_ids": rows.tolist(),
            "first_tokens": _tokens(rows, tokenizer or path),
        }
    return described


def _delta(path: str, base: str | None, tokenizer: str | None) -> dict[str, Any]:
    from leanvocab.checkpoints.delta_format import merge_command, read_description
    from leanvocab.reports.inspection import inspect_delta

    if base is not None:
        raise SettingsError("a delta says by itself which rows were trained, and from which base: leave --base out")
    delta = inspect_delta(Path(path))
    described = {"kind": "delta", **delta.to_dict(), "to_merge": merge_command(delta.base)}
    if tokenizer:
        for name, table in read_description(Path(path)).tables.items():
            described["tables"][name]["first_tokens"] = _tokens(table.vocabulary.token_ids, tokenizer)
    return described


def _tokens(token_ids: Any, tokenizer: str) -> list[str]:
    try:
        loaded = load_tokenizer(tokenizer)
    except ModelError:
        return []  # a checkpoint without a tokenizer: ids say enough
    return [str(token) for token in loaded.convert_ids_to_tokens(token_ids[:_NUM_NAMED].tolist())]


def _grid(described: dict[str, Any]) -> "Table":
    from rich.markup import escape
    from rich.table import Table

    grid = Table(title=escape(described["name"]), show_header=False)
    grid.add_column()
    grid.add_column(overflow="fold")
    rows = {"vocabulary": _vocabulary_rows, "delta": _delta_rows, "checkpoint": _checkpoint_rows}
    for name, value in rows[described["kind"]](described):
        grid.add_row(name, escape(value))
    return grid


def _vocabulary_rows(described: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("kept rows", f"{described['kept_rows']:,} of {described['full_rows']:,} ({described['kept_ratio']:.1%})"),
        ("digest", described["digest"]),
    ]
    if "first_tokens" in described:
        rows.append(("first tokens", " ".join(described["first_tokens"])))
    return rows


def _checkpoint_rows(described: dict[str, Any]) -> list[tuple[str, str]]:
    from leanvocab.reports.units import format_bytes

    rows = [
        ("class", f"{described['model_class']} ({described['model_type']})"),
        ("parameters", f"{described['num_parameters']:,}, {format_bytes(described['num_bytes'])}"),
        ("dtypes", ", ".join(f"{dtype}: {number:,}" for dtype, number in described["dtypes"].items())),
        ("vocabulary", f"{described['full_size']:,} rows"),
    ]
    if training := described["training"]:
        rows.append(("trained with", f'output="{training["output"]}": {training["meaning"]}'))
    if trained := described.get("trained"):
        named = " ".join(trained["first_tokens"])
        more = " …" if trained["num_rows"] > len(trained["first_tokens"]) else ""
        rows.append(
            ("rows trained", f"{trained['num_rows']:,} ({trained['rows_ratio']:.1%}) differ from {trained['base']}")
        )
        if named:
            rows.append(("such as", named + more))
    return rows


def _delta_rows(described: dict[str, Any]) -> list[tuple[str, str]]:
    from leanvocab.reports.units import format_bytes

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


def _inventory(described: dict[str, Any]) -> "Table":
    """Every vocabulary-sized tensor, and what becomes of it in each mode that the model can be shrunk in."""
    from rich.markup import escape
    from rich.table import Table

    from leanvocab.reports.units import format_bytes

    inventory = described["inventory"]
    modes = list(dict.fromkeys(mode for tensor in inventory["tensors"] for mode in tensor["outcomes"]))
    grid = Table(title="vocabulary-sized tensors")
    for heading in ("names of one memory", "what", "shape", "size"):
        grid.add_column(heading, overflow="fold", justify="right" if heading == "size" else "left")
    for mode in modes:
        grid.add_column(f"{mode}*" if mode == inventory["default_mode"] else mode)
    for tensor in inventory["tensors"]:
        shape = " × ".join(f"{size:,}" for size in tensor["shape"])
        size = f"{format_bytes(tensor['num_bytes'])} ({tensor['ratio']:.1%})"
        cells = [escape(" = ".join(tensor["names"])), tensor["kind"], f"{shape} {tensor['dtype']}", size]
        grid.add_row(*cells, *(tensor["outcomes"][mode] for mode in modes))
    refusals = [f"{mode}: {escape(reason.partition('. ')[0])}" for mode, reason in inventory["refusals"].items()]
    grid.caption_justify = "left"
    grid.caption = "\n".join([*(["* by default"] if inventory["default_mode"] else []), *refusals]) or None
    return grid
