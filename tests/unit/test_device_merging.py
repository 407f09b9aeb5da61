"""Merging and saving on a device: in the room of what is there, and without a loss where there is not enough of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerator
import pytest
import torch
from models import small_lm
from references import QUIET, lm_batch, lm_vocabulary
from torch import Tensor, nn

from leanvocab.checkpoints.full_saving import save_full
from leanvocab.model.shrink import merge_, shrink_
from leanvocab.partial.module import partial_modules

DEVICE = accelerator.NAME
MODES: dict[str, dict[str, Any]] = {
    "frozen on the device": {"output": "frozen"},
    "frozen on the host": {"output": "frozen", "frozen_rows": "host"},
    "restricted": {"output": "restricted"},
}
pytestmark = QUIET


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    if not accelerator.can_be_emulated():
        pytest.skip("torch can emulate a device from 2.13 on")
    with accelerator.in_use():
        yield


def trained(mode: str, name: str = "llama-untied") -> tuple[nn.Module, torch.optim.Optimizer]:
    """A shrunk model on the device after a step, with gradients of the next one."""
    model = shrink_(small_lm(name).to(DEVICE).train(), lm_vocabulary(), **MODES[mode])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    backward(model, 0)
    optimizer.step()
    optimizer.zero_grad()
    backward(model, 1)
    return model, optimizer


def backward(model: nn.Module, step: int) -> None:
    model(**{name: value.to(DEVICE) for name, value in lm_batch(step).items()}).loss.backward()


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of everything that training goes on from, where it is."""
    parameters = list(model.parameters())
    states = [value for parameter in parameters for value in optimizer.state[parameter].values()]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return [value.detach().clone() for value in (*parameters, *gradients, *states)]


def allocated() -> int:
    return int(torch.get_device_module(DEVICE).memory_allocated())


@pytest.mark.parametrize("mode", MODES)
def test_a_merge_without_enough_room_changes_nothing(mode: str) -> None:
    model, optimizer = trained(mode)
    twin, its_optimizer = trained(mode)
    before = held(model, optimizer)
    failures = 0
    for room in range(0, 2_000_000, 16_000):
        for module in partial_modules(model).values():
            module.drop_caches()
        accelerator.set_total_memory(allocated() + room)
        try:
            merge_(model, optimizer=optimizer)
        except torch.OutOfMemoryError:
            failures += 1
        finally:
            accelerator.set_total_memory(None)
        if not partial_modules(model):
            break
        after = held(model, optimizer)
        assert [value.device for value in after] == [value.device for value in before]
        assert all(torch.equal(*pair) for pair in zip(after, before, strict=True))
    assert failures > 5  # at the first matrix, at its gradient, at each state, at the second matrix
    optimizer.step()
    merge_(twin, optimizer=its_optimizer)
    its_optimizer.step()
    both = zip(held(model, optimizer), held(twin, its_optimizer), strict=True)
    assert all(torch.equal(*pair) for pair in both)


@pytest.mark.parametrize("mode", MODES)
def test_a_merged_model_trains_on_as_on_a_cpu(mode: str) -> None:
    model, optimizer = trained(mode, "llama-tied")
    merge_(model, optimizer=optimizer)
    optimizer.step()
    assert {value.device.type for value in held(model, optimizer) if value.ndim} == {DEVICE}
    other = shrink_(small_lm("llama-tied").train(), lm_vocabulary(), **MODES[mode])
    its_optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(2):
        its_optimizer.zero_grad()
        other(**lm_batch(step)).loss.backward()
        if step == 0:
            its_optimizer.step()
    merge_(other, optimizer=its_optimizer)
    its_optimizer.step()
    for parameter, its in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter.cpu(), its, rtol=1e-4, atol=1e-5)


def test_an_optimizer_that_is_not_handed_over_keeps_no_full_matrix_from_its_room() -> None:
    model, _ = trained("restricted")
    partial = {module.weight for module in partial_modules(model).values()}
    merge_(model)
    assert {weight.device.type for weight in partial} == {"cpu"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("saving", ["state_dict", "save_pretrained", "save_full", "optimizer"])
def test_saving_makes_no_full_matrix_on_the_device(mode: str, saving: str, tmp_path: Path) -> None:
    model, optimizer = trained(mode)
    smallest = min(module.weight.nbytes for module in partial_modules(model).values())
    with accelerator.watch() as seen:
        if saving == "state_dict":
            kept = model.state_dict()
            assert kept["lm_head.weight"].device.type == "cpu"
        elif saving == "optimizer":
            optimizer.state_dict()
        elif saving == "save_full":
            save_full(model, tmp_path / "saved")
        else:
            model.save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    assert seen.peak_bytes - seen.start_bytes < 0.1 * smallest
