"""A tiny model of every composite that transformers maps to multimodal and speech tasks, with a batch of text and a mixed one.

The recipe is `tiny_models`'. What it gets wrong is put right in `OVERRIDES`; what a processor makes of images and sounds is
in `composite_media`. Placeholders stand in the ids of the mixed batch, as many as the model makes features.
"""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import tiny_models
import torch
from composite_media import MEDIA, Inputs, Media
from tiny_models import BATCH, LENGTH, VOCAB_SIZE, Override, Pair, Tiny, stages_of
from torch import Tensor, nn
from transformers import AutoModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto import modeling_auto

from leanvocab.vocabulary.counts import count_tokens
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

COMPOSITE_CLASSES = {
    "multimodal-lm": modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    "speech-seq2seq": modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    # No auto class of text: of those that answer questions on images, this one has a table of tokens that it decodes from.
    "question-answering": {"blip": "BlipForQuestionAnswering"},
}

# What two tasks map a model type to is one class, and here once.
COMPOSITES = [
    Pair(model_type, task, class_name)
    for task, names in COMPOSITE_CLASSES.items()
    for model_type, class_name in names.items()
    if task != "speech-seq2seq" or model_type not in COMPOSITE_CLASSES["multimodal-lm"]
]

# ---------------------------------------------------------------------------------------------------------------------
# What the recipe gets wrong.

# Sections of positions that add up to half a head.
SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}

EMU_TOKENS = {"<image>": 290, "<|extra_200|>": 25} | {f"<|visual token {code:06}|>": 21 + code for code in range(4)}
VISUAL_TOKENS = {"<image>": 290, "IMGIMGAZ": 21, "IMGIMGBZ": 22, "IMGIMGCZ": 23, "IMGIMGDZ": 24}

OVERRIDES = [
    Override(
        "idefics",
        "text that trains; the loss takes no id of the additional table, which tests of row reads have",
        {"freeze_text_layers": False, "freeze_lm_head": False},
    ),
    Override(
        "fast_vlm gemma3n perception_lm",
        "a stand-in takes the place of a tower in timm",
        {"vision_config.model_args": {"embed_dim": 32}, "vision_config.hidden_size": 32},
    ),
    Override(
        "gemma3n",
        "too few layers to share keys; four features of each",
        {"text_config.num_kv_shared_layers": 0, "vision_soft_tokens_per_image": 4, "audio_soft_tokens_per_image": 4},
    ),
    Override(
        "deepseek_ocr2 unlimited_ocr",
        "as wide as the queries, and as the encoder",
        {"vision_config.sam_config.downsample_channels": [32, 32]},
    ),
    Override("instructblip instructblipvideo", "another vocabulary", {"qformer_config.vocab_size": 310}),
    Override("evolla", "another vocabulary", {"protein_encoder_config.vocab_size": 310}),
    Override("vibevoice", "a size for each stage", stages_of("semantic_model_config", "audio_config")),
    Override(
        "molmo2",
        "four patches",
        {"vision_config.image_size": [28, 28], "adapter_config.vision_feature_layer": [-1, -2]},
    ),
    Override(
        "emu3",
        "the tokens of images",
        {
            "text_config.vocab_size": 300,
            "vocabulary_map": EMU_TOKENS,
            "vq_config.codebook_size": 4,
            "vq_config.hidden_size": 128,
        },
    ),
    Override(
        "gemma4 gemma4_unified",
        "parts that are left out by default",
        {"vision_config": "gemma4_vision", "vision_config.pooling_kernel_size": 2},
    ),
    Override(
        "gemma4",
        "parts that are left out by default",
        {
            "audio_config": "gemma4_audio",
            "text_config.num_hidden_layers": 4,
            "text_config.num_kv_shared_layers": 2,
            "text_config.layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    Override("gemma4_unified", "parts of its own", {"vision_config": "gemma4_unified_vision"}),
    Override("cosmos3_edge lfm2_vl", "positions of 4 × 4 patches", {"vision_config.num_patches": 16}),
    Override("granite_docling", "4 × 4 patches are one token", {"vision_config.patch_size": 8}),
    Override(
        "mllama",
        "layers that are there",
        {"vision_config.intermediate_layers_indices": [0, 1], "vision_config.vision_output_dim": 96},
    ),
    Override("deepseek_vl_hybrid", "layers that are there", {"high_res_vision_config.global_attn_indexes": [0, 1]}),
    Override("kosmos-2 kosmos-2.5", "few features", {"latent_query_num": 3}),
    Override("muse_glimmer muse_spark", "2 × 2 patches side by side", {"out_hidden_size": 128}),
    Override("step3p7", "read, but no default", {"text_config.sliding_window": 8}),
    Override(
        "qwen3_asr qwen3_omni_moe_thinker",
        "windows of whole chunks",
        {"audio_config.n_window": 50, "audio_config.n_window_infer": 100},
    ),
    Override("moonshine_streaming", "frames of 80 samples", {"encoder_config.sample_rate": 16000}),
    Override("blip-question-answering", "as wide as the text", {"text_config.encoder_hidden_size": 32}),
    Override("speecht5", "not masked", {"apply_spec_augment": False}),
    Override("speech-encoder-decoder", "not masked", {"encoder.apply_spec_augment": False}),
    Override(
        "ernie4_5_vl_moe",
        "sections of another order",
        {"text_config.rope_parameters": {**SECTIONS, "mrope_section": [1, 1, 2]}},
    ),
    Override(
        "qwen2_5_omni_thinker qwen3_omni_moe_thinker",
        "read, but no default",
        {"vision_start_token_id": 31, "vision_end_token_id": 32},
    ),
    Override(
        "qwen2_audio voxtral whisper glmasr moss_transcribe_diarize qwen3_asr",
        "short sounds",
        {"audio_config.max_source_positions": 16, "max_source_positions": 16},
    ),
    Override(
        "vision-encoder-decoder",
        "cannot be built without arguments",
        {
            "encoder": "vit",
            "decoder": "bert",
            "decoder.is_decoder": True,
            "decoder.add_cross_attention": True,
            "pad_token_id": 5,
        },
    ),
    Override(
        "speech-encoder-decoder",
        "cannot be built without arguments",
        {
            "encoder": "wav2vec2",
            "decoder": "bert",
            "decoder.is_decoder": True,
            "decoder.add_cross_attention": True,
            "pad_token_id": 5,
        },
    ),
    Override(
        "qwen2_vl qwen2_5_vl glm46v glm4v glm_ocr glmga paddleocr_vl hunyuan_vl qwen2_5_omni_thinker "
        "cosmos3_edge qwen3_omni_moe_thinker",
        "sections of positions that add up to half a head",
        {"text_config.rope_parameters": SECTIONS},
    ),
    Override(
        "glm4v_moe",
        "all of a head is rotated",
        {"text_config.rope_parameters": {**SECTIONS, "partial_rotary_factor": 1.0}},
    ),
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
    Override(
        "florence2",
        "a size for each stage",
        {
            f"vision_config.{name}": value
            for name, value in {
                "depths": [1, 1],
                "embed_dim": [8, 16],
                "num_heads": [2, 2],
                "num_groups": [2, 2],
                "patch_size": [7, 3],
                "patch_stride": [4, 2],
                "patch_padding": [3, 1],
                "patch_prenorm": [False, True],
            }.items()
        },
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
        "internvl qianfan_ocr",
        "four patches",
        {"vision_config.image_size": [32, 32], "vision_config.patch_size": [8, 8]},
    ),
    Override(
        "llama4",
        "the projector's width is the features'",
        {
            "vision_config.intermediate_size": 128,
            "vision_config.projector_output_dim": 32,
            "vision_config.vision_output_dim": 32,
        },
    ),
    Override("fun_asr_nano", "a quarter of the width", {"adaptor_config.intermediate_size": 8}),
    Override("moonshine_streaming", "read, but no default", {"num_key_value_heads": 4}),
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
    Override(
        "nemotron_h_omni", "of both parts", {"text_config.n_groups": 2, "vision_config.video_temporal_patch_size": 2}
    ),
    Override("chameleon", "the tokens of images", {"vocabulary_map": VISUAL_TOKENS, "vq_config.num_embeddings": 4}),
    Override(
        "granite4_vision",
        "one layer into one",
        {
            "deepstack_layer_map": [[-1, 0]],
            "spatial_target_layers": [0, 0, 1, 1],
            "vision_config.hidden_size": 128,
            "vision_config.patch_size": 8,
            "downsample_rate": "1/2",
        },
    ),
    Override(
        "deepseek_ocr2",
        "one layer of either kind",
        {"text_config.mlp_layer_types": ["dense", "sparse"], "text_config.num_experts_per_tok": 2},
    ),
    Override("dots3_note", "one layer of either kind", {"vision_config.mlp_layer_types": ["dense", "sparse"]}),
    Override(
        "glm5_next", "attention without positions", {"text_config.qk_rope_head_dim": 0, "text_config.index_kpool": 2}
    ),
]

UNBUILDABLE = {
    "diffusion_gemma-multimodal-lm": "draws the ids that it looks up at random, and has no loss",
    "qwen2_5_omni-multimodal-lm": "has no forward; its thinker, which takes the text, is here",
    "qwen3_omni_moe-multimodal-lm": "has no forward; its thinker, which takes the text, is here",
}

# The tables that take ids, where no method of the model names them: those of codes of sounds stay whole.
TABLES = {
    "dia": ("model.encoder.embedding", VOCAB_SIZE),
    "kyutai_speech_to_text": ("model.embed_tokens.embed_tokens", VOCAB_SIZE + 32 * 40 + 1),
}

# Ids that no config names, and that the model's forward makes and looks up.
MADE_UP_IDS = {
    "kyutai_speech_to_text": list(range(24))
    + [VOCAB_SIZE + 40 * codebook + code for codebook in range(32) for code in range(4)],
}

# Composites whose forward takes no text without media, beside those whose media stand in the place of ids.
NO_TEXT_ALONE = (
    "blip blip-2 dia git idefics instructblip instructblipvideo kosmos-2 kyutai_speech_to_text pi0 pp_formulanet udop "
    "voxtral_realtime"
)

# Pairs that take labels for ids, without -100.
LABELS_ARE_IDS = ("blip-question-answering", "pp_formulanet-multimodal-lm")


class StandIn(nn.Module):
    """Patches of 16 × 16 pixels, as a vision tower of timm gives them: [images, width, rows, columns], or a sequence."""

    def __init__(self, width: int, is_sequence: bool) -> None:
        super().__init__()
        self.patches, self.is_sequence = nn.Conv2d(3, width, 16, 16), is_sequence

    def forward(self, pixel_values: Tensor, **options: Any) -> BaseModelOutputWithPooling:
        features = self.patches(pixel_values)
        return BaseModelOutputWithPooling(features.flatten(2).transpose(1, 2) if self.is_sequence else features)


@contextlib.contextmanager
def stand_ins(pair: Pair) -> Iterator[None]:
    """Within the block the vision towers of `pair` that are in timm, which is not installed, are stand-ins."""
    from_config = AutoModel.from_config

    def with_stand_ins(config: Any, **options: Any) -> Any:
        if hasattr(config, "model_args"):  # of timm
            return StandIn(config.model_args["embed_dim"], is_sequence=pair.model_type == "perception_lm")
        return from_config(config, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoModel, "from_config", with_stand_ins)
        yield


def build(pair: Pair, *, tied: bool = False) -> Tiny:
    """The tiny model of `pair` with its batch of text, the same ones every time; its output layer tied or not."""
    overrides: dict[str, Any] = {}
    for override in OVERRIDES:
        if {pair.model_type, str(pair)} & set(override.names.split()):
            overrides |= override.config
    with stand_ins(pair):
        tiny = tiny_models.build(pair, tied=tied, overrides=overrides)
    tiny.made_up_ids = MADE_UP_IDS.get(pair.model_type, [])
    if takes(tiny.model, "mm_token_type_ids"):
        tiny.inputs["mm_token_type_ids"] = torch.zeros_like(tiny.inputs["input_ids"])
    if str(pair) in LABELS_ARE_IDS:
        pad = tiny.model.config.get_text_config().pad_token_id
        tiny.inputs["labels"] = tiny.inputs["labels"].where(tiny.inputs["labels"] >= 0, torch.tensor(pad))
    return tiny


def build_or_reason(pair: Pair, *, tied: bool = False) -> Tiny | str:
    """The tiny model, or the reason why there is none."""
    return UNBUILDABLE.get(str(pair)) or tiny_models.built_or_reason(
        lambda: build(pair, tied=tied), lambda tiny: list(batches(tiny).values())
    )


def takes(model: nn.Module, name: str) -> bool:
    """True where the forward of a model has an argument of that name."""
    return name in inspect.signature(type(model).forward).parameters


def vocabulary_of(tiny: Tiny) -> Any:
    """Argument of `shrink_`: a vocabulary of the ids in the texts and of those that the model says it needs."""
    counts = count_tokens({name: ids for name, ids in tiny.inputs.items() if name in ("input_ids", "labels")})
    path, size = TABLES.get(tiny.pair.model_type, ("", None))
    vocabulary = PartialVocabulary.from_counts(counts, full_size=size, model=tiny.model, always_keep=tiny.made_up_ids)
    ids = vocabulary.token_ids
    assert len(ids) < vocabulary.full_size / 2
    assert (ids >= len(ids)).any(), "ids above the partial size"
    assert (ids < len(ids)).any(), "ids below the partial size"
    for media in media_of(tiny.pair):
        if media.num_tokens != 0 and not media.is_prompt:
            token_id = placeholder(tiny.model.config, media.kind)
            assert token_id not in counts.token_ids
            assert token_id in vocabulary, "kept without being counted"
    return {path: vocabulary} if path else vocabulary


# ---------------------------------------------------------------------------------------------------------------------
# Batches.


def media_of(pair: Pair) -> list[Media]:
    """What stands beside the text of a pair."""
    return [media for media in MEDIA if {pair.model_type, str(pair)} & set(media.names.split())]


def batches(tiny: Tiny) -> dict[str, Inputs]:
    """The batch of text alone, where the model takes one, and the mixed one, where it has media."""
    media = media_of(tiny.pair)
    takes_text_alone = tiny.pair.model_type not in NO_TEXT_ALONE.split() and not any(each.is_prompt for each in media)
    return ({"text": tiny.inputs} if takes_text_alone else {}) | ({"mixed": mixed_inputs(tiny)} if media else {})


def mixed_inputs(tiny: Tiny) -> Inputs:
    """The batch of text with media in some rows, behind the first token; rows without are padded to the same length."""
    model, extra = tiny.model, {}
    ids: list[list[int]] = tiny.inputs["input_ids"].tolist()
    kinds = [[0] * LENGTH for _ in range(BATCH)]
    for media in media_of(tiny.pair):
        its = media.inputs(model.config)
        extra |= its
        if media.is_prompt:
            return {**its, "labels": tiny.inputs["labels"]}
        number = (
            num_features(model, its, media.kind) // len(media.rows) if media.num_tokens is None else media.num_tokens
        )
        for row in media.rows if number else ():
            ids[row][1:1] = [placeholder(model.config, media.kind)] * number
            kinds[row][1:1] = [1 if media.kind == "image" else 2] * number
    return {**tiny.inputs, **_padded(tiny, ids, kinds), **extra}


def _padded(tiny: Tiny, ids: list[list[int]], kinds: list[list[int]]) -> Inputs:
    """Rows of one length: ids, mask, labels, and 1 in the types of tokens where an image stands, 2 where a sound does."""
    width, pad = max(map(len, ids)), getattr(tiny.model.config.get_text_config(), "pad_token_id", None) or 0
    input_ids = torch.tensor([row + [pad] * (width - len(row)) for row in ids])
    kind = torch.tensor([row + [0] * (width - len(row)) for row in kinds])
    mask = torch.zeros_like(input_ids)
    for row, (text_mask, its) in enumerate(zip(tiny.inputs["attention_mask"], ids, strict=True)):
        mask[row, : int(text_mask.sum()) + len(its) - LENGTH] = 1
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    if not tiny.model.config.is_encoder_decoder and str(tiny.pair) not in LABELS_ARE_IDS:
        inputs["labels"] = input_ids.masked_fill((mask == 0) | (kind != 0), -100)
    return inputs | {name: kind for name in ("token_type_ids", "mm_token_type_ids") if takes(tiny.model, name)}


def placeholder(config: Any, kind: str) -> int:
    """The token id where features go, of the composite or of the part that makes them."""
    parts = (config, *(getattr(config, name, None) for name in ("vision_config", "vlm_config")))
    names = (f"{kind}_token_id", f"{kind}_token_index")
    return next(
        int(token_id) for part in parts for name in names if (token_id := getattr(part, name, None)) is not None
    )


def num_features(model: Any, inputs: Inputs, kind: str) -> int:
    """Rows that the model makes of all media of a kind, which stand in the place of as many placeholders."""
    name = "_".join(("get", kind, "features"))
    method = getattr(model, name, None) or getattr(model.base_model, name)
    model.eval()
    with torch.no_grad():
        output = method(**inputs, return_dict=True)
    model.train()
    # Granite 4 Vision adds features to several layers, Llama 4 has no name of its own for them.
    of_layers = getattr(output, "deepstack_features", None)
    names = ("pooler_output", "last_hidden_state")
    named = of_layers[0][1] if of_layers else next((output[name] for name in names if name in output), output)
    return sum(part.numel() // part.shape[-1] for part in _tensors(named))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for part in value:
            yield from _tensors(part)


def prompt(inputs: Inputs) -> Inputs:
    """What a generation begins with: the batch without labels, padded on the left."""
    given = {name: value for name, value in inputs.items() if name != "labels"}
    for name in {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"} & given.keys():
        rows = zip(given[name], inputs["attention_mask"], strict=True)
        given[name] = torch.stack([row.roll(int((mask == 0).sum()), 0) for row, mask in rows])
    return given
