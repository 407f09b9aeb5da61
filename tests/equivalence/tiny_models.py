"""A tiny model of every architecture that transformers maps to a text task, with inputs for a training step.

One recipe (`tiny_config`) shrinks any config, sub-configs included, by the names of its fields: `SIZES` is a list of
name patterns. What the recipe gets wrong for one architecture is put right in `OVERRIDES` and `INPUTS`, as data, with
a reason each; what cannot be built at all is listed in `UNBUILDABLE`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from leanvocab.vocabulary.counts import count_tokens
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

VOCAB_SIZE = 300
BATCH, LENGTH = 3, 12
NUM_LABELS = 3
NUM_DATA_IDS = 24  # how many different ids the data draws from
DROPOUT = 0.1

# Of transformers. What cannot be built there is listed in UNBUILDABLE, so that any other failure is one; what the
# recipe cannot build in another version is skipped.
KNOWN_VERSION = "5.23."

# Of tests that build every model.
MARKS = [
    pytest.mark.usefixtures("repeatable"),
    # EncoderDecoderModel, at every loss.
    pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces:FutureWarning"),
    # In transformers 5.17: DeBERTa and GPTBigCode when imported, VibeVoice at every forward.
    pytest.mark.filterwarnings("ignore:`torch.jit.script.* is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`acoustic_tokenizer_chunk_size` is deprecated:FutureWarning"),
]

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
    (r"^use_cache$", False),  # outputs would hold caches, which say nothing about rows
    (r"^(src_|tgt_|unpadded_)?vocab_size$|^vocab_size_per_layer_input$", VOCAB_SIZE),
    # Where heads and their size are left out they follow from others in most architectures, but not in all.
    (r"^head_dim$", 8),
    (r"^num_key_value_heads$", 4),
    # What is done to logits: by default it is nothing, or too little to show at tiny sizes.
    (r"^final_logit_softcapping$|^(output_)?logits?_soft_cap$", 0.4),
    (r"^(logit_scale|logits_scaling|lm_head_multiplier|logits_mup_width_multiplier)$", 1.7),
    (r"^dim_model_base$", 20),
    (r"^lm_head_bias$", True),
    # Dropout is on wherever the config has it; what drops whole layers or paths stays as it is.
    (r"layer_?drop$|drop_path", KEEP),
    (r"drop_?out|pdrop$|^dropout", DROPOUT),
]
AT_MOST: list[tuple[str, Any]] = [
    (r"vocab_size", 40),
    (r"codebook_size", 64),
    (r"max_(source_|target_)?position|n_positions|n_ctx|max_seq_len|context_length", 512),
    (r"(^|_)(num_(hidden_)?|n_|en|de)?layers?$|encoder_layers$|decoder_layers$|num_.*_layers$|depth$|num_blocks$", 2),
    (r"(^|_)(n|num)_?(\w*_)?heads?$|attention_heads$|^n_head$", 4),
    (r"head_dim|^d_kv$|^d_head$|dim_head", 8),
    (r"^rotary_dim$", 4),
    (r"num_(local_|routed_)?experts$|n_routed_experts|moe_num_experts", 4),
    (r"experts_per_tok|top_k$|topk$|moe_k$", 2),
    (r"^n_group$|^topk_group$", 1),
    (r"lora_rank|rank$", 16),
    (r"chunk_size|window|block_size", 16),
    (r"image_size|crop_size", 32),
]


def is_token_id(name: str) -> bool:
    """True where a config field holds a token id."""
    return bool(re.search(r"_token_(id|index)$|^(pad|bos|eos|unk|mask)_index$", name))


class SpecialIds:
    """A stable id for each special token of one architecture: varied, distinct, and below the vocabulary's size."""

    def __init__(self, model_type: str, has_media: bool = False) -> None:
        # Those that are given an id where the config's default is None.
        self.wanted = re.compile(rf"^(pad|bos|eos{'|image|video|audio' if has_media else ''})_token_(id|index)$")
        order = np.random.default_rng(zlib.crc32(model_type.encode())).permutation(VOCAB_SIZE)
        self._free: Iterator[int] = iter(order.tolist())
        self._ids: dict[str, int] = {}

    def __getitem__(self, field: str) -> int:
        name = re.sub(r"_(token_)?(id|index)$", "", field)
        if name not in self._ids:
            self._ids[name] = next(self._free)
        return self._ids[name]

    def rest(self, count: int) -> list[int]:
        """`count` other ids for the data, four of them so small that they lie below any partial size."""
        free = list(self._free)
        small = sorted(free)[2:10:2]
        return small + [each for each in free if each not in small][: count - 4]


def tiny_value(name: str, old: Any, special: SpecialIds) -> Any:
    """The tiny value of the config field `name`, whose default is `old`."""
    if is_token_id(name):
        wanted = old is not None or special.wanted.search(name)
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


def tiny_config(
    config_class: type[PreTrainedConfig], overrides: dict[str, Any], special: SpecialIds, ties: bool
) -> Any:
    """A config of `config_class` with tiny sizes; dotted names in `overrides` reach into sub-configs."""
    own = {name: value for name, value in overrides.items() if "." not in name}
    values: dict[str, Any] = {}
    for name, old in fields_of(config_class).items():
        new = ties if name == "tie_word_embeddings" else tiny_value(name, old, special)
        if new is not old:
            values[name] = new
    for name in config_class.sub_configs:
        below = {key.split(".", 1)[1]: value for key, value in overrides.items() if key.startswith(f"{name}.")}
        if name in own:  # a model type; as a dictionary, which older versions want
            values[name] = tiny_config(CONFIG_MAPPING[own.pop(name)], below, special, ties).to_dict()
        elif (sub_class := default_class(config_class, name)) is not None:
            values[name] = tiny_config(sub_class, below, special, ties)
    return config_class(**{**values, **own})


def fields_of(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """The fields of a config with their defaults: of a dataclass, or what its constructors take, as until transformers 5.3."""
    if dataclasses.is_dataclass(config_class):
        given = {field.name: (field.default, field.default_factory) for field in dataclasses.fields(config_class)}
        known = {name: pair for name, pair in given.items() if set(pair) != {dataclasses.MISSING}}
        return {n: make() if value is dataclasses.MISSING else value for n, (value, make) in known.items()}  # type: ignore[operator]
    constructors = [vars(each)["__init__"] for each in reversed(config_class.__mro__) if "__init__" in vars(each)]
    parameters = {name: each for made in constructors for name, each in inspect.signature(made).parameters.items()}
    known = {name: each.default for name, each in parameters.items() if each.default is not inspect.Parameter.empty}
    return {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None, **known}  # taken by all


@functools.cache
def default_class(config_class: type[PreTrainedConfig], name: str) -> type[PreTrainedConfig] | None:
    """The class of the sub-config `name` in a config that was built without arguments; None where there is none."""
    default = getattr(config_class(), name, None)
    return type(default) if isinstance(default, PreTrainedConfig) else None


# ---------------------------------------------------------------------------------------------------------------------
# What the recipe gets wrong.


@dataclasses.dataclass(frozen=True)
class Override:
    """Fields of the configs of some architectures (dotted: of their sub-configs) that the recipe gets wrong."""

    names: str  # model types, or pairs as they print
    reason: str
    config: dict[str, Any]


def stages_of(*parts: str) -> dict[str, Any]:
    """A few stages of VibeVoice's tokenizers of sound, for the configs of these names."""
    stages = {"downsampling_ratios": [2, 2], "depths": [1, 1, 1], "num_filters": 4}
    return {f"{part}.{name}": value for part in parts for name, value in stages.items()}


OVERRIDES = [
    Override("diffllama", "refuses attention dropout", {"attention_dropout": 0.0}),
    Override("gpt_neo", "a list of as many layers as there are", {"attention_types": [[["global", "local"], 1]]}),
    Override("layoutlmv3", "4 × coordinate + 2 × shape is the hidden size", {"coordinate_size": 6, "shape_size": 4}),
    Override("lilt", "the hidden size is divided by 6 and by 4", {"hidden_size": 48}),
    Override(
        "markuplm",
        "ids of tags and subscripts",
        {
            "max_xpath_tag_unit_embeddings": 256,
            "tag_pad_id": 216,
            "max_xpath_subs_unit_embeddings": 1024,
            "subs_pad_id": 1001,
        },
    ),
    Override("roc_bert", "the pad id also pads these", {"shape_vocab_size": 310, "pronunciation_vocab_size": 320}),
    Override("cpmant", "few rows for prompts", {"prompt_types": 4, "prompt_length": 4}),
    Override(
        "big_bird bigbird_pegasus",
        "blocks that fit, so that attention is sparse",
        {"block_size": 1, "num_random_blocks": 1},
    ),
    Override("mobilebert", "half of its output layer is wider than its table", {"embedding_size": 16}),
    Override("inkling_text inkling2_text", "rows of padding that are cut off again", {"vocab_size": VOCAB_SIZE + 8}),
    Override("xmod", "an adapter for a language", {"default_language": "en_XX"}),
    Override(
        "zamba zamba2",
        "two layers that share",
        {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    ),
    Override(
        "dots1 deepseek_v2",
        "the router has no default",
        {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    ),
    Override("lfm2_moe", "no default layers", {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    Override(
        "qwen3_next qwen3_5-causal-lm qwen3_5_text qwen3_5_moe qwen3_5_moe_text qwen4_exp qwen4_exp_text kimi_linear "
        "bailing_hybrid granitemoehybrid",
        "one layer of either kind",
        {"layer_types": ["linear_attention", "full_attention"]},
    ),
    Override(
        "qwen3_5-sequence-classification",
        "one layer of either kind",
        {"text_config.layer_types": ["linear_attention", "full_attention"]},
    ),
    Override(
        "qwen4_exp qwen4_exp_text",
        "an index of what to attend to, which is left out by default",
        {
            "indexer_n_heads": 4,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
        },
    ),
    Override("lfm3", "one layer of either kind", {"layer_types": ["conv", "full_attention"]}),
    Override("bamba", "one layer of either kind", {"attn_layer_indices": [1]}),
    Override("jamba", "one layer of either kind", {"attn_layer_period": 2, "attn_layer_offset": 1}),
    Override("recurrent_gemma", "one layer of either kind", {"block_types": ["recurrent", "attention"]}),
    Override("mamba2", "heads × their size is the inner size", {"num_heads": 8, "head_dim": 8}),
    Override("nemotron_h", "heads are a multiple of groups", {"n_groups": 2}),
    Override(
        "cohere_compass_text",
        "no default rope",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
            }
        },
    ),
    Override("dbrx", "read, but no default", {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0}),
    Override("mpt", "an integer field", {"attn_config.attn_pdrop": 0}),
    Override("gemma3n_text", "too few layers to share keys", {"num_kv_shared_layers": 0}),
    Override(
        "encoder-decoder",
        "cannot be built without arguments",
        {"encoder": "bert", "decoder": "bert", "decoder.is_decoder": True, "decoder.add_cross_attention": True},
    ),
    Override("mimo_v2_flash", "sliding layers have twice as many", {"num_key_value_heads": 2}),
    Override(
        "reformer",
        "positions that multiply to the length",
        {
            "axial_pos_shape": [3, 4],
            "axial_pos_embds_dim": [16, 16],
            "attn_layers": ["local", "lsh"],
            "local_attn_chunk_length": 4,
            "lsh_attn_chunk_length": 4,
            "attention_head_size": 8,
            "num_buckets": 2,
        },
    ),
    Override("nystromformer", "an odd kernel keeps the length", {"conv_kernel_size": 3}),
    Override("neomme", "a multiple of 4 of 16 is rotated", {"head_dim": 16}),
    Override(
        "nemo_speechlm",
        "a chunk is longer than its context",
        {"audio_config.diarization_config.chunk_right_context": 4, "text_config.n_groups": 2},
    ),
    Override(
        "vibevoice_asr",
        "a size for each stage",
        stages_of("acoustic_tokenizer_encoder_config", "semantic_tokenizer_encoder_config"),
    ),
    Override(
        "perceiver", "one position a latent", {"max_position_embeddings": LENGTH, "num_self_attends_per_block": 1}
    ),
]

# Inputs besides ids, mask and labels, or in their place.
EXTRA_INPUTS: list[tuple[str, Callable[[dict[str, Any], Any], dict[str, Any]]]] = [
    ("git", lambda inputs, config: {"pixel_values": noise(BATCH, 3, 32, 32)}),
    ("voxtral_realtime", lambda inputs, config: {"input_features": noise(BATCH, 32, 8 * LENGTH)}),
    ("musicgen musicgen_melody", lambda inputs, config: codebooks(inputs, config.num_codebooks)),
]


def noise(*shape: int) -> torch.Tensor:
    """The same noise every time, float32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def codebooks(inputs: dict[str, Any], num_codebooks: int) -> dict[str, Any]:
    """Ids [batch × codebooks, length] and labels [batch, length, codebooks], each codebook with rows of its own."""
    ids = torch.stack([inputs["input_ids"].roll(row, 0) for row in range(num_codebooks)], 1)
    return {"input_ids": ids.flatten(0, 1), "labels": ids.transpose(1, 2)}


UNBUILDABLE = {
    "canine-sequence-classification": "no vocabulary: characters are hashed",
    "gemma3n-causal-lm": "its vision tower is in timm, which is not installed (gemma3n_text is here)",
    "gemma4_assistant-causal-lm": "takes embeddings from another model, looks no id up and has no loss",
    "gemma4_unified_assistant-causal-lm": "takes embeddings from another model, looks no id up and has no loss",
    "layoutlmv2-sequence-classification": "its visual backbone is in detectron2, which is not installed",
}


# The tables that take ids, where `get_input_embeddings` gives something else or only one of them.
TABLES = {
    "perceiver": ["perceiver.input_preprocessor.embeddings"],
    "musicgen": [f"model.decoder.embed_tokens.{codebook}" for codebook in range(4)],
    "musicgen_melody": [f"model.decoder.embed_tokens.{codebook}" for codebook in range(4)],
}


# Ids that no config names, and that the model's forward makes and looks up.
MADE_UP_IDS = {"cpmant": list(range(VOCAB_SIZE + 8, VOCAB_SIZE + 12))}  # of the prompt


def overrides_for(pair: Pair) -> dict[str, Any]:
    """Fields that `OVERRIDES` sets for one pair."""
    found: dict[str, Any] = {}
    for override in OVERRIDES:
        if {pair.model_type, str(pair)} & set(override.names.split()):
            found |= override.config
    return found


@dataclasses.dataclass
class Tiny:
    """A tiny model in training mode and what it takes for a step."""

    pair: Pair
    model: PreTrainedModel
    inputs: dict[str, Any]
    made_up_ids: list[int]


def build(pair: Pair, seed: int = 0, *, tied: bool = False, overrides: dict[str, Any] | None = None) -> Tiny:
    """The tiny model of `pair` and its inputs, the same ones for the same seed; its output layer tied or not.

    A classifier has no output layer. In an encoder-decoder the same switch of the config also parts the tables of
    encoder and decoder, so there the output layer is untied by hand.
    """
    model_class = getattr(transformers, pair.class_name)
    special = SpecialIds(pair.model_type, has_media=pair.task not in AUTO_CLASSES)
    config_class = CONFIG_MAPPING[pair.model_type]
    ties = tied or pair.task == "sequence-classification" or is_encoder_decoder(config_class)
    decoder = {"is_decoder": True} if pair.task == "causal-lm" and "is_decoder" in names_of(config_class) else {}
    overrides = decoder | overrides_for(pair) | (overrides or {})
    if model_class.config_class in config_class.sub_configs.values():
        config_class = model_class.config_class  # as the auto classes do with the text part of a composite
    config = tiny_config(config_class, overrides, special, ties)
    if pair.task == "sequence-classification":
        config.num_labels = NUM_LABELS
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = special["decoder_start_token_id"]
    torch.manual_seed(seed)
    model = model_class(config).train()
    if not tied:
        untie(model)
    stir_biases(model)
    return Tiny(pair, model, make_inputs(pair, config, special), MADE_UP_IDS.get(pair.model_type, []))


def build_or_reason(pair: Pair, *, tied: bool = False) -> Tiny | str:
    """The tiny model, or the reason why there is none."""
    return UNBUILDABLE.get(str(pair)) or built_or_reason(lambda: build(pair, tied=tied))


def built_or_reason(
    make: Callable[[], Tiny], batches: Callable[[Tiny], list[Any]] = lambda tiny: [tiny.inputs]
) -> Tiny | str:
    """What is made, or the reason why another version than the known one makes nothing that computes with these inputs."""
    if transformers.__version__.startswith(KNOWN_VERSION):
        return make()
    try:
        for is_training in (True, False):
            tried = make()
            for inputs in batches(tried):
                tried.model.train(is_training)(**inputs)
        ALSO_TRIED.get(str(tried.pair), lambda _: None)(tried)
        return make()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def pair_named(name: str) -> Pair:
    """A pair by the name that it prints; skips where this version has none of it."""
    known = {str(pair): pair for pair in PAIRS}
    return known[name] if name in known else pytest.skip(f"not in transformers {transformers.__version__}: {name}")


def _loads_again(tiny: Tiny) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tiny.model.save_pretrained(folder)
        type(tiny.model).from_pretrained(folder)


# What some older versions cannot do with a model in full either, besides computing.
ALSO_TRIED: dict[str, Callable[[Tiny], Any]] = {
    "apertus-causal-lm": _loads_again,
    "blt-causal-lm": lambda tiny: tiny.model.generate(tiny.inputs["input_ids"], max_new_tokens=2),
}


def stir_biases(model: PreTrainedModel) -> None:
    """Gives biases of the vocabulary's size, parameters and buffers, values that show: most are zero at first."""
    generator = torch.Generator().manual_seed(2)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.shape[-1:] == (VOCAB_SIZE,) and tensor.numel() == VOCAB_SIZE:
            tensor.detach().copy_(torch.randn(tensor.shape, generator=generator))


def untie(model: PreTrainedModel) -> None:
    """Gives output layers rows of their own, as loading does from a checkpoint that holds both."""
    for layer in tied_layers(model):
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone())


def tied_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The modules, no embeddings themselves, whose weight is also an embedding's."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    others = (module for module in model.modules() if not isinstance(module, torch.nn.Embedding))
    return [module for module in others if id(getattr(module, "weight", None)) in tables]


def names_of(config_class: type[PreTrainedConfig]) -> set[str]:
    """The fields of a config."""
    return set(fields_of(config_class))


def is_encoder_decoder(config_class: type[PreTrainedConfig]) -> bool:
    """True where the config says so without arguments."""
    return fields_of(config_class).get("is_encoder_decoder") is True


def make_inputs(pair: Pair, config: Any, special: SpecialIds) -> dict[str, Any]:
    """Right-padded rows of ids, [BATCH, LENGTH] int64, and the labels of the task."""
    rng = np.random.default_rng(zlib.crc32(str(pair).encode()))
    text = config.get_text_config()
    pad = getattr(text, "pad_token_id", None) or 0
    eos = getattr(text, "eos_token_id", None)
    ids = np.array(special.rest(NUM_DATA_IDS))
    input_ids, mask = padded_rows(rng, ids, eos, pad)
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    if pair.task == "sequence-classification":
        inputs["labels"] = torch.tensor([0, 2, 1])
    elif config.is_encoder_decoder and pair.task not in ("causal-lm", "masked-lm"):
        labels, labels_mask = padded_rows(rng, ids, eos, pad)
        inputs["labels"] = labels.masked_fill(labels_mask == 0, -100)
    else:
        inputs["labels"] = input_ids.masked_fill(mask == 0, -100)
        if pair.task == "masked-lm":
            inputs["labels"][:, ::2] = -100
    for names, extra in EXTRA_INPUTS:
        if {pair.model_type, str(pair)} & set(names.split()):
            inputs |= extra(inputs, config)
    return inputs


def padded_rows(rng: np.random.Generator, ids: np.ndarray, eos: Any, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask: eos ends a row, padding follows, and one pad id stands where it is attended to."""
    tokens = torch.from_numpy(rng.permutation(np.resize(ids, BATCH * LENGTH)).reshape(BATCH, LENGTH))
    mask = torch.ones_like(tokens)
    for row in range(BATCH):
        end = LENGTH - 2 * row
        if isinstance(eos, int):
            tokens[row, end - 1] = eos
        tokens[row, end:] = pad
        mask[row, end:] = 0
    tokens[1, 2] = pad
    return tokens, mask


def vocabularies(tiny: Tiny) -> Any:
    """Argument of `shrink_`: a vocabulary of the ids in data and configs; by table where the model names none."""
    counts = count_tokens({n: ids for n, ids in tiny.inputs.items() if n in ("input_ids", "labels") and ids.ndim > 1})
    paths = TABLES.get(tiny.pair.model_type)
    table = tiny.model.get_submodule(paths[0]) if paths else tiny.model.get_input_embeddings()
    vocabulary = PartialVocabulary.from_counts(
        counts, full_size=len(table.weight), model=tiny.model, always_keep=tiny.made_up_ids
    )
    ids = vocabulary.token_ids
    assert len(ids) < vocabulary.full_size / 2
    assert (ids >= len(ids)).any(), "ids above the partial size"
    assert (ids < len(ids)).any(), "ids below the partial size"
    assert np.mean(ids != np.arange(len(ids))) > 0.7, "most ids move"
    return dict.fromkeys(paths, vocabulary) if paths else vocabulary
