"""Small models and data that the doors share; about 65 of 500 ids are used, on both sides of the partial size."""

from typing import Any

import torch
from torch import Tensor, nn

import leanvocab as lv
from leanvocab.model.shrink import shrink_

FULL_SIZE, PAD, DIM = 500, 1, 64
_SIZES: dict[str, Any] = {
    "vocab_size": FULL_SIZE, "hidden_size": DIM, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
_LLAMA: dict[str, Any] = {**_SIZES, "num_key_value_heads": 2, "attention_dropout": 0.1}
_BART: dict[str, Any] = {
    "vocab_size": FULL_SIZE, "d_model": DIM, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "pad_token_id": PAD, "bos_token_id": 0,
    "eos_token_id": 2, "decoder_start_token_id": 2, "max_position_embeddings": 64,
}  # fmt: skip
_T5: dict[str, Any] = {
    "vocab_size": FULL_SIZE, "d_model": DIM, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4, "pad_token_id": PAD,
    "eos_token_id": 2, "decoder_start_token_id": PAD,
}  # fmt: skip


def make_model(family: str, **changes: Any) -> nn.Module:
    """The same random model at each call: "roberta" and "llama" classify, the others are language models."""
    import transformers as hf

    torch.manual_seed(0)
    labels = {"num_labels": 3}
    if family == "roberta":
        return hf.RobertaForSequenceClassification(hf.RobertaConfig(**_SIZES | labels | changes))
    if family == "llama":
        return hf.LlamaForSequenceClassification(hf.LlamaConfig(**_LLAMA | labels | changes))
    if family in ("llama-untied", "llama-tied"):
        tied = {"tie_word_embeddings": family == "llama-tied"}
        return hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA | tied | changes))
    if family == "t5":
        return hf.T5ForConditionalGeneration(hf.T5Config(**_T5 | changes))
    if family == "bart-untied":
        return hf.BartForConditionalGeneration(hf.BartConfig(**_BART | {"tie_word_embeddings": False} | changes))
    raise ValueError(family)


def token_rows(count: int = 16, length: int = 12, seed: int = 7) -> Tensor:
    """Rows of 60 chosen ids of 500; the first is 0, the last 2, and one row in four is padded."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(FULL_SIZE - 3, generator=torch.Generator().manual_seed(0))[:60] + 3
    ids = chosen[torch.randint(0, len(chosen), (count, length), generator=generator)]
    ids[:, 0], ids[:, -1] = 0, 2
    ids[::4, length // 2], ids[::4, length // 2 + 1 :] = 2, PAD
    return ids


def examples(task: str = "classification", count: int = 16) -> list[dict[str, Tensor]]:
    """A data set as a list: what a Trainer takes. Tasks: "classification", "causal-lm", "seq2seq-lm"."""
    ids = token_rows(count)
    labels = torch.randint(0, 3, (count,), generator=torch.Generator().manual_seed(3))
    if task != "classification":
        labels = ids.masked_fill(ids == PAD, -100)
    return [
        {"input_ids": row, "attention_mask": (row != PAD).long(), "labels": label}
        for row, label in zip(ids, labels, strict=True)
    ]


def vocabulary() -> "lv.PartialVocabulary":
    """The ids that `token_rows` has, whatever its length, and those that models insert."""
    rows = token_rows(count=512)
    return lv.PartialVocabulary.from_counts(
        lv.count_tokens(rows.numpy()), full_size=FULL_SIZE, always_keep=[0, PAD, 2, 3]
    )


def lean(model: nn.Module, **options: Any) -> nn.Module:
    """The model, shrunk to `vocabulary()`."""
    return shrink_(model, vocabulary(), **options)


def left_out(num_tables: int = 1) -> int:
    """Elements of the rows that a shrunk model does not hold."""
    return (FULL_SIZE - len(vocabulary())) * DIM * num_tables


def mask_gradients(model: nn.Module) -> nn.Module:
    """The reference of output="frozen": the full model, whose vocabulary matrices get no gradient outside the vocabulary."""
    outside = torch.ones(FULL_SIZE, dtype=torch.bool)
    outside[torch.tensor(vocabulary().token_ids)] = False

    def masked(gradient: Tensor) -> Tensor:
        return gradient.masked_fill(outside.to(gradient.device).unsqueeze(1), 0)

    for parameter in {id(p): p for p in model.parameters()}.values():
        if parameter.shape == (FULL_SIZE, DIM) and parameter.requires_grad:
            parameter.register_hook(masked)
    return model
