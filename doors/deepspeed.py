"""DeepSpeed's ZeRO-2 and ZeRO-3 with two processes: training, its own checkpoints, and checkpoints to and from other layouts."""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from doors import pairs, ranks
from doors.registry import Outcome, door

_NEEDS: Any = {"needs": ("deepspeed",), "fast": False}


@functools.cache
def _runs(stage: int, offload: bool = False) -> list[pairs.Run]:
    """Without leanvocab, and with."""
    return [ranks.kept(trained, lean, stage, offload) for lean in (False, True)]


@door("DeepSpeed ZeRO-2, two processes; engine.save_checkpoint and load_checkpoint", **_NEEDS)
def zero2(folder: Path) -> Outcome:
    return pairs.compare(*_runs(2))


@door("DeepSpeed ZeRO-2, the optimizer offloaded to the host; engine.save_checkpoint and load_checkpoint", **_NEEDS)
def zero2_offloaded(folder: Path) -> Outcome:
    return pairs.compare(*_runs(2, True))


@door(
    "DeepSpeed ZeRO-3, two processes; engine.save_checkpoint and load_checkpoint; save_pretrained of what it gathers",
    **_NEEDS,
)
def zero3(folder: Path) -> Outcome:
    return pairs.compare(*_runs(3))


@door("weights of one process in ZeRO-2 and ZeRO-3, and theirs in one process, DDP and FSDP2", **_NEEDS)
def layouts(folder: Path) -> Outcome:
    return pairs.nothing_wrong(ranks.start(moved, folder))


@door("DeepSpeed ZeRO-3, engine.save_16bit_model into a full model", **_NEEDS)
def zero3_16bit(folder: Path) -> Outcome:
    return pairs.nothing_wrong(ranks.start(saved_by_the_engine, folder))


@door(
    "DeepSpeed ZeRO-3, zero_to_fp32.py into a shrunk model",
    expects="refused",
    refuses="load them within partial_state_dicts(model)",
    why="the script puts together what the ranks wrote, with no model at hand: the table has the kept rows alone, and nothing "
    "says of which vocabulary. Full models refuse it too, by torch's error of another size",
    **_NEEDS,
)
def zero3_to_fp32(folder: Path) -> Outcome:
    return ranks.start(refused_as_it_is, folder)  # type: ignore[no-any-return]


@door("DeepSpeed ZeRO-3, zero_to_fp32.py into a shrunk model within partial_state_dicts, saved in full", **_NEEDS)
def zero3_to_fp32_shrunk(folder: Path) -> Outcome:
    return pairs.nothing_wrong(ranks.start(converted, folder))


@door(
    'DeepSpeed ZeRO-3, tied language model (output="frozen")',
    expects="refused",
    refuses="train with ZeRO-2 or FSDP2",
    why="the loss reads the output layer's rows, which ZeRO-3 takes away as soon as the layer has been called",
    **_NEEDS,
)
def zero3_frozen(folder: Path) -> Outcome:
    return ranks.start(frozen, folder)  # type: ignore[no-any-return]


# --- in two processes -------------------------------------------------------------------------------------------------


def _engine(model: nn.Module, stage: int, offload: bool = False) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    settings = {
        "train_micro_batch_size_per_gpu": 4, "zero_optimization": zero, "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def _steps(engine: Any, run: pairs.Run, steps: range) -> None:
    for step in steps:
        loss = engine(**ranks.share(step, "classification")).loss
        engine.backward(loss)
        engine.step()
        run.losses.append(ranks.mean(loss))


@contextmanager
def _gathered(engine: Any, *, loads: bool = False) -> Iterator[nn.Module]:
    import deepspeed

    sharded = engine.zero_optimization_partition_weights()
    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if loads else None, enabled=sharded):
        yield engine.module


def trained(folder: Path, lean: bool, stage: int, offload: bool) -> pairs.Run:
    """Four steps; a checkpoint after two, from which another engine goes on to the same end."""
    run = pairs.Run()
    engine = _engine(ranks.made("llama", lean), stage, offload)
    _steps(engine, run, range(2))
    engine.save_checkpoint(str(folder / "checkpoint"))
    again = _engine(ranks.made("llama", lean), stage, offload)
    again.load_checkpoint(str(folder / "checkpoint"))
    for each in (engine, again):
        _steps(each, run, range(2, 4))
    assert run.losses[2:4] == run.losses[4:], "resumed otherwise than it was saved"
    with _gathered(again) as model:
        run.tensors = pairs.state_of(model)
    if stage == 3:
        run.tensors |= {f"saved {name}": each for name, each in _saved(folder / "final", again).items()}
    return run


def _saved(folder: Path, engine: Any) -> dict[str, torch.Tensor]:
    """A full model's tensors after loading what ZeRO-3 consolidated: so do accelerate and the Trainer save."""
    import transformers as hf

    state = engine._zero3_consolidated_16bit_state_dict()
    if dist.get_rank() == 0:
        engine.module.save_pretrained(folder, state_dict=state)
    dist.barrier()
    return pairs.state_of(hf.LlamaForSequenceClassification.from_pretrained(folder))


def moved(folder: Path) -> list[str]:
    """A state dict of one process through ZeRO-2 and ZeRO-3, and what they give through the others; names what differs."""
    first = ranks.made("llama", True)
    ranks.loop(first, first, "llama", pairs.Run())
    states = {"one process": pairs.state_of(first)}
    for stage in (2, 3):
        engine = _engine(ranks.made("llama", True), stage)
        with _gathered(engine, loads=True) as model:
            model.load_state_dict(states["one process"])
        with _gathered(engine) as model:
            states[f"one process in ZeRO-{stage}"] = pairs.state_of(model)
    wrong = [name for name, state in states.items() if not _equal(state, states["one process"])]
    return [*wrong, *(name for stage in (2, 3) for name in _elsewhere(stage))]


def _elsewhere(stage: int) -> list[str]:
    """Weights that ZeRO has trained, in one process, in DDP, in FSDP2 and without leanvocab."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    engine = _engine(ranks.made("llama", True), stage)
    _steps(engine, pairs.Run(), range(2))
    with _gathered(engine) as model:
        state = pairs.state_of(model)
    found = {}
    for name in ("one process", "DDP", "without leanvocab"):
        other = ranks.made("llama", name != "without leanvocab")
        target = nn.parallel.DistributedDataParallel(other).module if name == "DDP" else other
        target.load_state_dict(state)
        found[name] = pairs.state_of(other)
    sharded = ranks.sharded(ranks.made("llama", True))
    set_model_state_dict(sharded, dict(state), options=StateDictOptions(full_state_dict=True))
    found["FSDP2"] = {name: each.full_tensor() for name, each in sharded.state_dict().items()}
    return [f"ZeRO-{stage} in {name}" for name, each in found.items() if not _equal(each, state)]


def _equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def _trained(folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """An engine after two steps, and its full state."""
    engine = _engine(ranks.made("llama", True), 3)
    _steps(engine, pairs.Run(), range(2))
    with _gathered(engine) as model:
        return engine, pairs.state_of(model)


def saved_by_the_engine(folder: Path) -> list[str]:
    """What differs in a full model that loads the engine's file."""
    engine, state = _trained(folder)
    engine.save_16bit_model(str(folder))
    dist.barrier()
    full = ranks.made("llama", False)
    full.load_state_dict(torch.load(folder / "pytorch_model.bin"))
    return [] if _equal(pairs.state_of(full), state) else ["what the engine saved"]


def _in_fp32(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What zero_to_fp32.py makes of a checkpoint, and the full state."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    engine, state = _trained(folder)
    engine.save_checkpoint(str(folder / "checkpoint"))
    dist.barrier()
    return get_fp32_state_dict_from_zero_checkpoint(str(folder / "checkpoint")), state


def refused_as_it_is(folder: Path) -> Outcome:
    """What the script made has no vocabulary that could be compared."""
    made, _ = _in_fp32(folder)
    return pairs.refused(lambda: ranks.made("llama", True).load_state_dict(made))


def converted(folder: Path) -> list[str]:
    """What differs in a shrunk model that takes what the script made."""
    import leanvocab as lv

    (made, state), other = _in_fp32(folder), ranks.made("llama", True)
    with lv.partial_state_dicts(other):
        other.load_state_dict(made)
    return [] if _equal(pairs.state_of(other), state) else ["what zero_to_fp32.py made"]


def frozen(folder: Path) -> Outcome:
    """A step of a language model whose output layer is frozen in part."""
    engine = _engine(ranks.made("llama-tied", True), 3)
    return pairs.refused(lambda: engine(**ranks.share(0, "causal-lm")).loss.backward())
