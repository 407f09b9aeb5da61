"""`leanvocab info`: what a checkpoint, a delta or a vocabulary file is."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leanvocab.cli.shell import AsJson, clean_errors, print_json, print_rich
from leanvocab.errors import SettingsError

if TYPE_CHECKING:
    from rich.table import Table

_NUM_NAMED = 8


def info(
    path: Annotated[
        str, typer.Argument(help="Folder of a checkpoint or a delta, name on the hub, or vocabulary file (.json).")
    ],
    base: Annotated[
        str | None, typer.Option(help="Pretrained checkpoint to compare with: which rows were trained?")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer that names tokens. By default the checkpoint's own.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a checkpoint, a delta or a vocabulary file is, without loading weights.

    Of a checkpoint, every vocabulary-sized tensor: its share, what it is tied to, and what becomes of it when it is shrunk.
    """
    with clean_errors(as_json):
        if Path(path).is_file() and Path(path).suffix == ".json":
            described = _vocabulary(path, tokenizer)
        elif (Path(path) / "leanvocab.json").is_file():
            described = _delta(path, base, tokenizer)
        else:
            described = _checkpoint(path, base, tokenizer)
    if as_json:
        print_json(described)
    else:
        print_rich(_table(described), *([_inventory(described)] if described["kind"] == "checkpoint" else []))


def _vocabulary(path: str, tokenizer: str | None) -> dict[str, Any]:
    from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

    vocabulary = PartialVocabulary.load(path)
    return {
        "kind": "vocabulary",
        "name": path,
        "kept_rows": len(vocabulary),
        "full_rows": vocabulary.full_size,
        "kept_ratio": len(vocabulary) / vocabulary.full_size,
        "digest": vocabulary.digest,
    } | ({"first_tokens": _tokens(vocabulary.token_ids, tokenizer)} if tokenizer else {})


def _checkpoint(path: str, base: str | None, tokenizer: str | None) -> dict[str, Any]:
    from leanvocab.reports.inspection import inspect_checkpoint, trained_rows

    found = inspect_checkpoint(path)
    described: dict[str, Any] = {"kind": "checkpoint", **found.to_dict()}
    if base is not None:
        rows = trained_rows(found, inspect_checkpoint(base))
        described["trained"] = {
            "base": base,
            "num_rows": len(rows),
            "rows_ratio": len(rows) / found.full_size,
            "token_ids": rows.tolist(),
            "first_tokens": _tokens(rows, tokenizer or path),
        }
    return described


def _delta(path: str, base: str | None, tokenizer: str | None) -> dict[str, Any]:
    from leanvocab.checkpoints.delta_format import merge_command, read_description
    from leanvocab.reports.inspection import inspect_delta

    if base is not None:
        raise SettingsError("a delta says by itself which rows were trained, and from which base: leave --base out")
    found = inspect_delta(Path(path))
    described = {"kind": "delta", **found.to_dict(), "to_merge": merge_command(found.base)}
    if tokenizer:
        for name, table in read_description(Path(path)).tables.items():
            described["tables"][name]["first_tokens"] = _tokens(table.vocabulary.token_ids, tokenizer)
    return described


def _tokens(token_ids: Any, tokenizer: str) -> list[str]:
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError, KeyError):
        return []  # a checkpoint without a tokenizer: ids say enough
    return [str(token) for token in loaded.convert_ids_to_tokens(token_ids[:_NUM_NAMED].tolist())]


def _table(described: dict[str, Any]) -> "Table":
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(described["name"]), show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    rows = {"vocabulary": _vocabulary_rows, "delta": _delta_rows, "checkpoint": _checkpoint_rows}
    for name, value in rows[described["kind"]](described):
        table.add_row(name, escape(value))
    return table


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

    found = described["inventory"]
    modes = list(dict.fromkeys(mode for each in found["tensors"] for mode in each["outcomes"]))
    table = Table(title="vocabulary-sized tensors")
    for heading in ("names of one memory", "what", "shape", "size"):
        table.add_column(heading, overflow="fold", justify="right" if heading == "size" else "left")
    for mode in modes:
        table.add_column(f"{mode}*" if mode == found["default_mode"] else mode)
    for each in found["tensors"]:
        shape = " × ".join(f"{size:,}" for size in each["shape"])
        size = f"{format_bytes(each['num_bytes'])} ({each['ratio']:.1%})"
        cells = [escape(" = ".join(each["names"])), each["kind"], f"{shape} {each['dtype']}", size]
        table.add_row(*cells, *(each["outcomes"][mode] for mode in modes))
    refusals = [f"{mode}: {escape(reason.partition('. ')[0])}" for mode, reason in found["refusals"].items()]
    table.caption_justify = "left"
    table.caption = "\n".join([*(["* by default"] if found["default_mode"] else []), *refusals]) or None
    return table
