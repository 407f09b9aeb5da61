"""A tiny model of every composite that transformers maps to multimodal and speech tasks, with a batch of text and a mixed one.

The recipe and its words are `tiny_models`'. What a processor makes of images and sounds is in `MEDIA`, by the shape
that a family of models takes; placeholders stand in the ids, as many as the model makes features of one.
"""

from __future__ import annotations

import dataclasses
import inspect
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tiny_models
import torch
from tiny_models import BATCH, LENGTH, Override, Pair, SpecialIds, Tiny, noise
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

COMPOSITE_CLASSES = {
    "multimodal-lm": modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    "visual-question-answering": {"blip": "BlipForQuestionAnswering"},  # of those, it alone has a table of tokens
    "speech-seq2seq": modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
}

# A class that both tasks map a model type to is here once.
COMPOSITES = [
    Pair(model_type, task, class_name)
    for task, names in COMPOSITE_CLASSES.items()
    for model_type, class_name in names.items()
    if task != "speech-seq2seq" or model_type not in COMPOSITE_CLASSES["multimodal-lm"]
]

Inputs = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Media:
    """What a processor makes of two images or sounds, for some architectures."""

    names: str  # model types
    shape: str  # in words
    inputs: Callable[[Any], Inputs]  # of a config
    kind: str = "image"
    num_tokens: int | None = None  # placeholders for one; None: as many as the model makes features
    rows: tuple[int, ...] = (0, 2)  # of the batch, that have one; those between are text


def side(config: Any) -> int:
    """Pixels along one side of an image."""
    for part in (getattr(config, "vision_config", None), getattr(config, "vit_config", None), config):
        size = getattr(part, "image_size", None)
        if size is not None:
            return int(size[0] if isinstance(size, list | tuple) else size)
    return 32


def pixels(*leading: int) -> Callable[[Any], Inputs]:
    return lambda config: {"pixel_values": noise(*leading, 3, side(config), side(config))}


def patches_of_grids(config: Any) -> Inputs:
    """Two images of 1 × 4 × 4 patches, flat, as Qwen2-VL takes them."""
    vision = config.vision_config
    patch = vision.patch_size ** 2 * getattr(vision, "temporal_patch_size", 1)
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", 3)
    return {
        "pixel_values": noise(2 * 16, channels * patch),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
    }


def tiles(config: Any) -> Inputs:
    """Two images of one tile and the whole picture each, as LLaVA-NeXT takes them."""
    size = side(config)
    return {"pixel_values": noise(2, 2, 3, size, size), "image_sizes": torch.tensor([[size, size], [size, size]])}


def sized(config: Any) -> Inputs:
    size = side(config)
    return {"pixel_values": noise(2, 3, size, size), "image_sizes": torch.tensor([[size, size], [size, size]])}


def pictures_by_row(config: Any) -> Inputs:
    """One picture a row, black where there is none, as Idefics2 takes them."""
    size = side(config)
    images = noise(BATCH, 1, 3, size, size)
    images[1] = 0
    return {"pixel_values": images}


MEDIA = [
    Media(
        "aria aya_vision blip-2 chameleon cohere2_vision deepseek_vl gemma3 got_ocr2 internvl janus llava vipllava paligemma "
        "shieldgemma2 qianfan_ocr ovis2 pp_chart2table llama4 t5gemma2 florence2 video_llava",
        "pixels of each image",
        pixels(2),
    ),
    Media("blip git vision-encoder-decoder pp_formulanet", "an image a row", pixels(BATCH), num_tokens=0),
    Media(
        "qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe qwen3_5 qwen3_5_moe qwen4_exp glm4v glm46v glm4v_moe glm_ocr glmga "
        "exaone4_5 cosmos3_omni cosmos3_edge cohere_compass ernie4_5_vl_moe hunyuan_vl hyperclovax_vision_v2 kimi_k25 lfm3_vl "
        "minimax_m3_vl muse_glimmer muse_spark inkling2 glm5_next qwen2_5_omni_thinker qwen3_omni_moe_thinker dots3_note",
        "patches of grids",
        patches_of_grids,
    ),
    Media("llava_next llava_next_video llava_onevision granite4_vision", "tiles", tiles),
    Media("mistral3 mistral_large4 lighton_ocr", "images and their sizes", sized),
    Media("idefics2 idefics3 smolvlm granite_docling", "images by row, black ones left out", pictures_by_row),
]

COMPOSITE_OVERRIDES: list[Override] = []

UNBUILDABLE_COMPOSITES: dict[str, str] = {}


def media_of(pair: Pair) -> list[Media]:
    return [media for media in MEDIA if pair.model_type in media.names.split()]


def placeholder(config: Any, kind: str) -> int:
    for name in (f"{kind}_token_id", f"{kind}_token_index"):
        token_id = getattr(config, name, None)
        if token_id is not None:
            return int(token_id)
    raise AttributeError(f"no placeholder for {kind}")


def num_features(model: PreTrainedModel, inputs: Inputs, kind: str) -> int:
    """Rows that the model makes of all media in `inputs`."""
    method = getattr(model, f"get_{kind}_features", None) or getattr(model.base_model, f"get_{kind}_features")
    was, _ = model.training, model.eval()
    with torch.no_grad():
        features = method(**inputs, return_dict=True)
    model.train(was)
    features = getattr(features, "pooler_output", features)
    parts = list(_tensors(features))
    return sum(part.numel() // part.shape[-1] for part in parts)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for part in value:
            yield from _tensors(part)


def mixed_inputs(tiny: Tiny) -> Inputs:
    """The batch of text with media in some rows, behind the first token; rows without are padded to the same length."""
    config, model, inputs = tiny.model.config, tiny.model, dict(tiny.inputs)
    extra: Inputs = {}
    ids: list[list[int]] = inputs["input_ids"].tolist()
    kinds: list[list[int]] = [[0] * len(row) for row in ids]
    for media in media_of(tiny.pair):
        its = media.inputs(config)
        extra |= its
        number = media.num_tokens
        if number is None:
            number = num_features(model, its, media.kind) // len(media.rows)
        for row in media.rows if number else ():
            ids[row][1:1] = [placeholder(config, media.kind)] * number
            kinds[row][1:1] = [1 if media.kind == "image" else 2] * number
    if not extra:
        raise NotImplementedError("no media")
    return _batch_of(tiny, ids, kinds, extra)


def _batch_of(tiny: Tiny, ids: list[list[int]], kinds: list[list[int]], extra: Inputs) -> Inputs:
    width = max(map(len, ids))
    text, config = tiny.inputs, tiny.model.config
    pad = getattr(config.get_text_config(), "pad_token_id", None) or 0
    input_ids = torch.tensor([row + [pad] * (width - len(row)) for row in ids])
    kind = torch.tensor([row + [0] * (width - len(row)) for row in kinds])
    mask = torch.tensor(
        [
            [1] * (len(row) - LENGTH) + text_mask + [0] * (width - len(row))
            for row, text_mask in zip(ids, text["attention_mask"].tolist(), strict=True)
        ]
    )
    inputs = {**text, "input_ids": input_ids, "attention_mask": mask, **extra}
    if not config.is_encoder_decoder:
        inputs["labels"] = input_ids.masked_fill((mask == 0) | (kind != 0), -100)
    names = inspect.signature(type(tiny.model).forward).parameters
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in names:
            inputs[name] = kind
    return inputs


# Composites whose forward takes no text without media.
NO_TEXT_ALONE: dict[str, str] = {}


def build(pair: Pair) -> Tiny:
    overrides: dict[str, Any] = {}
    for override in COMPOSITE_OVERRIDES:
        if {pair.model_type, str(pair), pair.class_name} & set(override.names.split()):
            overrides |= override.config
    return tiny_models.build(pair, overrides=overrides)


def build_or_reason(pair: Pair) -> Tiny | str:
    return UNBUILDABLE_COMPOSITES.get(str(pair)) or build(pair)


def takes_text_alone(pair: Pair) -> bool:
    return not {pair.model_type, pair.class_name} & set(" ".join(NO_TEXT_ALONE.values()).split())


def batches(tiny: Tiny) -> dict[str, Inputs]:
    """The batch of text alone, where the model takes one, and the mixed one."""
    text = {"text": tiny.inputs} if takes_text_alone(tiny.pair) else {}
    return {**text, "mixed": mixed_inputs(tiny)}


def prompt(inputs: Inputs) -> Inputs:
    """What a generation begins with: the batch without labels, padded on the left."""
    masks, given = inputs.get("attention_mask"), {name: value for name, value in inputs.items() if name != "labels"}
    for name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
        if name in given:
            rows = zip(inputs[name], masks, strict=True)
            given[name] = torch.stack([row.roll(int((mask == 0).sum())) for row, mask in rows])
    return given
