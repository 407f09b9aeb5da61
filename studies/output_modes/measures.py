"""Measures of an ordinary model with its whole vocabulary: the base, or a fine-tuned model after merging."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import leanvocab as lv


@torch.no_grad()
def evaluate(
    model: Any, rows: Tensor, vocabularies: Mapping[str, lv.PartialVocabulary], batch_size: int
) -> dict[str, dict[str, float | None]]:
    """Measures on held-out token ids [n, length], by the name of the vocabulary that says which rows are outside.

    Means over predicted positions, in fp64 over fp32 logits:
        perplexity: over all labels. inside_perplexity, outside_perplexity: over labels in and outside the vocabulary.
        restricted_perplexity: over labels inside, with a softmax over the kept rows alone.
        outside_mass: probability of ids outside the vocabulary. outside_mass_where_kept: where the label is inside.
        outside_top_ratio: how often the most probable id is outside. outside_label_ratio: how often the label is.
    """
    model.eval()
    sums = {name: _Sums(torch.from_numpy(vocabulary.token_ids.copy())) for name, vocabulary in vocabularies.items()}
    for batch in rows.split(batch_size):
        scores = model(input_ids=batch).logits[:, :-1].float().flatten(0, 1).log_softmax(-1)
        labels = batch[:, 1:].flatten()
        for each in sums.values():
            each.add(scores, labels)
    return {name: each.means() for name, each in sums.items()}


class _Sums:
    """Sums over positions, for one vocabulary."""

    def __init__(self, token_ids: Tensor):
        self._token_ids = token_ids
        self._columns: dict[str, list[Tensor]] = {}

    def add(self, scores: Tensor, labels: Tensor) -> None:
        """Log probabilities [n, full_size] and labels [n]."""
        is_kept = torch.zeros(scores.shape[-1], dtype=torch.bool).index_fill(0, self._token_ids, True)
        found = {
            "loss": -scores.gather(1, labels[:, None])[:, 0],
            "is_inside": is_kept[labels],
            "outside_mass": scores[:, ~is_kept].exp().sum(-1),
            "kept_lse": scores.index_select(1, self._token_ids).logsumexp(-1),
            "is_top_outside": ~is_kept[scores.argmax(-1)],
        }
        for name, values in found.items():
            self._columns.setdefault(name, []).append(values.double())

    def means(self) -> dict[str, float | None]:
        column = {name: torch.cat(parts) for name, parts in self._columns.items()}
        loss, is_inside = column["loss"], column["is_inside"].bool()
        return {
            "num_labels": float(len(loss)),
            "outside_label_ratio": _mean(1 - column["is_inside"]),
            "perplexity": _perplexity(loss),
            "inside_perplexity": _perplexity(loss[is_inside]),
            "outside_perplexity": _perplexity(loss[~is_inside]),
            "restricted_perplexity": _perplexity((loss + column["kept_lse"])[is_inside]),
            "outside_mass": _mean(column["outside_mass"]),
            "outside_mass_where_kept": _mean(column["outside_mass"][is_inside]),
            "outside_top_ratio": _mean(column["is_top_outside"]),
        }


def _mean(values: Tensor) -> float | None:
    return float(values.mean()) if len(values) else None


def _perplexity(losses: Tensor) -> float | None:
    return math.exp(float(losses.mean())) if len(losses) else None


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, prompts: Sequence[str], vocabularies: Mapping[str, lv.PartialVocabulary], num_new: int
) -> list[dict[str, Any]]:
    """Greedy continuations, and how many of their tokens are outside each vocabulary."""
    model.eval()
    made = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=num_new,
            pad_token_id=tokenizer.pad_token_id,
        )
        new = out[0, ids.shape[1] :].tolist()
        outside = {name: len(ids_outside(new, vocabulary)) for name, vocabulary in vocabularies.items()}
        made.append({"prompt": prompt, "text": tokenizer.decode(new), "num_tokens": len(new), "num_outside": outside})
    return made


def ids_outside(ids: Sequence[int], vocabulary: lv.PartialVocabulary) -> list[int]:
    """The ids that a vocabulary lacks, in their order, repetitions included."""
    kept = set(vocabulary.token_ids.tolist())
    return [token_id for token_id in ids if token_id not in kept]


@torch.no_grad()
def drift(
    model: Any, base: Mapping[str, Tensor], vocabularies: Mapping[str, lv.PartialVocabulary]
) -> dict[str, dict[str, float]]:
    """Distance that weights moved from the base's, by the name of the vocabulary: ‖after − before‖ / ‖before‖ (Frobenius).

    kept: rows of the output matrix that are in the vocabulary. outside: its other rows. body: all other weights.
    `mean_kept_norm_ratio` is the mean row norm of the kept rows, after over before.
    """
    after = model.get_output_embeddings().weight
    name = next(name for name, parameter in model.named_parameters() if parameter is after)
    before = base[name]
    body = _ratio((parameter, base[other]) for other, parameter in model.named_parameters() if other != name)
    found = {}
    for which, vocabulary in vocabularies.items():
        ids = torch.from_numpy(vocabulary.token_ids.copy())
        others = torch.ones(len(before), dtype=torch.bool).index_fill(0, ids, False)
        found[which] = {
            "kept_drift_ratio": _ratio([(after[ids], before[ids])]),
            "outside_drift_ratio": _ratio([(after[others], before[others])]),
            "body_drift_ratio": body,
            "mean_kept_norm_ratio": float(after[ids].norm(dim=1).mean() / before[ids].norm(dim=1).mean()),
        }
    return found


def _ratio(pairs: "Iterator[tuple[Tensor, Tensor]] | list[tuple[Tensor, Tensor]]") -> float:
    moved = size = 0.0
    for after, before in pairs:
        moved += float((after - before).double().square().sum())
        size += float(before.double().square().sum())
    return math.sqrt(moved / size) if size else 0.0
