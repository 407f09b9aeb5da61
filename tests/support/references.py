"""The full model beside a partial output layer: what it computes where rows are frozen or scores restricted."""

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import FULL_SIZE, small_lm
from torch import Tensor, nn

from leanvocab.model.shrink import merge_, shrink_
from leanvocab.model.status import status
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

LANGUAGE_MODELS = (
    "llama-tied", "llama-untied", "gemma2-softcap", "cohere-scale", "granite-scaling", "phi-bias", "bert-tied", "bart-tied",
    "t5-tied",
)  # fmt: skip
# Marks of tests that restrict scores, and that generate: ids that come out are seldom all kept ones.
QUIET = [
    pytest.mark.filterwarnings("ignore:.*which is another objective:leanvocab.errors.LeanVocabWarning"),
    pytest.mark.filterwarnings("ignore:.*are served from the base:leanvocab.errors.LeanVocabWarning"),
]
KEPT = np.sort(np.random.default_rng(0).choice(np.arange(3, FULL_SIZE), 60, replace=False))


def lm_vocabulary() -> PartialVocabulary:
    """60 ids, and those that the models insert."""
    return PartialVocabulary(sorted({0, 1, 2, *KEPT.tolist()}), FULL_SIZE)


def lm_batch(step: int = 0, *, ids: Any = KEPT) -> dict[str, Tensor]:
    """Three rows of kept ids; the first labels are ignored."""
    generator = torch.Generator().manual_seed(100 + step)
    chosen = torch.as_tensor(np.asarray(ids))
    input_ids = chosen[torch.randint(0, len(chosen), (3, 10), generator=generator)]
    labels = chosen[torch.randint(0, len(chosen), (3, 10), generator=generator)]
    labels[0, :4] = -100
    return {"input_ids": input_ids, "labels": labels}


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """The vocabulary matrices of a full model."""
    found = {id(p): p for p in model.parameters() if p.ndim == 2 and p.shape[0] == FULL_SIZE}
    return list(found.values())


def mask_gradients(model: nn.Module, vocabulary: PartialVocabulary, of: Iterable[nn.Parameter] | None = None) -> None:
    """Frozen rows in the full model: no gradient for rows outside the vocabulary."""
    outside = torch.ones(FULL_SIZE, dtype=torch.bool)
    outside[torch.tensor(vocabulary.token_ids)] = False
    for matrix in matrices(model) if of is None else of:
        if matrix.grad is not None:
            matrix.grad[outside] = 0


def masked_run(
    model: Any, inputs: dict[str, Tensor], of: PartialVocabulary | None, make: Any, steps: int
) -> tuple[list[float], torch.optim.Optimizer]:
    """Losses of a plain loop, and its optimizer, which `make` makes of the parameters that train.

    With `of`, for the full model, no other row of its tables gets a gradient.
    """
    model.train()
    torch.manual_seed(0)  # of dropout
    optimizer, losses = make([each for each in model.parameters() if each.requires_grad]), []
    for _ in range(steps):
        loss = model(**inputs).loss
        loss.backward()
        if of is not None:
            mask_gradients(model, of)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().item())
    return losses, optimizer


def restrict(model: Any, vocabulary: PartialVocabulary) -> None:
    """The restricted objective in the full model: −inf for the scores of ids outside the vocabulary."""
    barred = torch.full((FULL_SIZE,), -torch.inf)
    barred[torch.tensor(vocabulary.token_ids)] = 0
    if getattr(model.config, "final_logit_softcapping", None):  # which would make −inf finite: after it, then
        loss = model.loss_function
        model.loss_function = lambda logits, *args, **kwargs: loss(logits + barred.to(logits), *args, **kwargs)
        return
    model.get_output_embeddings().register_forward_hook(lambda module, args, logits: logits + barred.to(logits))


def reference(model: nn.Module, output: str, vocabulary: PartialVocabulary) -> nn.Module:
    """The full model with the objective of an output mode."""
    full = copy.deepcopy(model)
    if output == "restricted":
        restrict(full, vocabulary)
    return full


def gradients(model: nn.Module, vocabulary: PartialVocabulary) -> dict[str, Tensor]:
    """Gradients by name, those of vocabulary matrices on the kept rows alone."""
    kept = torch.tensor(vocabulary.token_ids)
    full = {id(matrix) for matrix in matrices(model)}
    return {
        name: parameter.grad[kept] if id(parameter) in full else parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def check_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """By norm, tensor for tensor; tensors that are zero but for rounding are compared with the largest one."""
    assert found.keys() == expected.keys()
    largest = max(float(value.detach().float().norm()) for value in expected.values())
    for name, value in expected.items():
        error = float((found[name].detach().float() - value.detach().float()).norm())
        assert error <= tolerance * max(float(value.detach().float().norm()), 0.1 * largest), (name, error)


def check_twenty_steps(name: str, output: Any, device: str = "cpu", **options: Any) -> None:
    """Twenty steps of SGD: the losses and gradients of the full model with the other rows' gradients masked."""
    vocabulary = lm_vocabulary()
    base = small_lm(name).to(device)
    full, lean = reference(base, output, vocabulary), copy.deepcopy(base)
    shrink_(lean, vocabulary, output=output, **options)
    assert status(lean).output == output
    steppers = [torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9) for model in (full, lean)]
    for step in range(20):
        losses = []
        for model, optimizer in zip((full, lean), steppers, strict=True):
            optimizer.zero_grad()
            loss = model(**{key: value.to(device) for key, value in lm_batch(step).items()}).loss
            loss.backward()
            losses.append(loss.item())
        mask_gradients(full, vocabulary)
        assert abs(losses[1] - losses[0]) <= 1e-5 * abs(losses[0])
        check_close(gradients(lean, vocabulary), gradients(full, vocabulary), 1e-5)
        for optimizer in steppers:
            optimizer.step()
    merge_(lean)
    check_close(dict(lean.named_parameters()), dict(full.named_parameters()), 1e-5)
    assert_unused_rows_are_the_bases(lean, base, vocabulary)


def assert_unused_rows_are_the_bases(lean: nn.Module, base: nn.Module, vocabulary: Any) -> None:
    outside = torch.ones(len(matrices(base)[0]), dtype=torch.bool)
    outside[torch.tensor(vocabulary.token_ids)] = False
    for first, second in zip(matrices(lean), matrices(base), strict=True):
        assert torch.equal(first[outside], second[outside])


def token_loss(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """The next-token loss as hand-written loops have it."""
    return F.cross_entropy(logits[:, :-1].reshape(-1, FULL_SIZE), labels[:, 1:].reshape(-1), **options)
