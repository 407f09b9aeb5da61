"""Frozen rows that are left out of the hidden states' gradient: what changes by it and by how much, and what does not."""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import accelerator
import pytest
import torch
import torch.nn.functional as F
from models import small_lm
from references import lm_batch, lm_vocabulary
from torch import Tensor, nn

from leanvocab.errors import AlreadyShrunkError, ModelError
from leanvocab.model.shrink import merge_, shrink_
from leanvocab.model.status import check_shrunk_as, status
from leanvocab.output.frozen_rows import FrozenRows
from leanvocab.output.loss import tokens_at_once
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

ROWS, DIM, EPS = 300, 16, 1e-3
KEPT = PartialVocabulary(range(0, ROWS, 7), ROWS)
FROZEN = [row for row in range(ROWS) if row not in KEPT]


class Head(nn.Module):
    """An output layer tied to an input table, whose softmax is on few of its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.output = nn.Embedding(ROWS, DIM), nn.Linear(DIM, ROWS, bias=False)
        self.output.weight = self.embedding.weight


def heads(**options: Any) -> tuple[Any, Any]:
    """A full one, and one of the same rows that is shrunk."""
    torch.manual_seed(0)
    full = Head()
    return full, shrink_(copy.deepcopy(full), KEPT, output="frozen", **options)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Hidden states, and labels of which the last is that of a frozen row."""
    generator = torch.Generator().manual_seed(1)
    hidden = (3 * torch.randn(12, DIM, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(0, len(KEPT), (12,), generator=generator) * 7
    labels[-1] = 1
    return hidden, labels


def scores_gradient(full: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    """Softmax less one-hot."""
    probabilities = torch.softmax(hidden.detach() @ full.output.weight.detach().T, -1)
    return probabilities - F.one_hot(labels, ROWS)


def left_out(gradient: Tensor, eps: float = EPS) -> Tensor:
    """The specification: frozen rows whose scores have a smaller gradient than eps for every token."""
    is_left_out = (gradient.abs() < eps).all(0)
    is_left_out[torch.tensor(KEPT.token_ids)] = False
    return is_left_out


@pytest.fixture(params=["mapped", "compact"])
def _held(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the store where they lie, and a copy of the frozen ones as on other devices."""
    monkeypatch.setattr(FrozenRows, "mapped_on", frozenset({"cpu"} if request.param == "mapped" else ()))


@pytest.mark.usefixtures("_held")
def test_the_gradient_is_that_of_the_rows_that_are_not_left_out_and_within_the_bound() -> None:
    (full, lean), (hidden, labels) = heads(filter_eps=EPS), inputs()
    F.cross_entropy(lean.output(hidden), labels, reduction="sum").backward()
    gradient = scores_gradient(full, hidden, labels)
    rows, is_left_out = full.output.weight.detach(), left_out(gradient)
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad, gradient.masked_fill(is_left_out, 0) @ rows)
    difference = (hidden.grad - gradient @ rows).abs()
    assert difference.amax() > 1e-5  # it is not exact
    assert (difference <= EPS * rows[is_left_out].abs().sum(0) + 1e-6).all()


@pytest.mark.usefixtures("_held")
def test_rows_that_are_left_out_are_not_multiplied_and_are_counted() -> None:
    (full, lean), (hidden, labels) = heads(filter_eps=EPS), inputs()
    F.cross_entropy(lean.output(hidden), labels).backward()
    num_left_out = int(left_out(scores_gradient(full, hidden, labels)).sum())
    found = lean.output.frozen_rows.filter
    assert len(FROZEN) / 2 < num_left_out < len(FROZEN)
    assert (found.num_chunks, found.num_multiplied) == (1, len(FROZEN) - num_left_out)
    assert found.skipped_share == pytest.approx(num_left_out / len(FROZEN))


@pytest.mark.usefixtures("_held", "few_scores_at_once")
def test_each_chunk_of_tokens_has_rows_of_its_own_that_are_left_out() -> None:
    (full, lean), (hidden, labels) = heads(filter_eps=EPS), inputs()
    F.cross_entropy(lean.output(hidden), labels, reduction="sum").backward()
    step = tokens_at_once(hidden.device, 4, ROWS)
    assert lean.output.frozen_rows.filter.num_chunks == -(-len(labels) // step) > 1
    gradient, rows = scores_gradient(full, hidden, labels), full.output.weight.detach()
    expected = [part.masked_fill(left_out(part), 0) @ rows for part in gradient.split(step)]
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad, torch.cat(expected))


@pytest.mark.usefixtures("_held")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_and_the_gradient_of_the_kept_rows_in_it_are_the_same_bits(dtype: torch.dtype) -> None:
    (_, exact), (_, filtered) = heads(), heads(filter_eps=EPS)
    found = []
    for model in (exact.to(dtype), filtered.to(dtype)):
        hidden, labels = inputs(dtype)
        loss = F.cross_entropy(model.output(hidden), labels)
        loss.backward()
        found.append((loss.detach(), model.output.weight.grad, hidden.grad))
    assert filtered.output.frozen_rows.filter.skipped_share > 0.5
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][2], found[1][2])


@pytest.mark.parametrize("factor", [1.0, 1024.0])
def test_a_loss_that_is_scaled_leaves_the_same_rows_out(factor: float) -> None:
    """Whose gradient is computed in the backward, of the scaled loss: single losses, and all losses in fp16."""
    (full, lean), (hidden, labels) = heads(filter_eps=EPS), inputs()
    (F.cross_entropy(lean.output(hidden), labels, reduction="none") * factor).sum().backward()
    gradient = scores_gradient(full, hidden, labels)
    expected = gradient.masked_fill(left_out(gradient), 0) @ full.output.weight.detach()
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad / factor, expected)


@pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 2.0**-28), (torch.bfloat16, 2.0**-12)])
def test_auto_is_below_the_precision_of_the_dtype(dtype: torch.dtype, eps: float) -> None:
    (full, lean), (hidden, labels) = heads(filter_eps="auto"), inputs(dtype)
    F.cross_entropy(lean.to(dtype).output(hidden), labels).backward()
    full = full.to(dtype).float()
    num_left_out = int(left_out(scores_gradient(full, hidden.float(), labels), eps).sum())
    expected = len(FROZEN) - num_left_out if num_left_out > len(FROZEN) / 2 else len(FROZEN)
    assert lean.output.frozen_rows.filter.num_multiplied == pytest.approx(expected, abs=2)  # bf16's scores are rounded


def test_where_more_than_half_of_the_rows_count_all_are_multiplied_exactly() -> None:
    (_, exact), (_, filtered) = heads(), heads(filter_eps=1e-30)
    found = []
    for model in (exact, filtered):
        hidden, labels = inputs()
        F.cross_entropy(model.output(hidden), labels).backward()
        found.append(hidden.grad)
    assert filtered.output.frozen_rows.filter.skipped_share == 0
    assert torch.equal(*found)


def test_what_is_no_number_is_not_left_out() -> None:
    (_, lean), (hidden, labels) = heads(filter_eps=0.5), inputs()
    spoilt = hidden.detach().clone()
    spoilt[3, 0] = torch.nan
    spoilt.requires_grad_()
    F.cross_entropy(lean.output(spoilt), labels).backward()
    assert spoilt.grad is not None
    assert spoilt.grad[3].isnan().all()


def test_logits_that_somebody_looks_at_have_their_whole_gradient() -> None:
    (_, exact), (_, filtered) = heads(), heads(filter_eps=0.5)
    found = []
    for model in (exact, filtered):
        hidden, _ = inputs()
        model.output(hidden).softmax(-1).square().sum().backward()
        found.append(hidden.grad)
    assert torch.equal(*found)


def test_on_a_device_the_host_waits_once_for_a_chunk() -> None:
    if not accelerator.can_be_emulated():
        pytest.skip("torch can emulate a device from 2.13 on")
    with _emulated() as device:
        model: Any = shrink_(small_lm("llama-tied").to(device).train(), lm_vocabulary(), filter_eps=EPS)
        batch = {name: value.to(device) for name, value in lm_batch().items()}
        model(**batch).loss.backward()
        with accelerator.watch() as seen:
            model(**batch).loss.backward()
        chosen = model.lm_head.frozen_rows.filter
        assert (len(seen.waits), chosen.num_chunks) == (1, 2)


@contextmanager
def _emulated() -> Iterator[str]:
    with accelerator.in_use():
        yield accelerator.NAME


# --- the option -------------------------------------------------------------------------------------------------------


def test_by_default_every_row_counts_and_nothing_asks() -> None:
    assert inspect.signature(shrink_).parameters["filter_eps"].default is None
    _, lean = heads()
    hidden, labels = inputs()
    F.cross_entropy(lean.output(hidden), labels).backward()
    assert lean.output.frozen_rows.filter is None
    assert status(lean).tables[0].filter_eps is None


def test_the_docstring_says_that_it_is_not_exact_and_what_changes() -> None:
    text = " ".join((inspect.getdoc(shrink_) or "").split())
    assert (
        "filter_eps: not exact where it is given. Frozen rows are left out of the gradient of the hidden states" in text
    )
    assert "Neither the loss nor the gradient of the kept rows in it changes" in text


@pytest.mark.parametrize("value", [0, 1, -1e-3, float("nan"), True, "high", [1e-3]])
def test_a_threshold_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(ModelError, match=r"filter_eps=.*: expected None, 'auto' or a number between 0 and 1"):
        shrink_(small_lm("llama-tied"), lm_vocabulary(), filter_eps=value)


def test_rows_that_are_streamed_are_not_filtered() -> None:
    with pytest.raises(ModelError, match=r"filter_eps='auto' with frozen_rows='host': rows .* leave one of them out"):
        shrink_(small_lm("llama-tied"), lm_vocabulary(), filter_eps="auto", frozen_rows="host")


@pytest.mark.parametrize(
    ("name", "output"), [("llama-untied", None), ("llama-untied", "full"), ("llama-tied", "restricted")]
)
def test_a_model_without_frozen_rows_has_none_to_leave_out(name: str, output: Any) -> None:
    model = small_lm(name)
    with pytest.raises(ModelError, match=r'leaves frozen rows out of a gradient, and no .* with output="frozen"'):
        shrink_(model, lm_vocabulary(), output=output, filter_eps="auto")
    assert not status(model)


def test_the_status_of_a_model_says_it_and_another_threshold_is_another_way() -> None:
    model = shrink_(small_lm("llama-tied"), lm_vocabulary(), filter_eps="auto")
    assert [table.filter_eps for table in status(model).tables] == ["auto"]
    check_shrunk_as(model, None, {"filter_eps": "auto"})
    with pytest.raises(AlreadyShrunkError, match=r"it has filter_eps='auto', asked for 0.25"):
        check_shrunk_as(model, None, {"filter_eps": 0.25})
    merge_(model)
