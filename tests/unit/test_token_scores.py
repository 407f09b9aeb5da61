"""Loss, perplexity and accuracy over tokens, against the ten lines that define them."""

import math
from types import SimpleNamespace

import pytest
import torch
from texts import language_model

from leanvocab.finetune.scores import TokenScores, sums_by_example


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
