"""Loss, perplexity and accuracy over tokens, from logits; never more than a few hundred tokens' logits at once."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from leanvocab.choices import IGNORE_INDEX

TOKEN_LOSS = "token_loss"
"""Name of the mean loss over tokens, beside the Trainer's own `loss`, which is a mean over batches."""

_TOKENS_AT_ONCE = 256  # 270 MB of fp32 logits over 262,144 tokens


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
        self._sums = torch.zeros(3, dtype=torch.float64)

    def __call__(self, evaluated: Any, compute_result: bool = True) -> dict[str, float]:
        """`evaluated.predictions` are the sums of a batch's examples."""
        self._sums += evaluated.predictions.sum(dim=0).cpu()
        if not compute_result:
            return {}
        (loss, right, num_tokens), self._sums = self._sums.tolist(), torch.zeros(3, dtype=torch.float64)
        mean = loss / num_tokens
        perplexity = math.exp(mean) if mean < math.log(torch.finfo(torch.float64).max) else math.inf
        return {TOKEN_LOSS: mean, "perplexity": perplexity, "accuracy": right / num_tokens}
