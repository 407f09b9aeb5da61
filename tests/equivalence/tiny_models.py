"""A tiny model of every architecture that transformers maps to a text task, with inputs for a training step.

One recipe (`tiny_config`) shrinks any config, sub-configs included, by the names of its fields: `SIZES` is a list of
name patterns. What the recipe gets wrong for one architecture is put right in `OVERRIDES` and `INPUTS`, as data, with
a reason each; what cannot be built at all is listed in `UNBUILDABLE`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

VOCAB_SIZE = 300
BATCH, LENGTH = 3, 12
NUM_LABELS = 3
NUM_DATA_IDS = 40  # how many different ids the data draws from
DROPOUT = 0.1

AUTO_CLASSES = {
    "sequence-classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "causal-lm": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq-lm": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "masked-lm": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
}


@dataclasses.dataclass(frozen=True)
class Pair:
    """An architecture and the task that an auto class maps it to."""

    model_type: str
    task: str
    class_name: str

    def __str__(self) -> str:
        return f"{self.model_type}-{self.task}"


PAIRS = [
    Pair(model_type, task, class_name)
    for task, names in AUTO_CLASSES.items()
    for model_type, class_name in names.items()
    if isinstance(class_name, str)
]

# ---------------------------------------------------------------------------------------------------------------------
# The recipe: the first pattern that matches a field's name gives its tiny value. A whole number larger than 64 that no
# pattern knows becomes 32. `AT_MOST` values never grow a field, `ALWAYS` values replace whatever stood there.

KEEP = object()
ALWAYS: list[tuple[str, Any]] = [
    (r"^tie_word_embeddings$", False),
    (r"^use_cache$", False),  # outputs would hold caches, which say nothing about rows
    (r"^(src_|tgt_)?vocab_size$", VOCAB_SIZE),
    # Dropout is on wherever the config has it; what drops whole layers or paths stays as it is.
    (r"layer_?drop$|drop_path|token_dropout|pooler_dropout", KEEP),
    (r"drop_?out|pdrop$|^dropout", DROPOUT),
]
AT_MOST: list[tuple[str, Any]] = [
    (r"vocab_size|codebook_size", 40),
    (r"max_(source_|target_)?position|n_positions|n_ctx|max_seq_len|context_length", 512),
    (r"(^|_)(num_(hidden_)?|n_|en|de)?layers?$|encoder_layers$|decoder_layers$|num_.*_layers$|depth$|num_blocks$", 2),
    (r"(key_value|kv)_(n_)?heads$|kv_n_heads|num_key_value|num_kv_heads", 2),
    (r"(^|_)(n|num)_?(\w*_)?heads?$|attention_heads$|^n_head$", 4),
    (r"head_dim|^d_kv$|^d_head$|dim_head", 8),
    (r"num_(local_|routed_)?experts$|n_routed_experts|moe_num_experts", 4),
    (r"experts_per_tok|top_k$|topk$|moe_k$", 2),
    (r"^n_group$|^topk_group$", 1),
    (r"lora_rank|rank$", 16),
    (r"chunk_size|window|block_size", 16),
    (r"image_size|crop_size", 32),
]


def is_token_id(name: str) -> bool:
    """Whether a config field holds a token id."""
    return bool(re.search(r"_token_(id|index)$|^(pad|bos|eos|unk|mask)_index$", name))


class SpecialIds:
    """A stable id for each special token of one architecture: varied, distinct, and below the vocabulary's size."""

    def __init__(self, model_type: str) -> None:
        order = np.random.default_rng(zlib.crc32(model_type.encode())).permutation(VOCAB_SIZE)
        self._free: Iterator[int] = iter(order.tolist())
        self._ids: dict[str, int] = {}

    def __getitem__(self, field: str) -> int:
        name = re.sub(r"_(token_)?(id|index)$", "", field)
        if name not in self._ids:
            self._ids[name] = next(self._free)
        return self._ids[name]

    def rest(self, count: int) -> list[int]:
        """The next `count` ids, for the data."""
        return [next(self._free) for _ in range(count)]


def tiny_value(name: str, old: Any, special: SpecialIds) -> Any:
    """The tiny value of the config field `name`, whose default is `old`."""
    if is_token_id(name):
        wanted = old is not None or name in ("pad_token_id", "bos_token_id", "eos_token_id")
        return special[name] if wanted and not isinstance(old, list) else old
    for pattern, value in ALWAYS:
        if re.search(pattern, name):
            return old if value is KEEP or isinstance(old, bool) is not isinstance(value, bool) else value
    if isinstance(old, bool) or not isinstance(old, int):
        return old
    for pattern, value in AT_MOST:
        if re.search(pattern, name):
            return min(old, value)
    return 32 if old >= 64 else old


def tiny_config(config_class: type[PreTrainedConfig], overrides: dict[str, Any], special: SpecialIds) -> Any:
    """A config of `config_class` with tiny sizes; dotted names in `overrides` reach into sub-configs."""
    own = {name: value for name, value in overrides.items() if "." not in name}
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        if field.default is not dataclasses.MISSING:
            old = field.default
        elif field.default_factory is not dataclasses.MISSING:
            old = field.default_factory()
        else:
            continue
        new = tiny_value(field.name, old, special)
        if new is not old:
            values[field.name] = new
    for name in config_class.sub_configs:
        if name in own:
            continue
        below = {key.split(".", 1)[1]: value for key, value in overrides.items() if key.startswith(f"{name}.")}
        default = getattr(_default_config(config_class), name, None)
        if isinstance(default, PreTrainedConfig):
            values[name] = tiny_config(type(default), below, special)
    return config_class(**{**values, **own})


@functools.cache
def _default_config(config_class: type[PreTrainedConfig]) -> Any:
    return config_class()


# ---------------------------------------------------------------------------------------------------------------------
# What the recipe gets wrong.

OVERRIDES: dict[str, dict[str, Any]] = {}
UNBUILDABLE: dict[str, str] = {}


@dataclasses.dataclass
class Tiny:
    """A tiny model in training mode and what it takes for a step."""

    pair: Pair
    model: PreTrainedModel
    inputs: dict[str, Any]


def build(pair: Pair, seed: int = 0) -> Tiny:
    """The tiny model of `pair` and its inputs, the same ones for the same seed."""
    model_class = getattr(transformers, pair.class_name)
    special = SpecialIds(pair.model_type)
    config_class = CONFIG_MAPPING[pair.model_type]
    overrides = {**OVERRIDES.get(pair.model_type, {}), **OVERRIDES.get(str(pair), {})}
    if model_class.config_class in config_class.sub_configs.values():
        config_class = model_class.config_class  # as the auto classes do with the text part of a composite
    config = tiny_config(config_class, overrides, special)
    if pair.task == "sequence-classification":
        config.num_labels = NUM_LABELS
    torch.manual_seed(seed)
    model = model_class(config).train()
    return Tiny(pair, model, make_inputs(pair, config, special))


def make_inputs(pair: Pair, config: Any, special: SpecialIds) -> dict[str, Any]:
    """Right-padded rows of ids, [BATCH, LENGTH] int64, and the labels of the task."""
    rng = np.random.default_rng(zlib.crc32(str(pair).encode()))
    text = config.get_text_config()
    pad = getattr(text, "pad_token_id", None) or 0
    eos = getattr(text, "eos_token_id", None)
    ids = np.array(special.rest(NUM_DATA_IDS))
    input_ids, mask = rows(rng, ids, eos, pad)
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    if pair.task == "sequence-classification":
        inputs["labels"] = torch.tensor([0, 2, 1])
    elif pair.task == "causal-lm":
        inputs["labels"] = input_ids.masked_fill(mask == 0, -100)
    elif pair.task == "seq2seq-lm":
        labels, labels_mask = rows(rng, ids, eos, pad)
        inputs["labels"] = labels.masked_fill(labels_mask == 0, -100)
    else:
        inputs["labels"] = input_ids.masked_fill(mask == 0, -100)
        inputs["labels"][:, ::2] = -100
    return inputs


def rows(rng: np.random.Generator, ids: np.ndarray, eos: Any, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.from_numpy(rng.choice(ids, size=(BATCH, LENGTH)))
    mask = torch.ones_like(tokens)
    for row in range(BATCH):
        end = LENGTH - 2 * row
        if isinstance(eos, int):
            tokens[row, end - 1] = eos
        tokens[row, end:] = pad
        mask[row, end:] = 0
    return tokens, mask
