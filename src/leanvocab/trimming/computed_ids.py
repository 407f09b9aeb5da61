"""Ids that a model computes with, rather than comparing them with ids in its config: they have to keep their number, or their
neighbours; and models that compute with all of them, which cannot be trimmed."""

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from leanvocab.errors import ModelError

_SPEAKING = (
    "bark", "csm", "csm_depth_decoder_model", "dia", "gradium_phonon_tts", "higgs_audio_v2", "kyutai_speech_to_text",
    "musicgen", "musicgen_decoder", "musicgen_melody", "musicgen_melody_decoder", "pocket_tts", "qwen2_5_omni", "qwen3_omni_moe",
)  # fmt: skip
# Model types → why their ids cannot become others.
_REFUSED = {
    "blt": "it hashes n-grams of ids, whose rows are others for other ids",
    "canine": "it has no vocabulary: it hashes characters",
    **dict.fromkeys(_SPEAKING, "ids in its configs are codes of sounds, and are not told from those of its text"),
}
# Position ids that begin after the pad id, as fairseq counted them; tables of positions that are zero at the pad id (XGLM).
_COUNTS_FROM_PADDING = re.compile(
    r"create_position_ids_from_input_ids|[+] *(self\.)?padding_idx|padding_idx *[+]|\[padding_idx, :\] = 0"
)
# Text that is pooled at its largest id, and the eos id of configs that were written before it was compared with.
_POOLS_AT_LARGEST = re.compile(r"(input_ids|text)(\.to\([^)]*\))?\.argmax\(|input_ids\.to\([^)]*\)\.argmax\(")
_OLD_EOS = re.compile(r"eos_token_id == 2\b")
_OLD_EOS_ID = 2
_READS_LAST_ROW = re.compile(r"\[\[self\.vocab_size - 1\]\]")


def refuse_what_computes(config: Mapping[str, Any]) -> None:
    """Raises `ModelError` where a model computes with every id."""
    model_type = config.get("model_type")
    for refused, why in _REFUSED.items():
        if re.fullmatch(f"{refused}(_text)?", str(model_type)):
            raise ModelError(f"models of the type {model_type!r} cannot be trimmed: {why}")
    if len(sizes := _sizes_of_sides(config)) > 1:
        raise ModelError(
            f"this {model_type} has a vocabulary for each side, of {' and '.join(map(str, sorted(sizes)))} tokens, and cannot be "
            "trimmed: an id in its config does not say whose it is"
        )
    if _has_n_grams(config):
        raise ModelError(f"this {model_type} cannot be trimmed: {_REFUSED['blt']} (ple_layer_ids)")
    if config.get("quant_mode") is True:
        raise ModelError(
            f"{model_type} with quant_mode=True cannot be trimmed: it rounds its rows by the largest value of all of them"
        )


def _has_n_grams(config: Mapping[str, Any]) -> bool:
    """True where a config, or a part of it, has layers that look n-grams up (Qwen 4)."""
    if config.get("ple_layer_ids") and config.get("ngram_size"):
        return True
    return any(_has_n_grams(part) for part in config.values() if isinstance(part, Mapping))


def _sizes_of_sides(config: Mapping[str, Any]) -> set[int]:
    """Sizes of the vocabularies of an encoder and a decoder that both take text."""
    if config.get("model_type") == "encoder-decoder":
        sizes = [config[side].get("vocab_size") for side in ("encoder", "decoder")]
    else:
        sizes = [config.get(name) for name in ("src_vocab_size", "tgt_vocab_size", "vocab_size", "decoder_vocab_size")]
    return {size for size in sizes if size is not None}


def ids_computed_with(model: nn.Module, text_size: int, num_rows: int) -> dict[str, set[int]]:
    """Reason → the ids that have to stay for it, of a model without memory that takes `num_rows` ids."""
    reasons: dict[str, set[int]] = {}
    for reason, ids in _ids_computed_with(model, text_size, num_rows):
        reasons.setdefault(reason, set()).update(token_id for token_id in ids if token_id < num_rows)
    return {reason: ids for reason, ids in reasons.items() if ids}


def timestamps(generation_config: Mapping[str, Any], num_rows: int) -> set[int]:
    """Ids of times (Whisper): all from `no_timestamps_token_id` on, with which generation computes."""
    first = generation_config.get("no_timestamps_token_id")
    return set(range(first, num_rows)) if type(first) is int and first >= 0 else set()


def reads_last_row(model: nn.Module) -> bool:
    """True where the last row has a meaning, so that no padding can follow it."""
    return any(_READS_LAST_ROW.search(_source(kind)) for kind in {type(module) for module in model.modules()})


def _ids_computed_with(model: nn.Module, text_size: int, num_rows: int) -> Iterator[tuple[str, range]]:
    if num_rows > text_size:
        yield "rows beyond vocab_size, at which the model arrives by adding to it", range(text_size, num_rows)
    for module in model.modules():
        source = _source(type(module))
        padding = getattr(module, "padding_idx", None)
        if type(padding) is int and padding >= 0 and _COUNTS_FROM_PADDING.search(source):
            yield "positions are counted from the pad id, which has to stay what it is", range(padding + 1)
        if _OLD_EOS.search(source):
            yield "the eos id 2 stands for the largest id", range(_OLD_EOS_ID + 1)
        if _OLD_EOS.search(source) or _POOLS_AT_LARGEST.search(source):
            yield "text is pooled at its largest id", range(num_rows - 1, num_rows)
    if reads_last_row(model):
        yield "the last row pads sounds", range(num_rows - 1, num_rows)


def _source(kind: type) -> str:
    """The text of a class of transformers; empty for others'."""
    if not kind.__module__.startswith("transformers.models."):
        return ""
    if kind not in _SOURCES:
        _SOURCES[kind] = inspect.getsource(kind)
    return _SOURCES[kind]


_SOURCES: dict[type, str] = {}
