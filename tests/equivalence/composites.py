"""A tiny model of every composite that transformers maps to multimodal and speech tasks, with a batch of text and a mixed one.

The recipe and its words are `tiny_models`'. What a processor makes of images and sounds is in `MEDIA`, by the shape
that a family of models takes; placeholders stand in the ids, as many as the model makes features of one.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator
from typing import Any

import tiny_models
import torch
from composite_media import MEDIA, Inputs, Media
from tiny_models import LENGTH, Override, Pair, Tiny
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

# Sections of positions that add up to half a head.
SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
ONE_OF_EITHER_KIND = ["linear_attention", "full_attention"]

EMU_TOKENS = {"<image>": 290, "<|extra_200|>": 25} | {f"<|visual token {code:06}|>": 21 + code for code in range(4)}
VISUAL_TOKENS = {"<image>": 290, "IMGIMGAZ": 21, "IMGIMGBZ": 22, "IMGIMGCZ": 23, "IMGIMGDZ": 24}

COMPOSITE_OVERRIDES = [
    Override("deepseek_ocr2", "as wide as the queries", {"vision_config.sam_config.downsample_channels": [32, 32]}),
    Override("unlimited_ocr", "as wide as the encoder", {"vision_config.sam_config.downsample_channels": [32, 32]}),
    Override("instructblip instructblipvideo", "another vocabulary", {"qformer_config.vocab_size": 310}),
    Override("evolla", "another vocabulary", {"protein_encoder_config.vocab_size": 310}),
    Override("vibevoice", "a size for each stage", {f"{part}.{name}": value for part in ("semantic_model_config", "audio_config") for name, value in {"downsampling_ratios": [2, 2], "depths": [1, 1, 1], "num_filters": 4}.items()}),
    Override("qwen3_omni_moe", "read, but no default", {"talker_config.text_config.shared_expert_intermediate_size": 32}),
    Override("molmo2", "four patches", {"vision_config.image_size": [28, 28], "adapter_config.vision_feature_layer": [-1, -2]}),
    Override("emu3", "the tokens of images", {"text_config.vocab_size": 300, "vocabulary_map": EMU_TOKENS, "vq_config.codebook_size": 4, "vq_config.hidden_size": 128}),
    Override("gemma4 gemma4_unified", "parts that are left out by default", {"vision_config": "gemma4_vision", "vision_config.pooling_kernel_size": 2}),
    Override("gemma4", "parts that are left out by default", {"audio_config": "gemma4_audio", "text_config.num_hidden_layers": 4, "text_config.num_kv_shared_layers": 2, "text_config.layer_types": ["sliding_attention", "full_attention"] * 2}),
    Override("gemma4_unified", "parts of its own", {"vision_config": "gemma4_unified_vision"}),
    Override("cosmos3_edge", "positions of 4 × 4 patches", {"vision_config.num_patches": 16}),
    Override("lfm2_vl", "positions of 4 × 4 patches", {"vision_config.num_patches": 16}),
    Override("granite_docling", "4 × 4 patches are one token", {"vision_config.patch_size": 8}),
    Override("mllama", "layers that are there", {"vision_config.intermediate_layers_indices": [0, 1], "vision_config.vision_output_dim": 96}),
    Override("deepseek_vl_hybrid", "layers that are there", {"high_res_vision_config.global_attn_indexes": [0, 1]}),
    Override("kosmos-2", "few features", {"latent_query_num": 3}),
    Override("kosmos-2.5", "few features", {"latent_query_num": 3}),
    Override("muse_glimmer muse_spark", "2 × 2 patches side by side", {"out_hidden_size": 128}),
    Override("step3p7", "read, but no default", {"text_config.sliding_window": 8}),
    Override("qwen3_asr", "windows of whole chunks", {"audio_config.n_window": 50, "audio_config.n_window_infer": 100}),
    Override("moonshine_streaming", "frames of 80 samples", {"encoder_config.sample_rate": 16000}),
    Override("blip-visual-question-answering", "as wide as the text", {"text_config.encoder_hidden_size": 32}),
    Override("speecht5", "not masked", {"apply_spec_augment": False}),
    Override("speech-encoder-decoder", "not masked", {"encoder.apply_spec_augment": False}),
    Override("ernie4_5_vl_moe", "sections of another order", {"text_config.rope_parameters": {**SECTIONS, "mrope_section": [1, 1, 2]}}),
    Override("qwen2_5_omni_thinker qwen3_omni_moe_thinker", "read, but no default", {"vision_start_token_id": 31, "vision_end_token_id": 32}),
    Override("qwen2_audio voxtral whisper glmasr moss_transcribe_diarize qwen3_asr", "short sounds", {"audio_config.max_source_positions": 16, "max_source_positions": 16}),
    Override("vision-encoder-decoder", "cannot be built without arguments", {"encoder": "vit", "decoder": "bert", "decoder.is_decoder": True, "decoder.add_cross_attention": True, "pad_token_id": 5}),
    Override("speech-encoder-decoder", "cannot be built without arguments", {"encoder": "wav2vec2", "decoder": "bert", "decoder.is_decoder": True, "decoder.add_cross_attention": True, "pad_token_id": 5}),

    Override(
        "qwen2_vl qwen2_5_vl glm46v glm4v glm_ocr glmga paddleocr_vl hunyuan_vl qwen2_5_omni_thinker "
        "cosmos3_edge qwen3_omni_moe_thinker",
        "sections of positions that add up to half a head",
        {"text_config.rope_parameters": SECTIONS},
    ),
    Override("glm4v_moe", "all of a head is rotated", {"text_config.rope_parameters": {**SECTIONS, "partial_rotary_factor": 1.0}}),
    Override(
        "cohere_compass",
        "no default rope",
        {"text_config.rope_parameters": {"full_attention": SECTIONS, "sliding_attention": SECTIONS}},
    ),
    Override(
        "qwen2_5_vl exaone4_5 hyperclovax_vision_v2 qwen2_5_omni_thinker",
        "windows of whole merged patches",
        {"vision_config.window_size": 112},
    ),
    Override("aria", "queries for one patch", {"projector_patch_to_query_dict": {1: 2}}),
    Override("gemma3 shieldgemma2", "one token for 2 × 2 patches", {"mm_tokens_per_image": 1}),
    Override("t5gemma2", "one token for 2 × 2 patches", {"encoder.mm_tokens_per_image": 1}),
    Override("idefics3 smolvlm", "2 × 2 patches are one token", {"vision_config.patch_size": 16}),
    Override("vipllava", "layers that are there", {"vision_feature_layers": [-1, -2]}),
    Override(
        "llava_next llava_next_video llava_onevision granite4_vision",
        "tiles of the images' size",
        {"image_grid_pinpoints": [[32, 32], [32, 64]]},
    ),
    Override(
        "internvl qianfan_ocr", "four patches", {"vision_config.image_size": [32, 32], "vision_config.patch_size": [8, 8]}
    ),
    Override("llama4", "the projector's width is the features'", {"vision_config.intermediate_size": 128, "vision_config.projector_output_dim": 32, "vision_config.vision_output_dim": 32}),
    Override("fun_asr_nano", "a quarter of the width", {"adaptor_config.intermediate_size": 8}),
    Override("moonshine_streaming", "read, but no default", {"num_key_value_heads": 4}),
    Override("molmo2", "layers that are there", {"adapter_config.vision_feature_layer": [-1, -2]}),
    Override(
        "muse_spark",
        "a size for each stage",
        {
            "audio_config.patch_sizes": [4, 2],
            "audio_config.hidden_sizes": [16, 32],
            "audio_config.depths": [1, 1],
            "audio_config.num_hidden_layers": 2,
            "audio_config.out_hidden_size": 32,
        },
    ),
    Override("nemotron_h_omni", "of both parts", {"text_config.n_groups": 2, "vision_config.video_temporal_patch_size": 2}),
    Override("chameleon", "the tokens of images", {"vocabulary_map": VISUAL_TOKENS, "vq_config.num_embeddings": 4}),
    Override("granite4_vision", "one layer into one", {"deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [0, 0, 1, 1], "vision_config.hidden_size": 128, "vision_config.patch_size": 8, "downsample_rate": "1/2"}),
    Override("diffusion_gemma", "the router has no default", {"text_config.num_experts": 4, "text_config.top_k_experts": 2, "text_config.moe_intermediate_size": 16}),
    Override("deepseek_ocr2", "one layer of either kind", {"text_config.mlp_layer_types": ["dense", "sparse"], "text_config.num_experts_per_tok": 2}),
    Override("dots3_note", "one layer of either kind", {"vision_config.mlp_layer_types": ["dense", "sparse"]}),
    Override("glm5_next", "attention without positions", {"text_config.qk_rope_head_dim": 0, "text_config.index_kpool": 2}),
]

HAS_TIMM = importlib.util.find_spec("timm") is not None

UNBUILDABLE_COMPOSITES = {
    "diffusion_gemma-multimodal-lm": "draws what it looks up at random, and has no loss",
    "qwen2_5_omni-multimodal-lm": "has no forward; its thinker is here, which takes the text",
    "qwen3_omni_moe-multimodal-lm": "has no forward; its thinker is here, which takes the text",
}
if not HAS_TIMM:
    UNBUILDABLE_COMPOSITES |= {
        f"{model_type}-multimodal-lm": "its vision tower is in timm, which is not installed"
        for model_type in ("fast_vlm", "gemma3n", "perception_lm")
    }


def media_of(pair: Pair) -> list[Media]:
    return [media for media in MEDIA if pair.model_type in media.names.split()]


def placeholder(config: Any, kind: str) -> int:
    """The token id of the composite or of the part that makes the features."""
    parts = (config, getattr(config, "vision_config", None))
    names = (f"{kind}_token_id", f"{kind}_token_index")
    return next(int(token_id) for part in parts for name in names if (token_id := getattr(part, name, None)) is not None)


def num_features(model: PreTrainedModel, inputs: Inputs, kind: str) -> int:
    """Rows that the model makes of all media in `inputs`."""
    method = getattr(model, f"get_{kind}_features", None) or getattr(model.base_model, f"get_{kind}_features")
    was, _ = model.training, model.eval()
    with torch.no_grad():
        o = features = method(**inputs, return_dict=True)
    model.train(was)
    features = getattr(features, "pooler_output", None) if hasattr(features, "keys") else features
    if features is None: features = o.deepstack_features[0][1] if getattr(o, "deepstack_features", None) else o.last_hidden_state
    parts = list(_tensors(features))
    return sum(part.numel() // part.shape[-1] for part in parts)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, int):
        return
    else:
        for part in value:
            yield from _tensors(part)


def num_placeholders(model: PreTrainedModel, media: Media, inputs: Inputs) -> int:
    """Of one image or sound."""
    if media.is_prompt or media.num_tokens is not None:
        return media.num_tokens or 0
    return num_features(model, inputs, media.kind) // len(media.rows)


def mixed_inputs(tiny: Tiny) -> Inputs:
    """The batch of text with media in some rows, behind the first token; rows without are padded to the same length."""
    config, model, inputs = tiny.model.config, tiny.model, dict(tiny.inputs)
    extra: Inputs = {}
    ids: list[list[int]] = inputs["input_ids"].tolist()
    kinds: list[list[int]] = [[0] * len(row) for row in ids]
    for media in media_of(tiny.pair):
        its = media.inputs(config)
        extra |= its
        if media.is_prompt:
            names = inspect.signature(type(model).forward).parameters
            labels = inputs["labels"]
            return {**its, **({"labels": labels} if "labels" in names else {"decoder_input_ids": labels})}
        number = num_placeholders(model, media, its)
        for row in media.rows if number else ():
            ids[row][1:1] = [placeholder(config, media.kind)] * number
            kinds[row][1:1] = [1 if media.kind == "image" else 2] * number
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
    if not config.is_encoder_decoder and str(tiny.pair) not in LABELS_ARE_IDS:
        inputs["labels"] = input_ids.masked_fill((mask == 0) | (kind != 0), -100)
    names = inspect.signature(type(tiny.model).forward).parameters
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in names:
            inputs[name] = kind
    return inputs


# Composites whose forward takes no text without media; others take no text but labels, as their media say.
NO_TEXT_ALONE = "blip blip-2 idefics instructblip instructblipvideo kosmos-2 udop"


# Composites that take labels for ids, without -100.
LABELS_ARE_IDS = ("blip-visual-question-answering", "pp_formulanet-multimodal-lm")


def build(pair: Pair) -> Tiny:
    overrides: dict[str, Any] = {}
    for override in COMPOSITE_OVERRIDES:
        if {pair.model_type, str(pair), pair.class_name} & set(override.names.split()):
            overrides |= override.config
    tiny = tiny_models.build(pair, overrides=overrides)
    if "mm_token_type_ids" in inspect.signature(type(tiny.model).forward).parameters:
        tiny.inputs["mm_token_type_ids"] = torch.zeros_like(tiny.inputs["input_ids"])
    if str(pair) in LABELS_ARE_IDS:
        pad = tiny.model.config.get_text_config().pad_token_id
        tiny.inputs["labels"] = tiny.inputs["labels"].where(tiny.inputs["labels"] >= 0, torch.tensor(pad))
    return tiny


def build_or_reason(pair: Pair) -> Tiny | str:
    return UNBUILDABLE_COMPOSITES.get(str(pair)) or build(pair)


def takes_text_alone(pair: Pair) -> bool:
    return pair.model_type not in NO_TEXT_ALONE.split() and not any(media.is_prompt for media in media_of(pair))


def batches(tiny: Tiny) -> dict[str, Inputs]:
    """The batch of text alone, where the model takes one, and the mixed one."""
    text = {"text": tiny.inputs} if takes_text_alone(tiny.pair) else {}
    mixed = {"mixed": mixed_inputs(tiny)} if media_of(tiny.pair) else {}
    return text | mixed


def prompt(inputs: Inputs) -> Inputs:
    """What a generation begins with: the batch without labels, padded on the left."""
    masks, given = inputs.get("attention_mask"), {name: value for name, value in inputs.items() if name != "labels"}
    for name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
        if name in given:
            rows = zip(inputs[name], masks, strict=True)
            given[name] = torch.stack([row.roll(int((mask == 0).sum())) for row, mask in rows])
    return given
