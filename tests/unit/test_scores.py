"""Scores, against their definitions; those over tokens against the ten lines that define them."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from texts import language_model

from leanvocab.finetune.scores import (
    TokenScores,
    classification_scores,
    regression_scores,
    sums_by_example,
    without_prefix,
)


def test_two_classes_are_scored_as_glue_does():
    labels = np.array([1, 1, 1, 0, 0, 1])
    predicted = np.array([1, 1, 0, 0, 1, 1])
    scores = classification_scores(np.eye(2)[predicted], labels)
    true_positives, false_positives, false_negatives, true_negatives = 3, 1, 1, 1
    assert scores["accuracy"] == pytest.approx(4 / 6)
    assert scores["f1"] == pytest.approx(2 * true_positives / (2 * true_positives + false_positives + false_negatives))
    numerator = true_positives * true_negatives - false_positives * false_negatives
    denominator = np.sqrt((3 + 1) * (3 + 1) * (1 + 1) * (1 + 1))
    assert scores["matthews"] == pytest.approx(numerator / denominator)


def test_more_classes_have_the_mean_f1():
    labels = np.array([0, 1, 2, 2])
    scores = classification_scores(np.eye(3)[[0, 1, 2, 1]], labels)
    assert scores["f1"] == pytest.approx(np.mean([1.0, 2 / 3, 2 / 3]))


def test_a_model_that_always_says_the_same_scores_zero_without_a_warning():
    assert classification_scores(np.array([[1.0, 0.0]] * 4), np.array([0, 1, 1, 0]))["matthews"] == 0.0
    assert regression_scores(np.zeros((4, 1)), np.arange(4.0)) == {"pearson": 0.0, "spearman": 0.0}


@pytest.mark.filterwarnings("ignore:A single label was found")
@pytest.mark.parametrize("seed", range(120))
def test_scores_of_classes_are_scikit_learns_bit_for_bit(seed):
    metrics = pytest.importorskip("sklearn.metrics")
    chance = np.random.default_rng(seed)
    num_classes, num_rows = int(chance.integers(2, 9)), int(chance.integers(1, 400))
    occurring = chance.integers(1, num_classes + 1)  # some classes do not occur, and some are never said
    labels = chance.integers(0, occurring, num_rows)
    logits = chance.normal(size=(num_rows, num_classes))
    logits[np.arange(num_rows), labels] += chance.uniform(0, 4)
    logits[:, int(chance.integers(num_classes))] -= 100 * int(chance.integers(2))
    predicted = logits.argmax(axis=-1)
    average = "binary" if num_classes == 2 else "macro"
    assert classification_scores(logits, labels) == {
        "accuracy": float(metrics.accuracy_score(labels, predicted)),
        "f1": float(metrics.f1_score(labels, predicted, average=average, zero_division=0.0)),
        "matthews": float(metrics.matthews_corrcoef(labels, predicted)),
    }


@pytest.mark.filterwarnings("ignore:An input array is constant")
@pytest.mark.parametrize("seed", range(120))
def test_correlations_are_scipys_to_the_last_digits(seed):
    stats = pytest.importorskip("scipy.stats")
    chance = np.random.default_rng(seed)
    num_rows, scale = int(chance.integers(2, 400)), 10.0 ** chance.integers(-200, 200)
    labels = chance.normal(size=num_rows) * scale
    predicted = (labels / scale * chance.uniform(-1, 1) + chance.normal(size=num_rows)).astype(np.float32)
    if seed % 3 == 0:  # many alike, as people rate
        labels, predicted = np.round(labels / scale), np.round(predicted)
        predicted[0], labels[-1] = predicted[0] + 1, labels[-1] + 1  # and not all
    scores = regression_scores(predicted[:, None], labels)
    wanted = (stats.pearsonr(predicted.astype(np.float64), labels), stats.spearmanr(predicted, labels))
    if np.ptp(predicted) and np.ptp(labels):
        assert list(scores.values()) == pytest.approx([each.statistic for each in wanted], rel=1e-12, abs=1e-14)


def test_what_is_no_number_has_no_correlation():
    scores = regression_scores(np.array([1.0, np.nan, 2.0]), np.array([1.0, 2.0, 3.0]))
    assert all(math.isnan(score) for score in scores.values())


def test_correlations_are_by_value_and_by_rank():
    labels = np.array([0.0, 1.0, 2.0, 4.0])
    scores = regression_scores(np.exp(labels)[:, None], labels)
    assert scores["spearman"] == pytest.approx(1.0)
    assert scores["pearson"] == pytest.approx(np.corrcoef(np.exp(labels), labels)[0, 1])
    assert scores["pearson"] < 0.95


def test_the_trainers_names_lose_their_prefix_and_its_timings():
    assert without_prefix({"eval_f1": 0.5, "eval_runtime": 3.0, "epoch": 1.0, "eval_loss": 2}) == {
        "f1": 0.5,
        "loss": 2.0,
    }


# --- scores over tokens -----------------------------------------------------------------------------------------------


def random_batch(num_rows=3, length=300, size=20):
    generator = torch.Generator().manual_seed(num_rows)
    logits = torch.randn(num_rows, length, size, generator=generator)
    labels = torch.randint(0, size, (num_rows, length), generator=generator)
    labels[torch.rand(num_rows, length, generator=generator) < 0.5] = -100
    labels[0, 100:] = -100
    return logits, labels


def naive(logits, labels, predicts_next):
    rows = []
    for scores, wanted in zip(logits.double(), labels, strict=True):
        if predicts_next:
            scores, wanted = scores[:-1], wanted[1:]
        scores, wanted = scores[wanted != -100], wanted[wanted != -100]
        chosen = scores.log_softmax(-1)[torch.arange(len(wanted)), wanted]
        rows.append([-chosen.sum().item(), (scores.argmax(-1) == wanted).sum().item(), len(wanted)])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("predicts_next", [False, True])
def test_sums_are_those_of_the_definition(predicts_next):
    logits, labels = random_batch()
    sums = sums_by_example(logits, labels, predicts_next=predicts_next)
    torch.testing.assert_close(sums, naive(logits, labels, predicts_next), rtol=1e-5, atol=1e-4)


def test_the_loss_of_one_batch_is_the_models_own():
    network = language_model("llama")
    ids = torch.randint(5, 300, (4, 9))
    given = network(input_ids=ids, labels=ids)
    scores = TokenScores()(SimpleNamespace(predictions=sums_by_example(given.logits, ids, predicts_next=True)))
    assert scores["token_loss"] == pytest.approx(given.loss.item(), rel=1e-5)


def test_batches_weigh_by_their_tokens_and_the_next_split_starts_anew():
    scores = TokenScores()
    first = SimpleNamespace(predictions=torch.tensor([[2.0, 1.0, 1.0], [10.0, 0.0, 2.0]], dtype=torch.float64))
    second = SimpleNamespace(predictions=torch.tensor([[0.0, 7.0, 7.0]], dtype=torch.float64))
    for _ in range(2):
        assert scores(first, compute_result=False) == {}
        assert scores(second, compute_result=True) == {
            "token_loss": 12.0 / 10, "perplexity": math.exp(12.0 / 10), "accuracy": 8 / 10
        }  # fmt: skip


def test_a_label_that_cannot_be_said_has_an_infinite_perplexity():
    logits = torch.zeros(1, 2, 5)
    logits[..., 3] = -torch.inf
    sums = sums_by_example(logits, torch.tensor([[1, 3]]), predicts_next=False)
    assert TokenScores()(SimpleNamespace(predictions=sums))["perplexity"] == math.inf
