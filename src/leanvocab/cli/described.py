"""A path on the command line → what lies there, in plain values: told by its files, without loading weights."""

import json
from pathlib import Path
from typing import Any

from leanvocab.cli.data_counts import describe_vocabulary, load_tokenizer
from leanvocab.errors import CheckpointError, DataError, ModelError, SettingsError
from leanvocab.files.presence import is_file, is_folder, is_there

_NUM_NAMED = 8
_ADAPTER_CONFIG, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def describe(path: str, base: str | None, tokenizer: str | None) -> dict[str, Any]:
    """Plain values that begin with `kind` and `name`; raises an error that says what was expected where nothing is known."""
    here = Path(path)
    if base is not None and (is_file(here) or is_file(here / _ADAPTER_CONFIG)):
        raise SettingsError(f"base is for a checkpoint to compare, and {path} is none: leave it out")
    if is_file(here):
        return _file(here, tokenizer)
    if is_file(here / "leanvocab.json"):
        return _delta(path, base, tokenizer)
    if is_file(here / _ADAPTER_CONFIG):
        return _adapter(here)
    if is_folder(here) and not any(is_there(here / name) for name in ("config.json", "model.safetensors")):
        return _data(here)
    return _checkpoint(path, base, tokenizer)


def _file(path: Path, tokenizer: str | None) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        return {"kind": "weights", "name": str(path), **_weights(path)}
    if path.suffix in _PICKLES:
        raise CheckpointError(
            f"{path} is a pickle, which runs code when it is loaded, and never is here: save it as safetensors"
        )
    return _json_file(path, tokenizer) if path.suffix == ".json" else _data(path)


def _json_file(path: Path, tokenizer: str | None) -> dict[str, Any]:
    content = _json(path)
    if isinstance(content, list):
        return _data(path)
    marks = {"model_type": "the config of a model", "added_tokens": "a tokenizer", "weight_map": "an index of weights"}
    if what := next((what for mark, what in marks.items() if isinstance(content, dict) and mark in content), None):
        raise DataError(f"{path} is {what}: give its folder, or the file of a vocabulary (`leanvocab count -o`)")
    return _vocabulary(str(path), tokenizer)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


def _weights(path: Path) -> dict[str, Any]:
    from leanvocab.files.headers import read_header

    tensors = read_header(path.parent, path.name).tensors.values()
    largest = sorted(tensors, key=lambda entry: -entry.num_bytes)[:3]
    return {
        "num_tensors": len(tensors),
        "num_bytes": sum(entry.num_bytes for entry in tensors),
        "dtypes": sorted({entry.dtype for entry in tensors}),
        "largest": [f"{entry.name} {list(entry.shape)}" for entry in largest],
    }


def _adapter(folder: Path) -> dict[str, Any]:
    config = _json(folder / _ADAPTER_CONFIG)
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / _ADAPTER_CONFIG}: expected a JSON object, found none")
    targets = config.get("target_modules")
    indices = config.get("trainable_token_indices")
    described = {
        "kind": "adapter",
        "name": str(folder),
        "method": config.get("peft_type"),
        "base": config.get("base_model_name_or_path"),
        "rank": config.get("r"),
        "target_modules": [targets] if isinstance(targets, str) else targets,
        "modules_to_save": config.get("modules_to_save"),
        "num_trainable_tokens": len(indices) if isinstance(indices, list) else None,
    }
    if is_there(folder / _ADAPTER_WEIGHTS):
        described |= _weights(folder / _ADAPTER_WEIGHTS)
    return described | {"to_use": f"PeftModel.from_pretrained(base, {json.dumps(str(folder))})"}


def _data(path: Path) -> dict[str, Any]:
    from leanvocab.texts.data_files import load_splits

    splits = load_splits(path)
    first = next(iter(splits.values()))
    return {
        "kind": "data",
        "name": str(path),
        "rows": [f"{name} {len(split):,}" for name, split in splits.items()],
        "columns": [f"{name} ({getattr(kind, 'dtype', type(kind).__name__)})" for name, kind in first.features.items()],
        "to_count": f"leanvocab count {path} --tokenizer MODEL",
    }


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
