"""Bytes of optimizer states are those that the optimizers really allocate."""

import functools
import warnings

import pytest
import torch
import transformers
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import leanvocab as lv
from leanvocab.errors import SettingsError
from leanvocab.reports.footprint import Parameter, held_bytes, tensor_bytes
from leanvocab.reports.state_bytes import OPTIMIZERS, optimizer_name, shared_bytes, state_bytes

SHAPES = [(50, 7), (7,), (1,), (3, 4, 5), (64, 100)]
REAL = {
    "adamw": torch.optim.AdamW,
    "sgd": functools.partial(torch.optim.SGD, lr=1e-3),
    "sgd_momentum": functools.partial(torch.optim.SGD, lr=1e-3, momentum=0.9),
    "adafactor": functools.partial(transformers.Adafactor, lr=1e-3, scale_parameter=False, relative_step=False),
    "torch_adafactor": torch.optim.Adafactor,
    **{
        name: getattr(torch.optim, name)
        for name in ("ASGD", "Adadelta", "Adagrad", "Adam", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop")
    },
}


def parameter(shape, value_bytes=4, in_embedding=False):
    return Parameter(shape, value_bytes, True, in_embedding, False, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", REAL)
def test_states_are_as_large_as_those_of_a_real_step(name, dtype):
    tensors = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in SHAPES]
    for tensor in tensors:
        tensor.grad = torch.ones_like(tensor)
    optimizer = REAL[name](tensors)
    optimizer.step()
    parameters = [parameter(shape, dtype.itemsize) for shape in SHAPES]
    assert list(state_bytes(name, parameters).values()) == [tensor_bytes(optimizer.state[each]) for each in tensors]


def test_every_name_is_answered():
    assert set(OPTIMIZERS) <= {*REAL, "adamw_8bit"}
    assert set(state_bytes("adamw_8bit", [parameter((64, 100)), parameter((64, 100), in_embedding=True)]).values()) == {
        2 * 6400 + 2 * 25 * 4,
        2 * 6400 * 4,
    }
    assert shared_bytes("adamw_8bit", [parameter((64, 100))]) == 2 * 256 * 4
    assert shared_bytes("adamw_8bit", [parameter((7,))]) == shared_bytes("adamw", [parameter((64, 100))]) == 0


def test_what_makes_an_optimizer_is_taken_too():
    make = functools.partial(torch.optim.AdamW, amsgrad=True)
    assert list(state_bytes(make, [parameter((5, 3))]).values()) == [3 * 15 * 4 + 4]
    model = nn.Sequential(nn.Embedding(50, 4), nn.Linear(4, 2))
    estimate = lv.estimate_memory(model, 10, embedding="0", optimizer=make)
    assert estimate.optimizer == optimizer_name(make) == "AdamW"
    assert estimate.partial.optimizer_bytes == 3 * estimate.partial.weights_bytes + 3 * 4


@pytest.mark.parametrize("name", ["LBFGS", "SparseAdam", "Muon"])
def test_an_optimizer_that_takes_no_ordinary_step_is_an_error_by_name(name):
    with pytest.raises(SettingsError, match=rf"{name}: its states are not known, .* no ordinary step .*: \w"):
        state_bytes(name, [parameter((7,))])


def test_nothing_that_trains_has_no_states():
    assert state_bytes("adamw", []) == {}


def test_an_estimate_is_no_step_of_the_training_that_is_under_way():
    """Hooks on steps belong to real ones: a missing id that was noted on a device is not raised by an estimate."""
    steps = []
    handle = register_optimizer_step_pre_hook(lambda *step: steps.append(step))
    try:
        state_bytes("adamw", [parameter((5, 3))])
    finally:
        handle.remove()
    assert steps == []


def test_held_bytes_are_of_each_tensor_once_and_of_what_it_is_made_of():
    weight = nn.Parameter(torch.ones(10, 4))
    weight.grad = torch.sparse_coo_tensor([[1, 3]], torch.ones(2, 4), (10, 4), check_invariants=True)
    states = {weight: {"step": 3, "moments": (torch.ones(10, 4), torch.ones(10, 4, dtype=torch.bfloat16))}}
    held = held_bytes([weight, weight], states)
    assert held == {"weights": 160, "gradients": 2 * 8 + 8 * 4, "states": 160 + 80}


def test_an_estimate_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state_bytes("torch_adafactor", [parameter((5, 3))])
