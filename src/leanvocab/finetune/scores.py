"""Scores of a classification or regression, from predictions and labels. No torch."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from leanvocab.extras import require

if TYPE_CHECKING:
    import scipy.stats as stats
    import sklearn.metrics as metrics
else:
    stats = require("scipy.stats", extra="finetune")
    metrics = require("sklearn.metrics", extra="finetune")


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


def without_prefix(scores: Mapping[str, Any], prefix: str = "eval_") -> dict[str, float]:
    """The Trainer's `eval_f1` as `f1`; its timings are left out."""
    timings = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    named = {name.removeprefix(prefix): value for name, value in scores.items() if name.startswith(prefix)}
    return {name: float(value) for name, value in named.items() if name not in timings}
