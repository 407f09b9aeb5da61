"""Small language models with every kind of output layer, which the tests of what lies on disk and in memory share."""

from typing import Any

import torch
from small import FULL_SIZE, PAD, SIZES, batch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from leanvocab.vocabulary.counts import count_tokens
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

_SHARED: dict[str, Any] = {**SIZES, "intermediate_size": 64, "pad_token_id": PAD, "attention_dropout": 0.1}
_BART: dict[str, Any] = {
    "vocab_size": FULL_SIZE, "d_model": 48, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "pad_token_id": PAD, "bos_token_id": 0,
    "eos_token_id": 2, "decoder_start_token_id": 2, "max_position_embeddings": 40,
}  # fmt: skip


def small_lm(family: str) -> nn.Module:
    """A randomly initialised language model, the same at each call."""
    torch.manual_seed(0)
    if family.startswith("llama"):
        return LlamaForCausalLM(
            LlamaConfig(**_SHARED, num_key_value_heads=2, tie_word_embeddings=family == "llama-tied")
        )
    if family == "gemma2":  # capped logits, scaled embeddings, tied
        return Gemma2ForCausalLM(
            Gemma2Config(**_SHARED, num_key_value_heads=2, head_dim=12, final_logit_softcapping=30.0)
        )
    if family == "bert-mlm":  # a bias beside the tied decoder
        return BertForMaskedLM(BertConfig(**SIZES, intermediate_size=64, pad_token_id=PAD))
    if family == "bart-lm":  # encoder, decoder, shared and output layer in one matrix; a buffer beside it
        return BartForConditionalGeneration(BartConfig(**_BART))
    raise ValueError(family)


def lm_batch() -> dict[str, Tensor]:
    """The ids of `batch()`, which are their own labels."""
    inputs = batch()
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["input_ids"] == PAD, -100)}


def lm_vocabulary() -> PartialVocabulary:
    """The ids of `lm_batch()`, with those that models insert: about 65 of 500."""
    return PartialVocabulary.from_counts(
        count_tokens(batch()["input_ids"].numpy()), full_size=FULL_SIZE, always_keep=[0, 1, 2, 3]
    )
