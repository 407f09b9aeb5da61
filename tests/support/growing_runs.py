"""Runs that grow, compared with those that had all rows from the beginning and with ordinary ones, bit for bit."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from comparing import differing, same_bits
from torch import Tensor
from torch.optim import Optimizer

import leanvocab as lv
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

Run = Callable[[Any, Optimizer], list[float]]


def adamw(parameters: Any) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": adamw,
    "AdamW, foreach": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0, foreach=True),
    "AdamW, fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0, fused=True),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
    "AMSGrad": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, amsgrad=True),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-1),
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-1, momentum=0.9),
    "SGD with dampening": lambda parameters: torch.optim.SGD(parameters, lr=1e-1, momentum=0.9, dampening=0.3),
    "Adagrad from one": lambda parameters: torch.optim.Adagrad(parameters, lr=1e-1, initial_accumulator_value=1.0),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3),
    "RMSprop, centered": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3, centered=True, momentum=0.5),
}


def steps_of(number: int, loss_of: Callable[[Any, int], Tensor]) -> Run:
    def run(model: Any, optimizer: Optimizer) -> list[float]:
        model.train()
        torch.manual_seed(0)
        losses = []
        for step in range(number):
            loss = loss_of(model, step)
            if loss.requires_grad:
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses

    return run


def check_same(model: Any, run: Run, make: Callable[[Any], Optimizer] = adamw, **options: Any) -> Any:
    """The grown model, after it was compared with one that has all rows, and with the full one."""
    others = [copy.deepcopy(model), copy.deepcopy(model)]
    lv.shrink_(model, on_missing="extend", **options)
    size = lv.status(model).tables[0].full_size
    lv.shrink_(others[0], PartialVocabulary(range(size), size), **options)
    before = lv.status(model).tables[0].num_rows
    optimizers = [make(each.parameters()) for each in (model, *others)]
    losses = [run(each, optimizer) for each, optimizer in zip((model, *others), optimizers, strict=True)]
    assert losses[0] == losses[1] == losses[2]
    assert before < max(table.num_rows for table in lv.status(model).tables) < size
    for other, optimizer in zip(others, optimizers[1:], strict=True):
        assert differing(model, other) == []
        first, second = optimizers[0].state_dict(), optimizer.state_dict()
        assert first["param_groups"] == second["param_groups"]
        for number, state in second["state"].items():
            for key, value in state.items():
                assert same_bits(torch.as_tensor(first["state"][number][key]), torch.as_tensor(value)), (number, key)
    return model
