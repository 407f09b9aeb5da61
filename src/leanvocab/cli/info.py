"""`leanvocab info`: what a checkpoint or a vocabulary file is."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leanvocab.cli.shell import AsJson, clean_errors, print_json, print_rich

if TYPE_CHECKING:
    from rich.table import Table

_NUM_NAMED = 8


def info(
    path: Annotated[str, typer.Argument(help="Checkpoint folder, name on the hub, or vocabulary file (.json).")],
    base: Annotated[
        str | None, typer.Option(help="Pretrained checkpoint to compare with: which rows were trained?")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer that names tokens. By default the checkpoint's own.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a checkpoint or a vocabulary file is, without loading weights."""
    with clean_errors(as_json):
        is_vocabulary = Path(path).is_file() and Path(path).suffix == ".json"
        described = _vocabulary(path, tokenizer) if is_vocabulary else _checkpoint(path, base, tokenizer)
    if as_json:
        print_json(described)
    else:
        print_rich(_table(described))


def _vocabulary(path: str, tokenizer: str | None) -> dict[str, Any]:
    from leanvocab.vocabulary import PartialVocabulary

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
    from leanvocab.inspection import inspect_checkpoint, trained_rows

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
    rows = _vocabulary_rows(described) if described["kind"] == "vocabulary" else _checkpoint_rows(described)
    for name, value in rows:
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
    from leanvocab.memory import format_bytes

    rows = [
        ("class", f"{described['model_class']} ({described['model_type']})"),
        ("parameters", f"{described['num_parameters']:,}, {format_bytes(described['num_bytes'])}"),
        ("dtypes", ", ".join(f"{dtype}: {number:,}" for dtype, number in described["dtypes"].items())),
        ("vocabulary", f"{described['full_size']:,} rows"),
    ]
    for tensor in described["vocabulary_tensors"]:
        shape = " × ".join(f"{size:,}" for size in tensor["shape"])
        of_all = tensor["num_bytes"] / described["num_bytes"]
        mark = ", input table" if tensor["name"] == described["input_table"] else ""
        rows.append(
            (tensor["name"], f"{shape} {tensor['dtype']}, {format_bytes(tensor['num_bytes'])} ({of_all:.1%}){mark}")
        )
    rows += [("tied", " = ".join(group)) for group in described["ties"]] or [("tied", "nothing")]
    if trained := described.get("trained"):
        named = " ".join(trained["first_tokens"])
        more = " …" if trained["num_rows"] > len(trained["first_tokens"]) else ""
        rows.append(
            ("rows trained", f"{trained['num_rows']:,} ({trained['rows_ratio']:.1%}) differ from {trained['base']}")
        )
        if named:
            rows.append(("such as", named + more))
    return rows
