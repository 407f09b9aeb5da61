"""Scores of a validation, from what a model gives and labels: of classes, of numbers, of tokens.

They are scikit-learn's and SciPy's, in a few lines of numpy (docs/decisions/scores-in-numpy.md).
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from leanvocab.choices import IGNORE_INDEX

TOKEN_LOSS = "token_loss"
"""Name of the mean loss over tokens, beside the Trainer's own `loss`, which is a mean over batches."""

_TOKENS_AT_ONCE = 256  # 270 MB of fp32 logits over 262,144 tokens


def logits_of(given: Any) -> Any:
    """The logits of what a model gives; encoder-decoder models give hidden states beside them."""
    return given[0] if isinstance(given, tuple) else given


def classification_scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, F1 and Matthews correlation, each a ratio.

    Args:
        logits: [examples, classes]
        labels: [examples], class ids

    F1 is that of class 1 for two classes (as GLUE has it), and for more the mean over those that occur or were said.
    """
    predicted, num_classes = logits.argmax(axis=-1), logits.shape[-1]
    said, meant, right = (
        np.bincount(ids, minlength=num_classes).astype(np.float64)
        for ids in (predicted, labels, labels[predicted == labels])
    )
    f1 = 2 * right / np.maximum(said + meant, 1)
    return {
        "accuracy": float((predicted == labels).mean()),
        "f1": float(f1[1] if num_classes == 2 else f1[said + meant > 0].mean()),
        "matthews": _matthews(said, meant, right),
    }


def _matthews(said: np.ndarray, meant: np.ndarray, right: np.ndarray) -> float:
    """Matthews correlation of numbers by class: 0 where all were said to be of one class, or are."""
    num = said.sum()
    variances = (num**2 - said @ said) * (num**2 - meant @ meant)
    return float((right.sum() * num - said @ meant) / np.sqrt(variances)) if variances else 0.0


def regression_scores(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Pearson and Spearman correlation; that with a constant is 0. (The loss is the mean squared error.)

    Args:
        predicted: [examples] or [examples, 1]
        labels: [examples]
    """
    predicted = predicted.reshape(-1).astype(np.float64)
    labels = labels.reshape(-1).astype(np.float64)
    if len(labels) < 2 or np.ptp(predicted) == 0 or np.ptp(labels) == 0:
        return {"pearson": 0.0, "spearman": 0.0}
    return {"pearson": _pearson(predicted, labels), "spearman": _pearson(_ranks(predicted), _ranks(labels))}


def _pearson(first: np.ndarray, second: np.ndarray) -> float:
    """The correlation of numbers that are not all one; each is scaled before it is squared."""
    centred = [numbers - numbers.mean() for numbers in (first, second)]
    centred = [numbers / np.abs(numbers).max() for numbers in centred]
    one, other = (numbers / np.linalg.norm(numbers) for numbers in centred)
    return float(np.clip(one @ other, -1.0, 1.0))


def _ranks(numbers: np.ndarray) -> np.ndarray:
    """The rank of each number; equal ones share the mean of theirs, and a NaN leaves none."""
    if np.isnan(numbers).any():
        return np.full(len(numbers), np.nan)
    _, at, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    return np.asarray((counts.cumsum() - (counts - 1) / 2)[at])


def sums_by_example(logits: Tensor, labels: Tensor, *, predicts_next: bool) -> Tensor:
    """Of each example, float64 [examples, 3]: the sum of its tokens' losses, how many tokens were right, and their number.

    Args:
        logits: [examples, tokens, full size]
        labels: [examples, tokens], -100 for those that do not count.
        predicts_next: whether the logits at a position are for the label of the next one, as in causal language models.
    """
    if predicts_next:
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    sums = torch.zeros(len(labels), 3, dtype=torch.float64, device=labels.device)
    examples, positions = (labels != IGNORE_INDEX).nonzero(as_tuple=True)
    for chunk in torch.arange(len(examples), device=labels.device).split(_TOKENS_AT_ONCE):
        example, position = examples[chunk], positions[chunk]
        wanted = labels[example, position]
        # One softmax for both scores: logits that are made when looked at (a shrunk output layer's) are made once.
        chances = logits[example, position].float().log_softmax(dim=-1)
        losses = -chances.gather(1, wanted[:, None])[:, 0]
        right = chances.argmax(dim=-1) == wanted
        sums.index_add_(0, example, torch.stack([losses, right, torch.ones_like(losses)], dim=1).double())
    return sums


class TokenScores:
    """Adds up `sums_by_example` over the batches of a split, holding no prediction, and gives the scores after the last one.

    The loss is the mean over all tokens, not the mean of the means of batches, and the perplexity its exponential. The Trainer
    calls this with each batch (`batch_eval_metrics`).
    """

    def __init__(self) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64, device="cpu")

    def __call__(self, evaluated: Any, compute_result: bool = True) -> dict[str, float]:
        """`evaluated.predictions` are the sums of a batch's examples."""
        self._sums += evaluated.predictions.sum(dim=0).cpu()
        if not compute_result:
            return {}
        (loss, right, num_tokens), self._sums = self._sums.tolist(), torch.zeros(3, dtype=torch.float64, device="cpu")
        mean = loss / num_tokens
        perplexity = math.exp(mean) if mean < math.log(torch.finfo(torch.float64).max) else math.inf
        return {TOKEN_LOSS: mean, "perplexity": perplexity, "accuracy": right / num_tokens}


def without_prefix(scores: Mapping[str, Any], prefix: str = "eval_") -> dict[str, float]:
    """The Trainer's `eval_f1` as `f1`; its timings are left out. Its mean of batches' losses gives way to that over tokens."""
    timings = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    named = {name.removeprefix(prefix): value for name, value in scores.items() if name.startswith(prefix)}
    plain = {name: float(value) for name, value in named.items() if name not in timings}
    if TOKEN_LOSS in plain:
        plain["loss"] = plain.pop(TOKEN_LOSS)
    return plain
