"""The tests' tiny models in the size of doors, with data of few ids, on both sides of the partial size."""

from typing import Any

import models
import torch
from models import FULL_SIZE, PAD
from torch import Tensor, nn

import leanvocab as lv
from leanvocab.model.shrink import shrink_

DIM = models.DOORS.width


def make_model(family: str, **changes: Any) -> Any:
    """The same random model at each call: "roberta" and "llama" classify, the others are language models."""
    return models.make_model(family, models.DOORS, **changes)


def _shuffled() -> Tensor:
    return torch.randperm(FULL_SIZE - 3, generator=torch.Generator().manual_seed(0)) + 3


def token_rows(count: int = 16, length: int = 12, seed: int = 7) -> Tensor:
    """Rows of 60 chosen ids of 500; the first is 0, the last 2, and one row in four is padded."""
    generator = torch.Generator().manual_seed(seed)
    chosen = _shuffled()[:60]
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
    """The ids that `token_rows` has, those that models insert, and eight more: not as many rows as a row has numbers."""
    counts = lv.count_tokens(token_rows(count=512).numpy())
    kept = [0, PAD, 2, 3, *_shuffled()[60:68].tolist()]
    return lv.PartialVocabulary.from_counts(counts, full_size=FULL_SIZE, always_keep=kept)


def lean(model: nn.Module, **options: Any) -> nn.Module:
    """The model, shrunk to `vocabulary()`."""
    return shrink_(model, vocabulary(), **options)


def left_out(num_tables: int = 1) -> int:
    """Elements of the rows that a shrunk model does not hold."""
    return (FULL_SIZE - len(vocabulary())) * DIM * num_tables


def masked(model: nn.Module) -> nn.Module:
    """The reference of output="frozen": the full model, whose vocabulary matrices get no gradient outside the vocabulary."""
    outside = torch.ones(FULL_SIZE, dtype=torch.bool)
    outside[torch.tensor(vocabulary().token_ids)] = False

    def without_unused_rows(gradient: Tensor) -> Tensor:
        return gradient.masked_fill(outside.to(gradient.device).unsqueeze(1), 0)

    for parameter in model.parameters():
        if parameter.shape == (FULL_SIZE, DIM) and parameter.requires_grad:
            parameter.register_hook(without_unused_rows)
    return model
