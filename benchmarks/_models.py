"""Shapes of published models, built from configs with random weights: enough for time and memory.

Weights are filled with one block of random numbers over and over, which takes a tenth of the time of drawing them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A model's name, the transformers class of its config, the task's auto class, and what differs from the defaults."""

    config: str
    task: str  # "classifier", "causal-lm" or "seq2seq-lm"
    settings: dict[str, Any]
    kept: int  # rows that a fine-tuning data set uses

    @property
    def rows(self) -> int:
        return int(self.settings["vocab_size"])


_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_XLM_R = {"vocab_size": 250_002, "max_position_embeddings": 514, "type_vocab_size": 1, "pad_token_id": 1}
_TINY = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
_GEMMA_270M = {
    "vocab_size": 262_144,
    "hidden_size": 640,
    "num_hidden_layers": 18,
    "intermediate_size": 2048,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
}
_GEMMA_1B = _GEMMA_270M | {"hidden_size": 1152, "num_hidden_layers": 26, "intermediate_size": 6912}
_EMBEDDING_GEMMA = _GEMMA_270M | {
    "hidden_size": 768,
    "num_hidden_layers": 24,
    "intermediate_size": 1152,
    "num_attention_heads": 3,
    "use_bidirectional_attention": True,
}
_QWEN3 = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
_QWEN3_1B7 = _QWEN3 | {"hidden_size": 2048, "intermediate_size": 6144}
_LLAMA = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
_GEMMA_4 = {
    "vocab_size": 262_144,
    "vocab_size_per_layer_input": 262_144,
    "hidden_size": 1536,
    "hidden_size_per_layer_input": 256,
    "num_hidden_layers": 35,
    "intermediate_size": 6144,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "num_kv_shared_layers": 20,
    "use_double_wide_mlp": True,
}
_GEMMA_4_E4B = _GEMMA_4 | {
    "hidden_size": 2560,
    "num_hidden_layers": 42,
    "intermediate_size": 10_240,
    "num_key_value_heads": 2,
    "num_kv_shared_layers": 18,
    "use_double_wide_mlp": False,
}
_GEMMA_4_FEW = _GEMMA_4 | {
    "vocab_size": 20_000,
    "vocab_size_per_layer_input": 20_000,
    "hidden_size": 256,
    "hidden_size_per_layer_input": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 1024,
    "num_attention_heads": 4,
    "head_dim": 64,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
}
_GEMMA_3N = {
    "vocab_size": 262_400,
    "vocab_size_per_layer_input": 262_144,
    "hidden_size": 2048,
    "hidden_size_per_layer_input": 256,
    "num_hidden_layers": 30,
    "intermediate_size": 8192,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "num_kv_shared_layers": 10,
    "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 20,
}
_SMOLLM2 = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
_MT5 = {
    "vocab_size": 250_112,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 1024,
    "num_layers": 8,
    "num_heads": 6,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
_NLLB = {
    "vocab_size": 256_206,
    "d_model": 1024,
    "encoder_layers": 12,
    "decoder_layers": 12,
    "encoder_ffn_dim": 4096,
    "decoder_ffn_dim": 4096,
    "encoder_attention_heads": 16,
    "decoder_attention_heads": 16,
    "scale_embedding": True,
}
SHAPES = {
    "bert-base": Shape("BertConfig", "classifier", {"vocab_size": 30_522, **_BASE}, 15_000),
    "bert-qqp": Shape("BertConfig", "classifier", {"vocab_size": 30_522, **_BASE}, 27_012),
    "xlm-r-base": Shape("XLMRobertaConfig", "classifier", {**_XLM_R, **_BASE}, 6_000),
    "xlm-r-large": Shape("XLMRobertaConfig", "classifier", {**_XLM_R, **_LARGE}, 6_000),
    "xlm-v-base": Shape("XLMRobertaConfig", "classifier", {**_XLM_R, **_BASE, "vocab_size": 901_629}, 8_000),
    "bge-m3": Shape("XLMRobertaConfig", "classifier", {**_XLM_R, **_LARGE, "max_position_embeddings": 8194}, 6_000),
    "smollm2-135m": Shape("LlamaConfig", "causal-lm", _SMOLLM2, 5_000),
    "gemma-3-270m": Shape("Gemma3TextConfig", "causal-lm", _GEMMA_270M, 5_000),
    "gemma-3-270m-classifier": Shape("Gemma3TextConfig", "classifier", _GEMMA_270M, 5_000),
    "embeddinggemma-300m": Shape("Gemma3TextConfig", "classifier", _EMBEDDING_GEMMA, 5_000),
    "gemma-3-1b": Shape("Gemma3TextConfig", "causal-lm", _GEMMA_1B, 5_000),
    "gemma-4-e2b": Shape("Gemma4TextConfig", "causal-lm", _GEMMA_4, 5_000),
    "gemma-4-e4b": Shape("Gemma4TextConfig", "causal-lm", _GEMMA_4_E4B, 5_000),
    "gemma-4-few-layers": Shape("Gemma4TextConfig", "causal-lm", _GEMMA_4_FEW, 600),
    "gemma-3n-e2b": Shape("Gemma3nTextConfig", "causal-lm", _GEMMA_3N, 5_000),
    "qwen3-0.6b": Shape("Qwen3Config", "causal-lm", _QWEN3, 5_000),
    "qwen3-1.7b": Shape("Qwen3Config", "causal-lm", _QWEN3_1B7, 5_000),
    "llama-3.2-1b": Shape("LlamaConfig", "causal-lm", _LLAMA, 5_000),
    "mt5-small": Shape("MT5Config", "seq2seq-lm", _MT5, 6_000),
    "nllb-600m": Shape("M2M100Config", "seq2seq-lm", _NLLB, 8_000),
    "tiny": Shape("XLMRobertaConfig", "classifier", {**_XLM_R, **_TINY, "vocab_size": 2_000}, 300),
    "tiny-lm-64": Shape(  # of whole blocks of 4-bit weights
        "LlamaConfig", "causal-lm", {**_TINY, "hidden_size": 64, "vocab_size": 900, "tie_word_embeddings": True}, 200
    ),
    "tiny-lm": Shape("LlamaConfig", "causal-lm", {**_TINY, "vocab_size": 900, "tie_word_embeddings": True}, 200),
}
_TASKS = {
    "classifier": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
}


def make_model(name: str, dtype: str = "float32", device: str = "cpu", *, filled: bool = True) -> Any:
    """The model with random weights, in training mode; not filled with them where only its sizes matter."""
    import torch
    import transformers
    from transformers.initialization import no_init_weights

    shape = SHAPES[name]
    config = getattr(transformers, shape.config)(**shape.settings)
    if config.pad_token_id is None:
        config.pad_token_id = 0
    with no_init_weights(), torch.device(device):
        model = getattr(transformers, _TASKS[shape.task]).from_config(config, dtype=getattr(torch, dtype))
    model.tie_weights()
    if filled:
        fill(model)
    return model.train()


def fill(model: Any) -> None:
    """Random matrices, small enough to train with; norms one, biases zero. The same for the same model each time."""
    import torch

    generator = torch.Generator().manual_seed(0)
    block = 0.02 * torch.randn((1 << 20) + 7, generator=generator)  # odd, so that rows differ
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            flat = parameter.view(-1)
            if parameter.ndim == 1:
                flat.fill_(1.0 if name.endswith("weight") else 0.0)
                continue
            source = block.to(parameter.device, parameter.dtype)
            for start in range(0, flat.numel(), source.numel()):
                part = flat[start : start + source.numel()]
                part.copy_(source[: part.numel()])


def save_model(name: str, folder: Path) -> None:
    """A checkpoint as `from_pretrained` finds one."""
    make_model(name).save_pretrained(folder)


def kept_ids(name: str, num_kept: int | None = None) -> Any:
    """Sorted ids of the rows to keep, int64: the pad and the other first ids, and others drawn from all rows."""
    import numpy as np

    shape = SHAPES[name]
    count = min(num_kept or shape.kept, shape.rows)
    drawn = 4 + np.random.default_rng(0).choice(shape.rows - 4, count - 4, replace=False)
    return np.sort(np.concatenate([np.arange(4), drawn]))
