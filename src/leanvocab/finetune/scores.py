"""Scores of a validation, from what a model gives and labels: of classes, of numbers, of tokens."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from leanvocab.choices import IGNORE_INDEX
from leanvocab.extras import require

stats = require("scipy.stats", extra="finetune")
metrics = require("sklearn.metrics", extra="finetune")

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

    F1 is that of class 1 for two classes (as GLUE has it), and the mean over classes for more.
    """
    predicted = logits.argmax(axis=-1)
    average = "binary" if logits.shape[-1] == 2 else "macro"
    return {
        "accuracy": float((predicted == labels).mean()),
        "f1": float(metrics.f1_score(labels, predicted, average=average, zero_division=0.0)),
        "matthews": float(metrics.matthews_corrcoef(labels, predicted)),
    }


def regression_scores(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Pearson and Spearman correlation; that with a constant is 0. (The loss is the mean squared error.)

    Args:
        predicted: [examples] or [examples, 1]
        labels: [examples]
    """
    predicted = predicted.reshape(-1).astype(np.float64)
    labels = labels.reshape(-1).astype(np.float64)
    constant = len(labels) < 2 or np.ptp(predicted) == 0 or np.ptp(labels) == 0
    return {
        "pearson": 0.0 if constant else float(stats.pearsonr(predicted, labels).statistic),
        "spearman": 0.0 if constant else float(stats.spearmanr(predicted, labels).statistic),
    }


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
