"""Token ids that a tokenizer or a model can insert by itself, whatever the data holds. No torch, no transformers.

Padding, shifting right, masking, forced first tokens of a generation, image placeholders: none of them need occur in
the data that was counted, and each is looked up in the input embeddings.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_TOKEN_NAME = re.compile(
    r"token_(id|ids|index|idx|indices)$"  # pad_token_id, image_token_index, …
    r"|(^|_)(pad|bos|eos|unk|mask|sep|cls)_(id|ids|index|idx)$"  # pad_index (XLM), tts_eos_id, …
    r"|(^|_)(start|end|newline|patch)_id$"  # image_start_id, slice_end_id, …
    r"|^forced_decoder_ids$"
)
# Where images and sounds go. Models write 0 over these ids before the lookup: those that lie beyond the table (Gemma 3,
# PaliGemma), or all of them (Kimi, Granite Speech); so does Idefics over those of its additional table.
_PLACEHOLDER_NAME = re.compile(r"^(image|video|audio)_token_(id|index)$")
ID_OVER_OTHERS = 0
# Dictionaries of ids: lang_to_id, task_to_id (Whisper), text_decoder_lang_to_code_id (SeamlessM4T),
# composer_to_feature_token (Pop2Piano).
_DICTIONARY_NAME = re.compile(r"_to_(\w+_)?(id|token)$")
# Models that turn an image into ids of their own vocabulary (Chameleon, Emu3) name those tokens so, among all of them, here.
VOCABULARY_MAP = "vocabulary_map"
_IMAGE_TOKEN = re.compile(r"^(IMGIMG|<\|visual token|<image>|<\|extra_200\|>)")


def holds_ids(name: str) -> bool:
    """True for the name of a field that holds token ids: one, or a list of them."""
    return bool(_TOKEN_NAME.search(name))


def is_id_dictionary(name: str) -> bool:
    """True for the name of a field that holds a dictionary of names and token ids."""
    return name == VOCABULARY_MAP or bool(_DICTIONARY_NAME.search(name))


def is_image_token(token: str) -> bool:
    """True for a token that a model makes of images, as it stands in its `vocabulary_map`."""
    return bool(_IMAGE_TOKEN.match(token))


def tokenizer_ids(tokenizer: Any) -> set[int]:
    """Ids of every special and every added token of a tokenizer, or of a processor's tokenizer."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    ids = set(_integers(getattr(tokenizer, "all_special_ids", ())))
    ids |= set(_integers(getattr(tokenizer, "added_tokens_decoder", None) or ()))
    for name in ("get_added_vocab", "get_added_tokens_decoder"):
        if hasattr(tokenizer, name):
            added = getattr(tokenizer, name)()
            ids |= set(_integers(added.values() if name == "get_added_vocab" else added))
    return ids


def tokenizer_full_size(tokenizer: Any) -> int:
    """Rows that a tokenizer needs: its length, or its largest id plus one where ids have gaps."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    vocab = tokenizer.get_vocab()
    return max([len(vocab), *(int(token_id) + 1 for token_id in vocab.values())])


def model_ids(model: Any, full_size: int) -> set[int]:
    """Ids that a model, its parts, their configs and generation configs can insert; a config alone will do.

    `suppress_tokens` and `bad_words_ids` are not inserted, and not among them. An id may lie beyond `full_size`.
    """
    ids = {token_id for config in _configs(model) for token_id in _config_ids(config)}
    for module in _modules(model):
        if getattr(module, "num_embeddings", None) == full_size:
            ids |= set(_integers([getattr(module, "padding_idx", None)]))
    return ids


def ids_looked_up_elsewhere(model: Any) -> set[int]:
    """Ids that a model, or a config, takes without looking them up in its table: placeholders of images and sounds, whose
    features stand in their place, and those of an additional table (Idefics).
    """
    mappings = (mapping for config in _configs(model) for mapping in _mappings(config))
    return {token_id for mapping in mappings for token_id in _ids_elsewhere(mapping)}


def model_full_size(model: Any) -> int | None:
    """Rows of a model's input embeddings, or the vocabulary size in its config; None where neither is to be found."""
    size = next((size for size in map(_input_rows, _modules(model)) if size is not None), None)
    return _config_full_size(getattr(model, "config", model)) if size is None else size


def _modules(model: Any) -> Iterable[Any]:
    modules = getattr(model, "modules", None)
    return modules() if callable(modules) else ()


def _configs(model: Any) -> Iterable[Any]:
    """The model itself, which may be a config, and each config of its parts once: most layers hold the same one."""
    parts = (getattr(module, name, None) for module in _modules(model) for name in ("config", "generation_config"))
    return {id(config): config for config in (model, *parts)}.values()


def _input_rows(module: Any) -> int | None:
    if not hasattr(module, "get_input_embeddings"):
        return None
    try:
        embeddings = module.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    while hasattr(embeddings, "base_layer"):  # an adapter around them
        embeddings = embeddings.base_layer
    embeddings = getattr(embeddings, "original_module", embeddings)
    rows = getattr(embeddings, "num_embeddings", None)  # stays the full size while a model is shrunk
    return rows if isinstance(rows, int) else None


def _config_full_size(config: Any) -> int | None:
    # The part that reads text comes first; an encoder before a decoder, since the data goes in there.
    for name in ("text_encoder", "text_config", "encoder", "decoder", "generator"):
        part = _attribute(config, name)
        size = None if part is None else _config_full_size(part)
        if size is not None:
            return size
    size = _attribute(config, "vocab_size")
    return size if isinstance(size, int) and not isinstance(size, bool) else None


def _attribute(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _mappings(config: Any) -> Iterator[Mapping[str, Any]]:
    """A config as a dictionary, and every config in it; dictionaries of ids are none."""
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        return
    yield {name: value for name, value in config.items() if isinstance(name, str)}
    for name, value in config.items():
        if isinstance(name, str) and not is_id_dictionary(name):
            yield from _mappings(value)


def _config_ids(config: Any) -> Iterator[int]:
    for mapping in _mappings(config):
        for name, value in mapping.items():
            if name == VOCABULARY_MAP and isinstance(value, Mapping):
                yield from _integers(token_id for token, token_id in value.items() if is_image_token(str(token)))
            elif isinstance(value, Mapping) and is_id_dictionary(name):
                yield from _integers(value.values())
            elif _TOKEN_NAME.search(name):
                yield from _token_values(name, value)
        if any(_ids_elsewhere(mapping)):
            yield ID_OVER_OTHERS


def _ids_elsewhere(mapping: Mapping[str, Any]) -> Iterator[int]:
    for name, value in mapping.items():
        if _PLACEHOLDER_NAME.search(name):
            yield from _integers([value])
    further, size = mapping.get("additional_vocab_size"), mapping.get("vocab_size")
    if isinstance(further, int) and isinstance(size, int):
        yield from range(size, size + further)


def _token_values(name: str, value: Any) -> Iterator[int]:
    values = value if isinstance(value, list | tuple) else [value]
    if name == "forced_decoder_ids":  # pairs of a position and an id
        values = [pair[1] for pair in values if isinstance(pair, list | tuple) and len(pair) == 2]
    for item in values:
        yield from _integers(item if isinstance(item, list | tuple) else [item])


def _integers(values: Any) -> Iterator[int]:
    return (int(value) for value in values if isinstance(value, int) and not isinstance(value, bool) and value >= 0)
