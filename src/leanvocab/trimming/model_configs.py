"""config.json as transformers reads it, with every default: new ids and sizes in it, and a model of it without memory."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from leanvocab.errors import CheckpointError, ModelError, first_line, shortened
from leanvocab.trimming.id_fields import NewIds, is_size_field, renumbered
from leanvocab.vocabulary.special_ids import model_full_size

CONFIG = "config.json"


def config_class(config: Mapping[str, Any]) -> Any:
    """The class of a config by its `model_type`; raises `ModelError` where transformers has none."""
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"{CONFIG}: model_type is {shortened(model_type)}, which this version of transformers does not know: which tensors "
            "of such a model are of the vocabulary's size, and which ids it computes with, cannot be told"
        )
    return CONFIG_MAPPING[model_type]


def read_config(config: Mapping[str, Any]) -> Any:
    """The config as an object of its class; raises `ModelError`, or `CheckpointError` where it cannot be read."""
    its_class = config_class(config)
    try:
        with tempfile.TemporaryDirectory() as folder:  # transformers decodes what it finds in a file (infinite numbers)
            Path(folder, CONFIG).write_text(json.dumps(config), encoding="utf-8")
            return its_class.from_pretrained(folder)
    except Exception as error:  # what lies in the file: readers raise whatever they meet
        raise CheckpointError(f"{CONFIG} cannot be read as {its_class.__name__}: {first_line(error)}") from error


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with every field that its classes have, those of its parts too, and those that no class reads.

    Settings of generation are such fields, by the version of transformers: their ids stay in the file for another reader.
    """
    return _with_unread(config, read_config(config).to_dict())


def _with_unread(config: Mapping[str, Any], read: Mapping[str, Any]) -> dict[str, Any]:
    known = read.keys() | {alias for alias, real in _real_names(read).items() if real in read}
    unread = {name: value for name, value in config.items() if name not in known}
    parts = {
        name: _with_unread(config[name], part)
        for name, part in read.items()
        if isinstance(part, Mapping) and "model_type" in part and isinstance(config.get(name), Mapping)
    }
    return {**read, **unread, **parts}


def text_size(config: Any, num_rows: int | None) -> int:
    """The `vocab_size` of a read config, of the part that the table of `num_rows` belongs to, or of the one that reads text.

    Raises `ModelError` where there is none.
    """
    size = num_rows if num_rows in set(_sizes(config.to_dict())) else model_full_size(config)
    if size is None:
        raise ModelError(f"{config.model_type}: its config names no size of a vocabulary; there is nothing to trim")
    return size


def _sizes(config: Mapping[str, Any]) -> Iterator[int]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _sizes(value)
        elif type(value) is int and is_size_field(str(name)):
            yield value


def trimmed_config(config: Mapping[str, Any], new_ids: NewIds) -> dict[str, Any]:
    """A config.json with new ids and sizes: its own fields as they were, and those defaults that are others now.

    Raises `CheckpointError` where transformers would read something else in it than was meant.
    """
    before = with_defaults(config)
    after = renumbered(before, CONFIG, new_ids)
    trimmed = _merged(config, before, after)
    read = with_defaults(trimmed)
    for name, meant, found in _differing(after, read):
        raise CheckpointError(
            f"{CONFIG}: {name} was to become {shortened(meant)}, and would be read as {shortened(found)}; this config has a "
            "form that leanvocab does not know. Saving it again with transformers' save_pretrained gives it today's"
        )
    return trimmed


def _merged(config: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(config)
    for name, new in after.items():
        if new == before[name]:
            continue
        for alias in (alias for alias, real in _real_names(before).items() if real == name):
            merged.pop(alias, None)
        if isinstance(new, Mapping) and isinstance(before[name], Mapping):
            own = merged.get(name)
            merged[name] = _merged(own if isinstance(own, Mapping) else {}, before[name], new)
        else:
            merged[name] = new
    return merged


def _real_names(config: Mapping[str, Any]) -> Mapping[str, str]:
    """Other names under which a config class takes fields (XLM's `n_words`) → the fields."""
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return {}
    return dict(getattr(CONFIG_MAPPING[model_type], "attribute_map", {}))


def _differing(meant: Mapping[str, Any], found: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any, Any]]:
    for name in meant.keys() | found.keys():
        first, second = meant.get(name), found.get(name)
        if isinstance(first, Mapping) and isinstance(second, Mapping):
            yield from _differing(first, second, f"{path}{name}.")
        elif first != second and _as_lists(first) != _as_lists(second):
            yield f"{path}{name}", first, second


def _as_lists(value: Any) -> Any:
    return [_as_lists(each) for each in value] if isinstance(value, list | tuple) else value


def empty_model(config: Mapping[str, Any]) -> Any:
    """A model without memory of the class that the config names; its base class where that is none of transformers'.

    Raises `ModelError` where there is none.
    """
    import torch
    import transformers

    read = read_config(config)
    its_class: Any
    names = [name for name in read.architectures or () if hasattr(transformers, name)]
    try:
        its_class = getattr(transformers, names[0]) if names else transformers.MODEL_MAPPING[type(read)]
        with torch.device("meta"):
            model = its_class(read)
        model.tie_weights()  # transformers 5.0 leaves what has no memory untied
    except Exception as error:  # whatever a constructor raises
        named = names[0] if names else f"a model of the type {read.model_type!r}"
        raise ModelError(f"{CONFIG}: {named} cannot be built from this config: {first_line(error)}") from error
    return model


def numbers_in(config: Any) -> set[int]:
    """All whole numbers of a config, those of its parts too."""
    if isinstance(config, Mapping | list | tuple):
        parts = config.values() if isinstance(config, Mapping) else config
        return set[int]().union(*map(numbers_in, parts))
    return {config} if type(config) is int else set()


def ids_named(config: Mapping[str, Any], name: str) -> Iterator[int]:
    """Ids in the fields of a name, of a config and its parts: a number, or a list of them."""
    value = config.get(name)
    yield from (each for each in (value if isinstance(value, list) else [value]) if type(each) is int)
    for part in config.values():
        if isinstance(part, Mapping):
            yield from ids_named(part, name)


def refuse_quantized(base: Path, config: Mapping[str, Any]) -> None:
    """Raises `CheckpointError` where a config, or a part of it, says that weights are quantized."""
    for value in config.values():
        if isinstance(value, Mapping):
            refuse_quantized(base, value)
    if (how := config.get("quantization_config")) is not None:
        method = how.get("quant_method", "of some kind") if isinstance(how, Mapping) else how
        raise CheckpointError(
            f"{base}: its weights are quantized ({method}), in a layout that is not known here; trim before quantizing"
        )
