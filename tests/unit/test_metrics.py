"""Scores, against their definitions."""

import numpy as np
import pytest

from leanvocab.finetune.scores import classification_scores, regression_scores, without_prefix


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
