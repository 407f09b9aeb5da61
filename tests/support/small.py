"""Small models, data and training loops that the tests share. Every number is chosen so that remapping moves most ids."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from leanvocab.vocabulary.counts import count_tokens
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

FULL_SIZE, PAD = 500, 1
SIZES: dict[str, Any] = {"vocab_size": FULL_SIZE, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_CLASSIFIER = {**SIZES, "intermediate_size": 64, "num_labels": 3, "pad_token_id": PAD}


def small_model(family: str = "roberta", **changes: Any) -> nn.Module:
    """A randomly initialised model, the same at each call; dropout is on where the family has it."""
    torch.manual_seed(0)
    if family == "roberta":
        return RobertaForSequenceClassification(RobertaConfig(**_CLASSIFIER | changes))
    if family == "bert":
        return BertForSequenceClassification(BertConfig(**_CLASSIFIER | changes))
    if family == "bart":
        bart = {"vocab_size": FULL_SIZE, "d_model": 48, "encoder_layers": 1, "decoder_layers": 1, "num_labels": 3}
        heads = {
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
        }
        return BartForSequenceClassification(BartConfig(**bart | heads | {"pad_token_id": PAD} | changes))
    llama = {**_CLASSIFIER, "num_key_value_heads": 2, "attention_dropout": 0.1, "tie_word_embeddings": False}
    if family == "llama":
        return LlamaForSequenceClassification(LlamaConfig(**llama | changes))
    if family == "llama-lm":
        return LlamaForCausalLM(LlamaConfig(**llama | changes))
    raise ValueError(family)


def batch(num_labels: int = 3) -> dict[str, Tensor]:
    """Six rows of ids up to FULL_SIZE - 1, one of them padded, with labels."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, FULL_SIZE, (6, 12), generator=generator)
    ids[:, 0], ids[:, -1] = 0, 2
    ids[0, 7], ids[0, 8:] = 2, PAD
    labels = torch.randint(0, num_labels, (6,), generator=generator)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels}


def used_vocabulary(**options: Any) -> PartialVocabulary:
    """The ids of `batch()`: about 65 of 500, on both sides of the partial size."""
    return PartialVocabulary.from_counts(count_tokens(batch()["input_ids"].numpy()), full_size=FULL_SIZE, **options)


def unseen_ids() -> Tensor:
    """Ids that `batch()` does not have, all below its vocabulary's length: an index error would not show them."""
    vocabulary = used_vocabulary()
    return torch.tensor([[i for i in range(3, len(vocabulary)) if i not in vocabulary][:8]])


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, steps: int = 4, seed: int = 1, **inputs: Tensor
) -> tuple[list[float], torch.optim.Optimizer]:
    """Losses of a plain loop with clipping, and the optimizer (AdamW without decay unless given)."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    model.train()
    torch.manual_seed(seed)
    losses = []
    for _ in range(steps):
        loss = model(**(inputs or batch())).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, optimizer


def bits(tensor: Tensor) -> bytes:
    """The bytes of a tensor: NaN equals NaN, -0.0 differs from 0.0."""
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def differing(first: nn.Module | dict[str, Any], second: nn.Module | dict[str, Any]) -> list[str]:
    """Names whose tensors differ in any bit, in shape, or are in one state dict alone."""
    left, right = (each.state_dict() if isinstance(each, nn.Module) else each for each in (first, second))
    names = [*left, *(name for name in right if name not in left)]
    return [name for name in names if name not in left or name not in right or not _same(left[name], right[name])]


def _same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and first.dtype == second.dtype and bits(first) == bits(second)


def twins(family: str = "roberta", **changes: Any) -> tuple[nn.Module, nn.Module]:
    """The same model twice."""
    model = small_model(family, **changes)
    return model, copy.deepcopy(model)
