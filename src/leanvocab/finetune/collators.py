"""Rows of token ids → batches of tensors: padding, and the masks of masked language models."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import TrainerCallback

from leanvocab.choices import IGNORE_INDEX
from leanvocab.texts.text_columns import in_memory

# Of the tokens to predict, the share that becomes the mask token, and that which becomes a random word (BERT's recipe).
MASK_RATIO, RANDOM_RATIO = 0.8, 0.1
_EVALUATION = -1  # stands for the epoch where masks must not change


class PaddingCollator:
    """Pads `input_ids`, `labels` and `position_ids` on the right, labels with -100, and makes the attention mask.

    A token is padding by its position, never by its id: where the end of sequence pads, the ends that stand in the data are
    still learned. Without a padding id the batch's own first id pads. Packed rows (with `position_ids`) have no attention
    mask: transformers tells their examples apart by the positions, and the padding is an example of its own.
    """

    def __init__(self, pad_id: int | None):
        self.pad_id = pad_id

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        pad_id = rows[0]["input_ids"][0] if self.pad_id is None else self.pad_id
        batch = {"input_ids": _padded([row["input_ids"] for row in rows], pad_id)}
        if "position_ids" in rows[0]:
            batch["position_ids"] = _padded([row["position_ids"] for row in rows], None)
        else:
            batch["attention_mask"] = _padded([[1] * len(row["input_ids"]) for row in rows], 0)
        if "labels" in rows[0]:
            batch["labels"] = _padded([row["labels"] for row in rows], IGNORE_INDEX)
        return batch


class MaskingCollator(PaddingCollator):
    """Masks rows of token ids as BERT does, drawing random words from `words`, and pads them.

    transformers' collator draws from the whole tokenizer, where most ids have no row in a partial vocabulary; this one draws
    from the same ids with the full vocabulary, so that both trainings are one. What is masked depends on the seed, the epoch
    and the row's ids alone, neither on the batch nor on a generator's state: each epoch masks anew, and a resumed run goes on
    with the masks that the run without a break has. At least one token of each row is masked. Rows that have labels already
    (those to validate on) are only padded.

    Args:
        words: token ids to draw random words from.
        special_ids: token ids that are never masked.
        masked_ratio: share of the other tokens to predict, 0–1.
    """

    def __init__(
        self,
        pad_id: int | None,
        mask_id: int,
        words: NDArray[np.int64],
        special_ids: Sequence[int],
        *,
        masked_ratio: float = 0.15,
        seed: int = 0,
    ):
        super().__init__(pad_id)
        self.mask_id, self.words, self.special_ids = mask_id, np.asarray(words), np.asarray(special_ids)
        self.masked_ratio, self.seed = masked_ratio, seed
        self.epoch = 0

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return super().__call__([row if "labels" in row else self.mask(row, self.epoch) for row in rows])

    def mask(self, row: Mapping[str, Any], epoch: int = _EVALUATION) -> dict[str, Any]:
        """A row's ids with masks, and its labels: -100 but for the tokens to predict. By default masks to validate with."""
        ids = np.asarray(row["input_ids"], dtype=np.int64)
        chance = np.random.default_rng([self.seed, epoch + 1, zlib.crc32(ids.tobytes())])
        maskable = np.flatnonzero(~np.isin(ids, self.special_ids))
        draws = chance.random(len(maskable))
        chosen = maskable[(draws < self.masked_ratio) | (draws == draws.min(initial=1.0))]
        fate, words = chance.random(len(chosen)), self.words[chance.integers(len(self.words), size=len(chosen))]
        labels = np.full_like(ids, IGNORE_INDEX)
        labels[chosen] = ids[chosen]
        becomes_random = (fate >= MASK_RATIO) & (fate < MASK_RATIO + RANDOM_RATIO)
        ids = ids.copy()
        ids[chosen[fate < MASK_RATIO]] = self.mask_id
        ids[chosen[becomes_random]] = words[becomes_random]
        return {"input_ids": ids.tolist(), "labels": labels.tolist()}


class EpochCallback(TrainerCallback):
    """Tells a masking collator the epoch. Batches are collated in the process that trains, after this is called."""

    def __init__(self, collator: MaskingCollator):
        self.collator = collator

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A resumed run begins within an epoch: state.epoch is then a fraction."""
        self.collator.epoch = int((state.epoch or 0.0) + 1e-6)


def mask_to_validate(split: Any, collator: MaskingCollator) -> Any:
    """A data set of masked rows with labels, in memory: the same at every validation."""
    schema = pa.schema([(name, pa.list_(pa.int32())) for name in ("input_ids", "labels")])
    return in_memory(pa.Table.from_pylist([collator.mask(row) for row in split], schema))


def _padded(rows: Sequence[Sequence[int]], filler: int | None) -> Tensor:
    """[rows, longest]; a filler of None counts up from 0, as positions do."""
    width = max(len(row) for row in rows)
    tails = [range(width - len(row)) if filler is None else [filler] * (width - len(row)) for row in rows]
    return torch.tensor([[*row, *tail] for row, tail in zip(rows, tails, strict=True)], dtype=torch.long, device="cpu")
