"""Checkpoints of one process, DistributedDataParallel and FSDP2, each loaded in each: weights, and states of the optimizer."""

import copy
import functools
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from doors import pairs, ranks
from doors.registry import Outcome, door

LAYOUTS = ("one process", "DDP", "FSDP2")


@functools.cache
def _given(family: str) -> Any:
    return ranks.kept(moved, family)


@door(
    "weights and AdamW's states of one process, DDP and FSDP2, each loaded in each by torch.distributed.checkpoint",
    fast=False,
)
def all_layouts(folder: Path) -> Outcome:
    """Training goes on from each; beside the same without leanvocab."""
    full, lean, wrong = _given("llama")
    return pairs.nothing_wrong(wrong) if wrong else pairs.compare(full, lean)


@door("the same, a shrunk run going on from the checkpoints of ordinary ones", fast=False)
def from_ordinary_runs(folder: Path) -> Outcome:
    return pairs.compare(_given("llama")[0], _given("llama-crossed")[1])


@door('the same, tied language model, output="frozen": what is loaded, beside what was saved', fast=False)
def tied(folder: Path) -> Outcome:
    return pairs.nothing_wrong(_given("llama-tied")[2])


# --- in two processes -------------------------------------------------------------------------------------------------


def moved(folder: Path, case: str) -> tuple[pairs.Run | None, pairs.Run, list[str]]:
    """A run without leanvocab, one with, each through all pairs of layouts; what was loaded otherwise than it was saved."""
    if case == "llama-tied":  # without leanvocab its reference masks gradients, by hooks that FSDP2 does not call
        lean, wrong = _through_all(folder / "lean", folder / "lean", case, True)
        return None, lean, wrong
    full, wrong = _through_all(folder / "full", folder / "full", "llama", False)
    source = folder / ("full" if case == "llama-crossed" else "lean")
    lean, wrong_too = _through_all(folder / "lean", source, "llama", True)
    return full, lean, wrong + wrong_too


def _through_all(folder: Path, loaded: Path, family: str, lean: bool) -> tuple[pairs.Run, list[str]]:
    run, wrong = pairs.Run(), []
    for source in LAYOUTS:
        saved = _train_and_save(folder / source, source, family, lean, run)
        for target in LAYOUTS:
            found = _load_and_train(loaded / source, target, family, lean, run, f"{source} to {target}")
            wrong += _differing(f"{source} to {target}", saved, found)
    return run, wrong


def _train_and_save(folder: Path, layout: str, family: str, lean: bool, run: pairs.Run) -> dict[str, Tensor]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, called, optimizer = _laid_out(layout, family, lean)
    _steps(called, optimizer, layout, family, run, range(2))
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(state, checkpoint_id=str(folder))
    return _full_tensors(model, optimizer)


def _load_and_train(folder: Path, layout: str, family: str, lean: bool, run: pairs.Run, name: str) -> dict[str, Tensor]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, called, optimizer = _laid_out(layout, family, lean)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(state, checkpoint_id=str(folder))
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    loaded = _full_tensors(model, optimizer)
    _steps(called, optimizer, layout, family, run, range(2, 4))
    run.tensors |= {f"{name}: {key}": value for key, value in _full_tensors(model, optimizer).items()}
    return loaded


def _laid_out(layout: str, family: str, lean: bool) -> tuple[nn.Module, Any, torch.optim.Optimizer]:
    model: Any = ranks.made(family, lean)
    if layout == "FSDP2":
        model = ranks.sharded(model)
    called = nn.parallel.DistributedDataParallel(model) if layout == "DDP" else model
    return model, called, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)


def _steps(called: Any, optimizer: Any, layout: str, family: str, run: pairs.Run, steps: range) -> None:
    task = "classification" if family == "llama" else "causal-lm"
    for step in steps:
        loss = called(**ranks.share(step, task, whole=layout == "one process")).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.losses.append(ranks.mean(loss))


def _full_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of all tensors, on the first process: names of states are the parameter's and the state's own."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, states = get_state_dict(model, optimizer, options=options)
    tensors = dict(weights)
    for parameter, each in states.get("state", {}).items():
        tensors |= {f"{parameter}.{name}": value for name, value in each.items()}  # type: ignore[union-attr]
    return copy.deepcopy(tensors)  # type: ignore[arg-type]


def _differing(name: str, saved: dict[str, Tensor], loaded: dict[str, Tensor]) -> list[str]:
    if saved.keys() != loaded.keys():
        return [f"{name}: {sorted(saved.keys() ^ loaded.keys())[:3]}"]
    return [f"{name}: {key}" for key in saved if dist.get_rank() == 0 and not torch.equal(saved[key], loaded[key])]
