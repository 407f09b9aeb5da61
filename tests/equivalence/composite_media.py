"""What processors make of images and sounds, for composites: a recipe for each shape, as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from tiny_models import BATCH, LENGTH, noise

Inputs = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Media:
    """What a processor makes of the images or sounds in a batch, for some architectures."""

    names: str  # model types
    shape: str  # in words
    inputs: Callable[[Any], Inputs]  # of a config
    kind: str = "image"
    num_tokens: int | None = None  # placeholders for one; None: as many as the model makes features
    rows: tuple[int, ...] = (0, 2)  # of the batch, that have one; those between are text
    is_prompt: bool = False  # True where it stands in the place of ids and mask: the text is in the labels alone


ALL_ROWS = tuple(range(BATCH))
NUM_FRAMES = 32


def side(config: Any) -> int:
    """Pixels along one side of an image."""
    for name in ("vision_config", "vit_config", "encoder"):
        size = getattr(getattr(config, name, None), "image_size", None)
        if size is not None:
            return int(size[0] if isinstance(size, list | tuple) else size)
    return 32


def vision(config: Any) -> Any:
    return config.get("vision_config") if isinstance(config, dict) else config.vision_config


# --- images -----------------------------------------------------------------------------------------------------------


def pixels(*leading: int) -> Callable[[Any], Inputs]:
    return lambda config: {"pixel_values": noise(*leading, 3, side(config), side(config))}


def pooled(config: Any) -> Inputs:
    """Two images of 4 patches that become one feature each, as Molmo 2 takes them."""
    return {
        "pixel_values": noise(2, 4, 3 * patch_size(config) ** 2),
        "image_token_pooling": torch.arange(8).reshape(2, 4),
        "image_grids": torch.tensor([[1, 1, 0, 0]] * 2),
    }


def cropped(config: Any) -> Inputs:
    """Two images whole and as one crop, as Phi-4 multimodal takes them."""
    its = config.vision_config
    size, patches = its.crop_size, its.crop_size // its.patch_size
    return {
        "image_pixel_values": noise(2, 2, 3, size, size),
        "image_sizes": torch.tensor([[size, size]] * 2),
        "image_attention_mask": torch.ones(2, 2, patches, patches),
    }


def seen_and_done(config: Any) -> Inputs:
    """An image, a state and actions a row, as Pi0 takes them."""
    size = config.vlm_config.vision_config.image_size
    return {
        "pixel_values": noise(BATCH, 1, 3, size, size),
        "pixel_attention_mask": torch.ones(BATCH, 1, dtype=torch.bool),
        "state": noise(BATCH, config.max_state_dim),
        "actions": noise(BATCH, config.chunk_size, config.max_action_dim),
    }


def inkling_patches(config: Any) -> Inputs:
    size = config.vision_config.patch_size
    return {"pixel_values": noise(8, config.vision_config.temporal_patch_size, size, size, 3)}


def pixels_twice(config: Any) -> Inputs:
    """Of low and of high resolution."""
    high = config.high_res_vision_config.image_size
    return {**pixels(2)(config), "high_res_pixel_values": noise(2, 3, high, high)}


def sized(config: Any) -> Inputs:
    size = side(config)
    return {"pixel_values": noise(2, 3, size, size), "image_sizes": torch.tensor([[size, size], [size, size]])}


def tiles(config: Any) -> Inputs:
    """Two images of one tile and the whole picture each, as LLaVA-NeXT takes them."""
    size = side(config)
    return {"pixel_values": noise(2, 2, 3, size, size), "image_sizes": torch.tensor([[size, size], [size, size]])}


def pictures_by_row(config: Any) -> Inputs:
    """One picture a row, black where there is none, as Idefics2 takes them."""
    size = side(config)
    images = noise(BATCH, 1, 3, size, size)
    images[1] = 0
    return {"pixel_values": images}


def pictures_with_a_mask(config: Any) -> Inputs:
    return {**pictures_by_row(config), "pixel_attention_mask": torch.tensor([[True], [False], [True]])}


def patch_size(config: Any) -> int:
    size = config.vision_config.patch_size
    return int(size[0] if isinstance(size, list | tuple) else size)


def grids(*, flat: bool = True, temporal: int | None = None, **others: Any) -> Callable[[Any], Inputs]:
    """Two images of 1 × 4 × 4 patches, as Qwen2-VL takes them flat and Kimi as little images."""

    def inputs(config: Any) -> Inputs:
        its, size = config.vision_config, patch_size(config)
        channels = getattr(its, "num_channels", None) or getattr(its, "in_channels", 3)
        times = getattr(its, "temporal_patch_size", 1) if temporal is None else temporal
        shape = (channels * times * size**2,) if flat else (channels, size, size)
        return {"pixel_values": noise(32, *shape), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2), **others}

    return inputs


def merged_grids(config: Any) -> Inputs:
    """Two images of 1 × 2 × 2 blocks of patches, channels last, as Inkling 2 takes them."""
    size = patch_size(config) * config.vision_config.spatial_merge_size
    return {"pixel_values": noise(8, size, size, 3), "image_grid_thw": torch.tensor([[1, 2, 2]] * 2)}


def flat_grids(config: Any) -> Inputs:
    return {"pixel_values": noise(32, 3 * patch_size(config) ** 2), "image_grid_hw": torch.tensor([[4, 4]] * 2)}


def positioned(config: Any) -> Inputs:
    """Two images of 4 × 4 patches with their positions, as Gemma 4 takes them."""
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    positions = torch.stack([columns, rows], -1).reshape(1, 16, 2).repeat(2, 1, 1)
    size = getattr(config.vision_config, "model_patch_size", patch_size(config))
    return {"pixel_values": noise(2, 16, 3 * size**2), "image_position_ids": positions}


def shaped(config: Any) -> Inputs:
    """Two images of 2 × 2 patches in rows, as LFM2-VL takes them."""
    return {
        "pixel_values": noise(2, 4, 3 * patch_size(config) ** 2),
        "spatial_shapes": torch.tensor([[2, 2]] * 2),
        "pixel_attention_mask": torch.ones(2, 4, dtype=torch.long),
    }


def packed(config: Any) -> Inputs:
    """Patches of two images side by side, as MiniCPM-V takes them."""
    size = patch_size(config)
    return {"pixel_values": noise(1, 3, size, 32 * size), "target_sizes": torch.tensor([[4, 4]] * 2)}


def attended(config: Any) -> Inputs:
    """An image a row, which the text attends to, as Idefics takes them."""
    size = side(config)
    return {"pixel_values": noise(BATCH, 1, 3, size, size), "image_attention_mask": torch.ones(BATCH, LENGTH, 1)}


def attended_tiles(config: Any) -> Inputs:
    """An image of one tile a row, which the text attends to, as Mllama takes them."""
    size, tiles = side(config), config.vision_config.max_num_tiles
    mask = torch.zeros(BATCH, 1, tiles, dtype=torch.long)
    mask[..., 0] = 1
    return {
        "pixel_values": noise(BATCH, 1, tiles, 3, size, size),
        "aspect_ratio_ids": torch.ones(BATCH, 1, dtype=torch.long),
        "aspect_ratio_mask": mask,
        "cross_attention_mask": mask[:, None].expand(BATCH, LENGTH, 1, tiles).clone(),
    }


def latents(config: Any) -> dict[str, torch.Tensor]:
    """Where features of an image stand in the ids, for Kosmos: behind the first token."""
    mask = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    mask[:, 1 : 1 + config.latent_query_num] = True
    return {"image_embeds_position_mask": mask}


def flattened_patches(config: Any) -> Inputs:
    """Row, column and pixels of four patches a row, as Pix2Struct takes them."""
    patches = noise(BATCH, 4, 2 + config.vision_config.patch_embed_hidden_size)
    patches[..., :2] = torch.tensor([[1, 1], [1, 2], [2, 1], [2, 2]])
    return {"flattened_patches": patches}


def queried(*leading: int) -> Callable[[Any], Inputs]:
    """Images and the text that queries look at, as InstructBLIP takes them."""
    return lambda config: {**pixels(*leading)(config), "qformer_input_ids": torch.arange(12).reshape(BATCH, 4)}


def boxes(config: Any) -> Inputs:
    return {"bbox": torch.rand(BATCH, LENGTH, 4, generator=torch.Generator().manual_seed(0))}


def proteins(config: Any) -> Inputs:
    ids = torch.arange(BATCH * 8).reshape(BATCH, 8) % 20 + 4
    return {"protein_input_ids": ids, "protein_attention_mask": torch.ones_like(ids)}


# --- sounds -----------------------------------------------------------------------------------------------------------


def audio(config: Any) -> Any:
    for name in ("audio_config", "encoder_config", "asr_config"):
        config = getattr(config, name, None) or config
    return config


def num_mels(config: Any) -> int:
    names = (
        "num_mel_bins", "n_mel_bins", "input_feat_size", "input_feat_per_channel", "input_dim", "feature_projection_input_dim",
        "feature_size",
    )  # fmt: skip
    return next(int(getattr(audio(config), name)) for name in names if getattr(audio(config), name, None))


def mels(number: int, *, mask: str | None = None, last: bool = False, frames: int = NUM_FRAMES, **others: Any) -> Any:
    """Features of so many sounds, mels before frames or last."""

    def inputs(config: Any) -> Inputs:
        shape = (frames, num_mels(config)) if last else (num_mels(config), frames)
        masks = {} if mask is None else {mask: torch.ones(number, frames, dtype=torch.long)}
        return {"input_features": noise(number, *shape), **masks, **others}

    return inputs


def codes_to_say(config: Any) -> Inputs:
    """Codes that a decoder has said, in channels, as Dia takes them."""
    channels = config.decoder_config.num_channels
    codes = torch.arange(BATCH * 6 * channels).reshape(BATCH, 6, channels) % 30
    return {"decoder_input_ids": codes, "labels": codes.transpose(1, 2).reshape(-1, 6)}


def codes_heard(config: Any) -> Inputs:
    """A token of text and codes of sounds at each moment, as Kyutai's model takes them."""
    text = torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH, 1) % 24
    codes = torch.arange(config.num_codebooks).expand(BATCH, LENGTH, -1) % 4
    return {"input_ids": torch.cat([text, codes], -1)}


def mels_of_gemma(config: Any) -> Inputs:
    """A sound, of as many mels as the first convolution of Gemma 4 has channels."""
    its = config.audio_config
    number = getattr(its, "input_feat_size", None) or its.subsampling_conv_channels[0]
    return {"input_features": noise(1, 48, number), "input_features_mask": torch.ones(1, 48, dtype=torch.bool)}


def bins(config: Any) -> Inputs:
    """A sound as numbers of bins, as Inkling takes it."""
    ids = torch.arange(3 * config.audio_config.num_codebooks).reshape(1, 3, -1) % config.audio_config.codebook_size
    return {"audio_input_ids": ids, "audio_input_ids_mask": torch.ones(1, 3, dtype=torch.bool)}


def waves(number: int, length: int, *, mask: str | None = None) -> Callable[[Any], Inputs]:
    masks = {} if mask is None else {mask: torch.ones(number, length, dtype=torch.long)}
    return lambda config: {"input_values": noise(number, length), **masks}


MEDIA = [
    Media(
        "aria aya_vision blip-2 chameleon cohere2_vision deepseek_vl gemma3 got_ocr2 internvl janus llava vipllava "
        "paligemma shieldgemma2 qianfan_ocr ovis2 pp_chart2table llama4 t5gemma2 florence2 video_llava unlimited_ocr step3p7 "
        "deepseek_ocr2",
        "pixels of each image",
        pixels(2),
    ),
    Media("molmo2", "patches, and how they are pooled", pooled),
    Media("phi4_multimodal", "the whole and crops", cropped, num_tokens=5),
    Media("fast_vlm gemma3n", "pixels of each image", pixels(2)),
    Media("pi0", "images, states and actions", seen_and_done, num_tokens=4, rows=ALL_ROWS),
    Media("perception_lm", "tiles of each image", pixels(2, 1), num_tokens=3),
    Media("fuyu", "patches", lambda config: {"pixel_values": noise(2, 4, 3 * config.patch_size**2)}),
    Media("inkling_mm_model", "patches two frames deep", inkling_patches, num_tokens=4),
    Media("deepseek_vl_hybrid", "pixels of each image, twice", pixels_twice),
    Media("blip git", "an image a row", pixels(BATCH), num_tokens=0),
    Media("pp_formulanet", "an image a row", pixels(BATCH), num_tokens=0),
    Media("vision-encoder-decoder", "an image a row", pixels(BATCH), is_prompt=True),
    Media("dia", "codes of sounds", codes_to_say, num_tokens=0),
    Media("kyutai_speech_to_text", "codes of sounds beside the text", codes_heard, num_tokens=0),
    Media(
        "qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe qwen3_5 qwen3_5_moe qwen4_exp glm4v glm46v glm4v_moe glm_ocr glmga "
        "exaone4_5 cosmos3_omni cosmos3_edge cohere_compass ernie4_5_vl_moe hunyuan_vl hyperclovax_vision_v2 lfm3_vl "
        "minimax_m3_vl glm5_next qwen2_5_omni_thinker qwen3_omni_moe_thinker dots3_note",
        "patches of grids",
        grids(),
    ),
    Media("muse_glimmer muse_spark", "patches of grids, two frames deep", grids(temporal=2)),
    Media("kimi_k25 paddleocr_vl", "patches of grids, each a little image", grids(flat=False)),
    Media("video_llama_3", "patches of grids, merged by 2", grids(image_merge_sizes=torch.tensor([2, 2]))),
    Media("inkling2", "merged patches", merged_grids),
    Media("nemotron_h_omni", "patches of grids without time", flat_grids),
    Media("gemma4 gemma4_unified", "patches and their positions", positioned),
    Media("lfm2_vl", "patches and their shapes", shaped),
    Media("minicpm_ocr minicpmv4_6 minicpmv4_7", "patches side by side", packed),
    Media("llava_next llava_next_video llava_onevision granite4_vision", "tiles", tiles),
    Media("emu3", "images that become tokens of their own", sized, num_tokens=20),
    Media("mistral3 mistral_large4 lighton_ocr", "images and their sizes", sized),
    Media("idefics2 idefics3 smolvlm", "images by row, black ones left out", pictures_by_row),
    Media("granite_docling", "images by row and which there are", pictures_with_a_mask),
    Media("idefics", "images that are attended to", attended, num_tokens=0),
    Media("mllama", "tiles that are attended to", attended_tiles, num_tokens=0),
    Media(
        "kosmos-2",
        "pixels, and where their features go",
        lambda config: pixels(BATCH)(config) | latents(config),
        num_tokens=0,
    ),
    Media(
        "kosmos-2.5",
        "patches, and where their features go",
        lambda config: flattened_patches(config) | latents(config),
        num_tokens=0,
    ),
    Media("pix2struct", "patches", flattened_patches, is_prompt=True),
    Media("instructblip", "images and questions", queried(BATCH), rows=ALL_ROWS),
    Media("instructblipvideo", "videos and questions", queried(BATCH, 4), kind="video", rows=ALL_ROWS),
    Media("udop", "boxes of words", boxes, num_tokens=0),
    Media("evolla", "proteins", proteins, num_tokens=0),
    Media(
        "qwen3_asr",
        "mels of a chunk and which there are",
        mels(2, mask="input_features_mask", frames=100),
        kind="audio",
    ),
    Media("glmasr", "mels and which there are", mels(2, mask="input_features_mask"), kind="audio"),
    Media(
        "fun_asr_nano",
        "seven frames side by side",
        lambda config: {
            "input_features": noise(2, 32, 7 * 32),
            "input_features_mask": torch.ones(2, 32, dtype=torch.long),
        },
        kind="audio",
    ),
    Media("nemo_speechlm", "frames and which there are", mels(2, mask="input_features_mask", last=True), kind="audio"),
    Media(
        "moss_transcribe_diarize",
        "mels, and samples that there are",
        mels(2, mask="input_features_mask", padding_mask=torch.ones(2, 320)),
        kind="audio",
    ),
    Media("granite_speech granite_speech_plus", "frames", mels(2, last=True), kind="audio"),
    Media("voxtral", "mels", mels(2), kind="audio"),
    Media("voxtral_realtime", "mels along the text", mels(BATCH, frames=8 * LENGTH), num_tokens=0),
    Media(
        "qwen2_audio", "mels and which there are", mels(2, mask="feature_attention_mask"), kind="audio", num_tokens=8
    ),
    Media("gemma3n", "a sound behind the second image", mels_of_gemma, kind="audio", num_tokens=4, rows=(2,)),
    Media("gemma4", "a sound behind the second image", mels_of_gemma, kind="audio", rows=(2,)),
    Media("inkling_mm_model", "a sound behind the second image", bins, kind="audio", num_tokens=3, rows=(2,)),
    Media(
        "qwen2_5_omni_thinker qwen3_omni_moe_thinker",
        "a sound behind the second image",
        mels(1, mask="feature_attention_mask", frames=100),
        kind="audio",
        rows=(2,),
    ),
    Media("vibevoice_asr", "samples", lambda config: {"input_values": noise(2, 1, 64)}, kind="audio"),
    Media("whisper", "mels", mels(BATCH), is_prompt=True),
    Media("speech_to_text seamless_m4t seamless_m4t_v2", "frames", mels(BATCH, last=True), is_prompt=True),
    Media("canary cohere_asr", "frames", mels(BATCH, last=True, frames=64), is_prompt=True),
    Media(
        "moonshine moonshine_streaming speecht5 speech-encoder-decoder", "samples", waves(BATCH, 1600), is_prompt=True
    ),
    Media("pop2piano", "features", lambda config: {"input_features": noise(BATCH, 8, config.d_model)}, is_prompt=True),
]
