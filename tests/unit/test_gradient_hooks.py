"""Hooks on the gradient of a partial weight, which were written for the full one."""

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparing import bits, differing, train
from models import FULL_SIZE, batch, small_model, twins, used_vocabulary
from torch import Tensor, nn

from leanvocab.errors import BypassError
from leanvocab.model.shrink import merge_, shrink_
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary
from versions import compiling, hear_of_sparse_checks

hear_of_sparse_checks()

OLD = 300  # rows below it do not train in most of these tests
MASK = (torch.arange(FULL_SIZE) >= OLD)[:, None]


def weight_of(model: Any) -> nn.Parameter:
    weight: nn.Parameter = model.get_input_embeddings().weight
    return weight


def zeroes_in_place(gradient: Tensor) -> None:
    gradient[:OLD] = 0


def zeroes_by_masking(gradient: Tensor) -> Tensor:
    return gradient * MASK


def zeroes_a_clone(gradient: Tensor) -> Tensor:
    gradient = gradient.clone()
    gradient[torch.arange(OLD)] = 0
    return gradient


def zeroes_with_numpy(gradient: Tensor) -> None:
    gradient.numpy()[:OLD] = 0


HOOKS = [zeroes_in_place, zeroes_by_masking, zeroes_a_clone, zeroes_with_numpy]


@pytest.mark.parametrize("when", ["before", "after", "both"])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_that_lets_new_rows_train_alone_does_so(hook: Callable[..., Any], when: str) -> None:
    full, model = twins()
    for each in (full, model):
        if when in ("before", "both"):
            weight_of(each).register_hook(hook)
        if each is model:
            shrink_(each, used_vocabulary())
        if when in ("after", "both"):
            weight_of(each).register_hook(hook)
        train(each)
    assert type(weight_of(model)) is nn.Parameter  # or else torch's optimizers leave their fast paths
    assert differing(full, model) == []
    assert differing(full, merge_(model)) == []
    assert not torch.equal(weight_of(full)[OLD:], weight_of(small_model())[OLD:])
    for each in (full, model):
        train(each)  # and after merging
    assert differing(full, model) == []


def test_a_hook_on_a_tied_matrix_gets_rows_by_id() -> None:
    full, model = twins("bert-tied")
    outside = torch.ones(FULL_SIZE, dtype=torch.bool).index_fill_(
        0, torch.tensor(used_vocabulary().token_ids.tolist()), False
    )
    weight_of(full).register_hook(lambda gradient: gradient.masked_fill(outside[:, None], 0))
    shrink_(model, used_vocabulary())
    inputs = {"input_ids": batch()["input_ids"], "labels": batch()["input_ids"]}
    for each in (full, model):
        weight_of(each).register_hook(zeroes_in_place)
        train(each, steps=1, **inputs)
    torch.testing.assert_close(weight_of(merge_(model)), weight_of(full), rtol=1e-4, atol=1e-6)
    assert bits(weight_of(model)[:OLD]) == bits(weight_of(full)[:OLD])


def test_a_hook_gets_the_gradient_of_the_full_weight() -> None:
    seen: list[Tensor] = []
    for model in twins():
        if seen:
            shrink_(model, used_vocabulary())
        weight_of(model).register_hook(lambda gradient: seen.append(gradient.clone()))
        train(model, steps=1)
    assert seen[0].shape == seen[1].shape == (FULL_SIZE, 48)
    assert torch.equal(seen[0], seen[1])


def test_hooks_see_what_those_before_them_gave() -> None:
    full, model = twins()
    shrink_(model, used_vocabulary())
    for each in (full, model):
        weight_of(each).register_hook(zeroes_by_masking)
        weight_of(each).register_hook(lambda gradient: gradient * 2 - gradient.clamp(0, 0.5))
        train(each)
    assert differing(full, model) == []


@pytest.mark.parametrize("removed", ["before", "while", "after"])
def test_a_handle_removes_its_hook_whenever_it_was_given(removed: str) -> None:
    full, model = twins()
    handles = [weight_of(each).register_hook(zeroes_in_place) for each in (full, model)]
    for each, handle in zip((full, model), handles, strict=True):
        if removed == "before":
            handle.remove()
        if each is model:
            shrink_(model, used_vocabulary())
        train(each, steps=1)
        if removed == "while":
            handle.remove()
        train(each, steps=1)
        if each is model:
            merge_(model)
        if removed == "after":
            handle.remove()
        train(each, steps=1)
    assert differing(full, model) == []


def test_a_handle_from_while_it_was_shrunk_removes_its_hook() -> None:
    full, model = twins()
    shrink_(model, used_vocabulary())
    weight_of(model).register_hook(zeroes_in_place).remove()
    for each in (full, model):
        train(each)
    assert differing(full, model) == []


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_merged_weight_has_torchs_own_registers(register: str) -> None:
    model = shrink_(small_model(), used_vocabulary())
    getattr(weight_of(model), register)(lambda tensor: None)
    weight = weight_of(merge_(model))
    registers = [weight._backward_hooks, weight._post_accumulate_grad_hooks]  # type: ignore[attr-defined]
    assert sorted(type(each).__name__ for each in registers) == ["NoneType", "OrderedDict"]
    assert all(type(each) in (OrderedDict, type(None)) for each in registers)


def test_a_hook_that_gives_gradients_to_rows_that_are_not_there_is_an_error() -> None:
    model = shrink_(small_model(), used_vocabulary())
    weight_of(model).register_hook(lambda gradient: gradient + 0.01)
    with pytest.raises(
        BypassError, match=r"gave gradients to 4\d\d rows outside .*, the first of them id 3: .*always_keep"
    ):
        train(model, steps=1)


def test_a_hook_that_gives_another_shape_is_an_error() -> None:
    model = shrink_(small_model(), used_vocabulary())
    weight_of(model).register_hook(lambda gradient: gradient[: len(used_vocabulary())])
    with pytest.raises(BypassError, match=r"gave a gradient of shape \(\d+, 48\), expected \(500, 48\)"):
        train(model, steps=1)


def test_sparse_gradients_are_of_all_rows_too() -> None:
    seen = []
    ids = torch.tensor([[3, 8, 3, 5]])
    for is_shrunk in (False, True):
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Embedding(9, 4, sparse=True))
        if is_shrunk:
            shrink_(model, PartialVocabulary([0, 3, 5, 8], 9), embedding="0")
        model[0].weight.register_hook(lambda gradient: seen.append(gradient.to_dense()))
        model[0].weight.register_hook(lambda gradient: gradient * 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(ids).sum().backward()
        optimizer.step()
        seen.append(model.state_dict()["0.weight"])
    assert bits(seen[0]) == bits(seen[2])
    assert bits(seen[1]) == bits(seen[3])


def assigned(model: Any) -> Any:
    model.load_state_dict(model.state_dict(), assign=True)
    return model


@pytest.mark.parametrize(
    "made",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), assigned],
    ids=["deepcopy", "pickle", "assign"],
)
def test_hooks_on_copies_get_all_rows_too(made: Callable[..., Any]) -> None:
    full, model = twins()
    model = made(shrink_(model, used_vocabulary()))
    for each in (full, model):
        weight_of(each).register_hook(zeroes_in_place)
        train(each)
    assert differing(full, model) == []


@compiling
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_calls_hooks_with_all_rows(backend: str) -> None:
    full, model = twins(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    shrink_(model, used_vocabulary())
    for each in (full, model):
        weight_of(each).register_hook(zeroes_in_place)
        compiled = torch.compile(each, backend=backend)
        train(compiled, torch.optim.SGD(each.parameters(), lr=0.1), steps=2)
    assert differing(full, model) == []
    torch.compiler.reset()


# --- hooks on the weight itself ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_an_optimizer_that_steps_within_the_backward_steps_as_on_the_full_weight(kind: Any, when: str) -> None:
    """As in torch's tutorial, torchtune and the Trainer's layerwise optimizers: one for each parameter, found by it."""
    full, model = twins()
    for each in (full, model):
        optimizers: dict[Any, torch.optim.Optimizer] = {}

        def step(parameter: Tensor, optimizers: dict[Any, torch.optim.Optimizer] = optimizers) -> None:
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        if each is model and when == "after":
            shrink_(model, used_vocabulary())
        for parameter in each.parameters():
            parameter.register_post_accumulate_grad_hook(step)
        if each is model and when == "before":
            shrink_(model, used_vocabulary())
        optimizers.update({parameter: kind([parameter], lr=1e-2, weight_decay=0.0) for parameter in each.parameters()})
        torch.manual_seed(1)
        for _ in range(3):
            each(**batch()).loss.backward()
    assert differing(full, model) == []


def test_a_fused_backward_that_updates_in_a_hook_works() -> None:
    """LOMO registers a hook on each parameter, which updates all that have a gradient, and gives it on as it is."""
    full, model = twins()
    shrink_(model, used_vocabulary())
    for each in (full, model):

        def update(gradient: Tensor, model: nn.Module = each) -> Tensor:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.data.add_(parameter.grad, alpha=-0.1)
                    parameter.grad = None
            return gradient

        for parameter in each.parameters():
            parameter.register_hook(update)
        torch.manual_seed(1)
        for _ in range(3):
            each(**batch()).loss.backward()
    assert differing(full, model) == []


BY_ID = [
    lambda weight: weight.grad[:OLD].zero_(),
    lambda weight: weight.grad.__setitem__(slice(OLD), 0),
    lambda weight: weight.grad.__setitem__((slice(OLD), slice(None)), 0),
    lambda weight: weight.grad.data[3].zero_(),
    lambda weight: weight.grad.index_fill_(0, torch.tensor([3]), 0),
    lambda weight: weight.grad.narrow(0, 0, 3).zero_(),
    lambda weight: torch.select(weight.grad, dim=0, index=3).zero_(),
    lambda weight: weight.data[[3, 4]],
]


@pytest.mark.parametrize("hook", BY_ID)
def test_a_hook_on_the_weight_that_addresses_rows_by_id_is_refused(hook: Callable[..., Any]) -> None:
    model = shrink_(small_model(), used_vocabulary())
    weight_of(model).register_post_accumulate_grad_hook(lambda weight: hook(weight) and None)
    with pytest.raises(
        BypassError, match=r"\w+ addresses rows by id\. .* holds \d+ of 500 rows .*weight\.register_hook gives"
    ):
        train(model, steps=1)


def by_value(weight: Tensor) -> None:
    gradient = weight.grad
    assert gradient is not None
    gradient[gradient.isnan()] = 0
    gradient[gradient.norm(dim=1) > 0.01] *= 0.5
    gradient[..., 0] = 0
    gradient[:, 1] = 0
    gradient.view(-1).narrow(0, 0, 1).zero_()
    gradient.clamp_(-0.1, 0.1)


def test_a_hook_on_the_weight_that_goes_by_values_is_let_through() -> None:
    model = shrink_(small_model(), used_vocabulary())
    weight_of(model).register_post_accumulate_grad_hook(by_value)
    train(model, steps=1)


def test_a_full_mask_in_a_hook_on_the_weight_is_an_error_that_names_the_other_hook() -> None:
    model = shrink_(small_model(), used_vocabulary())
    weight_of(model).register_post_accumulate_grad_hook(lambda weight: weight.grad.mul_(MASK))
    with pytest.raises(RuntimeError, match="must match") as caught:
        train(model, steps=1)
    assert "weight.register_hook gives the gradient of all rows" in caught.value.__notes__[0]


def test_a_hook_that_meets_the_weight_itself_is_told_why_they_differ() -> None:
    model = shrink_(small_model(), used_vocabulary())
    hook = weight_of(model).register_hook(lambda gradient: gradient - weight_of(model).detach())
    with pytest.raises(RuntimeError, match="size of tensor") as caught:
        model(**batch()).loss.backward()
    assert "gets that of all 500 rows, while the weight itself holds" in caught.value.__notes__[0]
    hook.remove()  # in torch 2.11 a hook that holds its model keeps it after a backward that failed
