"""FSDP2 by accelerate and by the Trainer, which offer it on GPUs: on a CPU two processes are told that they have one each."""

import functools
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import leanvocab as lv
from doors import models, pairs, ranks
from doors.registry import Outcome, door


@functools.cache
def _accelerated(in_ram_once: bool) -> list[pairs.Run]:
    return [ranks.kept(accelerated, lean, in_ram_once) for lean in (False, True)]


@functools.cache
def _trained(clips: bool) -> list[pairs.Run]:
    return [ranks.kept(trained, lean, clips) for lean in (False, True)]


@door(
    "accelerate with FSDP2, two processes, without clipping: save_state, load_state, save_model",
    needs="accelerate",
    fast=False,
)
def accelerate(folder: Path) -> Outcome:
    return pairs.compare(*_accelerated(False))


@door(
    "accelerate with FSDP2, two processes, without clipping, cpu_ram_efficient_loading", needs="accelerate", fast=False
)
def accelerate_ram(folder: Path) -> Outcome:
    return pairs.compare(*_accelerated(True))


_TRAINER: Any = {"needs": "accelerate", "fast": False}


@door(
    "transformers Trainer with FSDP2, two processes, without clipping: sharded checkpoints, resumed, the full model saved",
    **_TRAINER,
)
def trainer(folder: Path) -> Outcome:
    return pairs.compare(*_trained(False))


@door(
    "transformers Trainer with FSDP2, two processes, its defaults: sharded checkpoints, resumed, the full model saved",
    expects="close",
    within=1e-6,
    why="the gradient's norm, by which it is clipped, is added up over the shares of the ranks, which hold other rows",
    **_TRAINER,
)
def trainer_clips(folder: Path) -> Outcome:
    return pairs.compare(*_trained(True))


@door("FSDP2, the full state dict of a sharded model, saved and loaded by transformers without leanvocab", fast=False)
def full_state_dict(folder: Path) -> Outcome:
    return pairs.compare(*(ranks.kept(saved_in_full, lean) for lean in (False, True)))


# --- in two processes -------------------------------------------------------------------------------------------------


def _pretend_gpus() -> None:
    """accelerate decides by the device whether it shards; what it does then works with gloo on CPUs."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


def accelerated(folder: Path, lean: bool, in_ram_once: bool) -> pairs.Run:
    """Two steps, a saved state, two steps, that state loaded, two steps: the last are to be as those before."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    _pretend_gpus()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=in_ram_once,
    )
    accelerator = Accelerator(fsdp_plugin=plugin)
    made = ranks.made("llama", lean)
    optimizer: Any = torch.optim.AdamW(made.parameters(), lr=1e-2, weight_decay=0.0)
    model, optimizer = accelerator.prepare(made, optimizer)
    run = pairs.Run()

    def steps(first: int, last: int) -> None:
        for step in range(first, last):
            loss = model(**ranks.share(step, "classification")).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            run.losses.append(ranks.mean(loss))

    steps(0, 2)
    accelerator.save_state(str(folder / "state"))
    steps(2, 4)
    accelerator.load_state(str(folder / "state"))
    steps(2, 4)
    assert run.losses[2:4] == run.losses[4:], "resumed otherwise than it was saved"
    run.tensors = dict(accelerator.get_state_dict(model))
    accelerator.save_model(model, str(folder / "model"))
    return run


def trained(folder: Path, lean: bool, clips: bool) -> pairs.Run:
    """Four steps with a checkpoint after each two, again from the first checkpoint, and the full model saved."""
    import transformers as hf

    from doors.trainer import arguments

    _pretend_gpus()
    sharding = {
        "version": 2,
        "state_dict_type": "SHARDED_STATE_DICT",
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    }
    run = pairs.Run()
    for resume in (None, str(folder / "checkpoint-2")):
        chosen = arguments(
            folder, use_cpu=False, per_device_train_batch_size=2, max_steps=4, save_strategy="steps", save_steps=2,
            ddp_backend="gloo", fsdp=True, fsdp_config=sharding, max_grad_norm=1.0 if clips else 0.0,
        )  # fmt: skip
        trainer = hf.Trainer(ranks.made("llama", lean), chosen, train_dataset=models.examples())
        trainer.train(resume_from_checkpoint=resume)
        run.losses += [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder / "final"))
    dist.barrier()
    run.tensors = _loaded_plainly(folder / "final")
    return run


def saved_in_full(folder: Path, lean: bool) -> pairs.Run:
    """A plain loop; the ranks put their shares together, and the first one saves."""
    model = ranks.sharded(ranks.made("llama", lean))
    run = ranks.loop(model, model, "llama", pairs.Run())
    state = ranks.gathered(model)
    if dist.get_rank() == 0:
        model.save_pretrained(folder / "final", state_dict=state)
    dist.barrier()
    run.tensors = _loaded_plainly(folder / "final")
    return run


def _loaded_plainly(folder: Path) -> dict[str, torch.Tensor]:
    import transformers as hf

    assert json.loads((folder / "config.json").read_text())["vocab_size"] == models.FULL_SIZE
    loaded = hf.LlamaForSequenceClassification.from_pretrained(folder)
    assert not lv.status(loaded)
    return pairs.state_of(loaded)
