"""Logits that are not there until somebody looks: whatever is done to them, as the full model's logits."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import FULL_SIZE, small_lm
from references import lm_batch, lm_vocabulary, token_loss
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from leanvocab.errors import BypassError, ModelError
from leanvocab.model.shrink import shrink_
from leanvocab.output import loss as output_loss
from leanvocab.output.lazy_logits import LazyLogits
from leanvocab.output.logit_operations import Elementwise
from leanvocab.output.loss import LossOptions


@pytest.fixture(autouse=True)
def _few_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(output_loss.CHUNK_BYTES, "cpu", 7 * 4 * FULL_SIZE)


class Head(nn.Module):
    """An input table and an output layer, and nothing between them."""

    def __init__(self, bias: bool = True):
        super().__init__()
        self.table = nn.Embedding(FULL_SIZE, 8)
        self.head = nn.Linear(8, FULL_SIZE, bias=bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)  # type: ignore[no-any-return]


def heads(bias: bool = True, **options: Any) -> tuple[Head, Head]:
    """The full one, and a frozen one."""
    torch.manual_seed(0)
    full = Head(bias)
    return full, shrink_(copy.deepcopy(full), lm_vocabulary(), **{"output": "frozen"} | options)


def hidden_states(*shape: int) -> Tensor:
    return torch.randn(*shape, 8, generator=torch.Generator().manual_seed(3), requires_grad=True)


def results(model: Head, function: Callable[[Tensor], Any], *shape: int) -> tuple[Any, Tensor | None]:
    """What a function of the logits gives, and the gradient of its sum for the hidden states."""
    hidden = hidden_states(*(shape or (2, 9)))
    result = function(model(hidden))
    if isinstance(result, Tensor) and result.requires_grad:
        result.float().sum().backward()
    return result, hidden.grad


@pytest.mark.parametrize(
    "function",
    [
        lambda logits: logits.float().mul(0.5) / 3,
        lambda logits: torch.tanh(logits / 2) * 2,
        lambda logits: 2 - logits[..., :-1, :].contiguous().view(-1, FULL_SIZE),
        lambda logits: logits + torch.arange(FULL_SIZE),
        lambda logits: logits.clone().mul_(torch.linspace(0, 1, FULL_SIZE)),
        lambda logits: logits[:, -1, :],
        lambda logits: logits[:, -1],
        lambda logits: logits[..., 5],
        lambda logits: logits[0],
        lambda logits: logits[torch.tensor([[True] * 9, [False] * 9])],
        lambda logits: logits[:, :, 3:7],
        lambda logits: logits[None].flatten(0, 1),
        lambda logits: logits.flatten(0, 1),
        lambda logits: logits.flatten(),
        lambda logits: logits.reshape(-1, 2, 3, FULL_SIZE),
        lambda logits: logits.view(18, -1),
        lambda logits: logits.transpose(1, 2),
        lambda logits: logits.log_softmax(-1),
        lambda logits: torch.softmax(logits, dim=-1, dtype=torch.float64),
        lambda logits: logits.max(-1).values,
        lambda logits: torch.cat([logits, logits], 1),
        lambda logits: torch.stack([logits[0], logits[1]]),
        lambda logits: logits.logsumexp(-1),
        lambda logits: logits @ torch.ones(FULL_SIZE, 2),
        lambda logits: torch.where(logits > 0, logits, 0),
        lambda logits: F.kl_div(logits.log_softmax(-1), torch.full((2, 9, FULL_SIZE), 1 / FULL_SIZE), reduction="sum"),
        lambda logits: logits.to(torch.float64),
        lambda logits: logits.to("cpu"),
        lambda logits: logits.masked_fill(torch.arange(FULL_SIZE) < 5, -1.0),
        lambda logits: logits.gather(2, torch.zeros(2, 9, 1, dtype=torch.int64)),
        lambda logits: F.cross_entropy(logits.transpose(1, 2), torch.ones(2, 9, dtype=torch.int64)),
        lambda logits: F.cross_entropy(logits.view(-1, FULL_SIZE), torch.softmax(torch.ones(18, FULL_SIZE), -1)),
        lambda logits: F.cross_entropy(logits.view(-1, FULL_SIZE), torch.arange(18), weight=torch.ones(FULL_SIZE)),
    ],
)  # fmt: skip
def test_whatever_is_done_to_the_logits_gives_what_the_full_models_give(function: Callable[[Tensor], Any]) -> None:
    full, lean = heads()
    (expected, gradient), (found, lean_gradient) = results(full, function), results(lean, function)
    torch.testing.assert_close(found.detach().clone(), expected.detach(), rtol=1e-5, atol=1e-5)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(lean_gradient, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("frozen_rows", ["device", "host"])
def test_the_cross_entropy_has_every_option_of_torchs(reduction: str, smoothing: float, frozen_rows: str) -> None:
    full, lean = heads(frozen_rows=frozen_rows)
    labels = torch.arange(18) * 16  # of kept rows and of others
    labels[2:5] = -7
    upstream = torch.linspace(1, 2, 18) if reduction == "none" else torch.tensor(3.0)

    def loss(logits: Tensor) -> Tensor:
        options: Any = {"ignore_index": -7, "reduction": reduction, "label_smoothing": smoothing}
        return F.cross_entropy(torch.tanh(logits).view(-1, FULL_SIZE), labels, **options) * upstream

    (expected, gradient), (found, lean_gradient) = results(full, loss), results(lean, loss)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lean_gradient, gradient, rtol=1e-4, atol=1e-6)
    kept = torch.tensor(lm_vocabulary().token_ids)
    assert full.head.weight.grad is not None
    assert full.head.bias.grad is not None
    torch.testing.assert_close(lean.head.weight.grad, full.head.weight.grad[kept], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(lean.head.bias.grad, full.head.bias.grad, rtol=1e-4, atol=1e-6)


def test_a_batch_whose_labels_are_all_ignored_has_the_loss_that_torch_gives() -> None:
    for model in heads():
        labels = torch.full((18,), -100)
        logits = model(hidden_states(2, 9)).view(-1, FULL_SIZE)
        assert F.cross_entropy(logits, labels).isnan()
        assert F.cross_entropy(logits, labels, reduction="sum") == 0


def test_labels_that_are_no_ids_are_an_error_as_they_are_for_torch() -> None:
    for model in heads():
        logits = model(hidden_states(2, 9)).view(-1, FULL_SIZE)
        with pytest.raises(IndexError):
            F.cross_entropy(logits, torch.full((18,), FULL_SIZE))


def test_one_token_without_a_batch_has_a_loss() -> None:
    full, lean = heads()
    losses = [F.cross_entropy(model(hidden_states()), torch.tensor(5)) for model in (full, lean)]
    torch.testing.assert_close(*losses)


def test_writing_to_the_logits_changes_what_the_loss_sees() -> None:
    def loss(logits: Tensor) -> Tensor:
        logits[..., 7] = torch.finfo(logits.dtype).min
        logits += 1
        logits *= torch.linspace(0, 1, FULL_SIZE)
        return F.cross_entropy(logits.view(-1, FULL_SIZE), torch.arange(18))

    (expected, gradient), (found, lean_gradient) = (results(model, loss) for model in heads())
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(lean_gradient, gradient)


def _views_first(logits: Tensor) -> Tensor:
    flat, shifted = logits.view(-1, FULL_SIZE), logits[:, :-1]
    logits *= 2
    return torch.cat([flat, shifted.reshape(-1, FULL_SIZE), logits.view(-1, FULL_SIZE)])


def _base_after(logits: Tensor) -> Tensor:
    logits.view(-1, FULL_SIZE)[3:5].div_(3)
    return logits.flatten(0, 1)


def _siblings(logits: Tensor) -> Tensor:
    first, second = logits.view(-1, FULL_SIZE), logits.reshape(18, FULL_SIZE)
    del logits
    first[2, 7] = 5.0
    return second * first


@pytest.mark.parametrize("function", [_views_first, _base_after, _siblings])
def test_writing_shows_in_every_view_as_it_does_in_a_tensor(function: Callable[[Tensor], Any]) -> None:
    full, lean = heads()
    (expected, gradient), (found, lean_gradient) = results(full, function), results(lean, function)
    torch.testing.assert_close(found.detach().clone(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lean_gradient, gradient, rtol=1e-4, atol=1e-5)


def test_writing_where_nobody_else_looks_makes_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    _, lean = heads()
    monkeypatch.setattr(LazyLogits, "compute", None)
    logits = lean(hidden_states(2, 9))[:, :-1]
    logits /= 2
    logits = logits.reshape(-1, FULL_SIZE)
    logits += torch.ones(FULL_SIZE, dtype=torch.float64)
    assert logits.dtype == torch.float32
    assert F.cross_entropy(logits, torch.arange(16)).dtype == torch.float32


def test_what_is_written_over_keeps_its_dtype() -> None:
    losses = []
    for model in heads():
        logits = model.bfloat16()(hidden_states(2, 9).bfloat16()).view(-1, FULL_SIZE)
        logits += torch.arange(FULL_SIZE)
        losses.append(F.cross_entropy(logits, torch.arange(18)))
    assert losses[0].dtype == losses[1].dtype == torch.bfloat16
    torch.testing.assert_close(*losses, rtol=2e-2, atol=1e-2)


def test_what_asks_about_the_logits_does_not_make_them(monkeypatch: pytest.MonkeyPatch) -> None:
    _, lean = heads()
    monkeypatch.setattr(LazyLogits, "compute", None)
    hidden = hidden_states(2, 9)
    logits, device = lean(hidden), hidden.device
    assert isinstance(logits, Tensor)
    assert (logits.shape, logits.size(-1), logits.ndim, len(logits)) == ((2, 9, FULL_SIZE), FULL_SIZE, 3, 2)
    assert (logits.dtype, logits.device, logits.numel()) == (torch.float32, device, 18 * FULL_SIZE)
    assert logits.requires_grad
    assert not logits.detach().requires_grad
    assert logits.to(device) is logits
    assert logits.contiguous() is logits
    assert logits.bfloat16().dtype == torch.bfloat16


def test_logits_become_arrays_lists_text_and_pickles() -> None:
    full, lean = heads()
    with torch.no_grad():
        expected, found = full(hidden_states(1, 2)), lean(hidden_states(1, 2))
    np.testing.assert_allclose(np.asarray(found), expected.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.tolist(), expected.tolist(), rtol=1e-5, atol=1e-6)
    assert repr(found)[:20] == repr(expected)[:20]
    unpickled = pickle.loads(pickle.dumps(found))
    assert type(unpickled) is Tensor
    torch.testing.assert_close(unpickled, expected)
    torch.testing.assert_close(copy.deepcopy(found), expected)


def test_logits_that_are_read_after_the_step_are_those_of_the_forward() -> None:
    full, lean = heads()
    read = []
    for model in (full, lean):
        optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
        logits = model(hidden_states(2, 9))
        F.cross_entropy(logits.view(-1, FULL_SIZE), torch.arange(18)).backward()
        optimizer.step()
        read.append(logits.detach().clone())
    torch.testing.assert_close(*read)


def test_logits_that_are_read_after_the_rows_were_changed_by_hand_are_an_error() -> None:
    _, lean = heads()
    logits = lean(hidden_states(2, 9))
    with torch.no_grad():
        lean.head.weight.mul_(2)
    with pytest.raises(BypassError, match="head: its rows were changed after the forward, and only then the logits"):
        logits.argmax(-1)


class OwnLoss(torch.autograd.Function):
    """As Liger's losses and CCE's work: underneath torch's functions, with a gradient of their own."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits.detach().clone())
        return logits.square().sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


@pytest.mark.parametrize(
    "function",
    [
        lambda logits: OwnLoss.apply(logits),
        lambda logits: OwnLoss.apply(torch.tanh(logits / 2)[:, :-1]),
        lambda logits: checkpoint(lambda given: given.logsumexp(-1), logits, use_reentrant=True),
    ],
)
def test_what_works_underneath_torchs_functions_gives_the_full_models_gradients(function: Any) -> None:
    full, lean = heads()
    expected, found = (results(model, function) for model in (full, lean))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-5)
    kept = torch.tensor(lm_vocabulary().token_ids)
    torch.testing.assert_close(lean.head.weight.grad, full.head.weight.grad[kept], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lean.head.bias.grad, full.head.bias.grad, rtol=1e-5, atol=1e-5)


def test_what_works_underneath_on_logits_that_were_written_to_is_refused() -> None:
    _, lean = heads()
    logits = lean(hidden_states(2, 9))
    logits[..., 3] = 0.0
    loss = OwnLoss.apply(logits)
    with pytest.raises(BypassError, match=r"head: code that works underneath torch's functions.*logits\.clone\(\)"):
        loss.backward()


def test_a_hook_on_the_gradient_makes_no_logits_until_somebody_looks() -> None:
    """FSDP2 hangs one on each output of a model, and asks of what it is a view."""
    _, lean = heads()
    hidden, seen = hidden_states(2, 9), []
    logits = lean(hidden)
    assert logits._base is None
    logits.register_hook(lambda gradient: seen.append(gradient.shape))
    assert not logits.is_computed
    F.cross_entropy(logits.view(-1, FULL_SIZE), torch.arange(18)).backward()
    assert seen == [(2, 9, FULL_SIZE)]
    assert hidden.grad is not None
    hidden.grad = None
    logits = lean(hidden)
    logits.register_hook(lambda gradient: seen.append(gradient.shape)).remove()
    F.cross_entropy(logits.view(-1, FULL_SIZE), torch.arange(18)).backward()
    assert (len(seen), logits.is_computed) == (1, False)


def test_logits_without_a_graph_stay_without_one() -> None:
    _, lean = heads()
    with torch.no_grad():
        logits = lean(hidden_states(2, 9))
    assert not logits.requires_grad
    assert not F.cross_entropy(logits.view(-1, FULL_SIZE), torch.arange(18)).requires_grad
    logits = lean(hidden_states(2, 9))
    with torch.no_grad():
        logits.argmax(-1)
    assert logits.exp().requires_grad


def test_autocast_computes_in_its_dtype_and_takes_the_loss_in_fp32() -> None:
    full, lean = heads()
    losses = []
    for model in (full, lean):
        hidden = hidden_states(2, 9)
        with torch.autocast(hidden.device.type, torch.bfloat16):
            logits = model(hidden)
            assert logits.dtype == torch.bfloat16
            losses.append(F.cross_entropy(logits.view(-1, FULL_SIZE), torch.arange(18)))
        losses[-1].backward()
    assert losses[0].dtype == losses[1].dtype == torch.float32
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-3)
    kept = torch.tensor(lm_vocabulary().token_ids)
    assert full.head.weight.grad is not None
    assert lean.head.weight.dtype == torch.float32
    torch.testing.assert_close(lean.head.weight.grad, full.head.weight.grad[kept], rtol=2e-2, atol=1e-3)


def test_in_half_precision_a_scaled_loss_keeps_small_gradients() -> None:
    torch.manual_seed(0)
    full = Head().half()
    lean = shrink_(copy.deepcopy(full), lm_vocabulary(), output="frozen")
    grads = []
    for model in (full, lean):
        hidden = hidden_states(2, 9).detach().half().requires_grad_()
        loss = F.cross_entropy(model(hidden).float().view(-1, FULL_SIZE), torch.arange(18))
        (loss * 1e-6 * 2.0**16).backward()
        grads.append(hidden.grad)
    assert grads[0] is not None
    assert float(grads[0].abs().max()) > 0
    torch.testing.assert_close(grads[1], grads[0], rtol=2e-2, atol=1e-5)


# torch's compiler reads `.grad` of the hidden states where the graph ends before the output layer.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_model_gives_the_same_losses() -> None:
    full = small_lm("llama-tied")
    lean = shrink_(copy.deepcopy(full), lm_vocabulary(), output="frozen")
    compiled = torch.compile(lean, backend="eager")
    torch.testing.assert_close(compiled(**lm_batch()).loss, full(**lm_batch()).loss)


def test_gradient_checkpointing_accumulation_and_frozen_backbones_work() -> None:
    full = small_lm("llama-tied")
    getattr(full, "activation_checkpointing_enable", full.gradient_checkpointing_enable)()
    for parameter in full.model.layers.parameters():
        parameter.requires_grad_(False)
    lean = shrink_(copy.deepcopy(full), lm_vocabulary(), output="frozen")
    for model in (full, lean):
        model.train()
        for step in range(2):
            (model(**lm_batch(step)).loss / 2).backward()
    kept = torch.tensor(lm_vocabulary().token_ids)
    torch.testing.assert_close(lean.lm_head.weight.grad, full.lm_head.weight.grad[kept], rtol=1e-4, atol=1e-6)


def test_a_hand_written_loss_and_a_shared_one_agree() -> None:
    lean = shrink_(small_lm("llama-tied"), lm_vocabulary(), output="frozen")
    batch = lm_batch()
    torch.testing.assert_close(token_loss(lean(batch["input_ids"]).logits, batch["labels"]), lean(**batch).loss)


def test_recorded_operations_are_the_ones_that_commute_with_chunks() -> None:
    logits = torch.zeros(2, FULL_SIZE)
    recorded = Elementwise(FULL_SIZE)
    assert recorded.then(torch.exp, (logits,), {}, logits) is None
    assert recorded.then(torch.mul, (logits, torch.ones(2, 1)), {}, logits) is None
    assert recorded.then(torch.add, (logits, logits), {}, logits) is None
    assert recorded.then(torch.add, (logits, 1), {"alpha": 2}, logits) is None
    assert recorded.then(Tensor.to, (logits,), {"device": "cpu"}, logits) is None
    assert recorded.then(torch.mul, (logits, 2.0), {}, logits) is not None


def test_label_smoothing_over_a_restricted_softmax_is_refused_by_name() -> None:
    with pytest.warns(UserWarning, match="another objective"):
        _, lean = heads(output="restricted")
    logits = lean(hidden_states(2, 9)).view(-1, FULL_SIZE)
    labels = torch.tensor(lm_vocabulary().token_ids)[:18]
    with pytest.raises(ModelError, match=r"label smoothing .* would be infinite"):
        F.cross_entropy(logits, labels, label_smoothing=0.1)
    assert F.cross_entropy(logits, labels).isfinite()


def test_the_options_of_a_loss_are_torchs_own() -> None:
    assert LossOptions() == LossOptions(ignore_index=-100, reduction="mean", label_smoothing=0.0)
