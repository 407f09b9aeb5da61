"""Two processes: accelerate, DistributedDataParallel, FSDP2, checkpoints between them, counts over ranks."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from doors import models, pairs, ranks
from doors.registry import Outcome, door
from doors.trainer import APART

_CLOSE: Any = {"expects": "close", "within": 1e-3, "why": APART}


@functools.cache
def _given() -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return {**ranks.start(ranks.everything, folder), "folder": folder}  # type: ignore[no-any-return]


def _pair(kind: str, family: str, reference: str = "") -> Outcome:
    full, lean = _given()[f"{reference or kind} {family} False"], _given()[f"{kind} {family} True"]
    return pairs.compare(full, lean, models.left_out() if full.held_bytes and lean.held_bytes else None)


@door("DistributedDataParallel, two processes")
def ddp(folder: Path) -> Outcome:
    return _pair("ddp", "llama")


@door('DistributedDataParallel, two processes, tied language model, output="frozen"', **_CLOSE)
def ddp_tied(folder: Path) -> Outcome:
    return _pair("ddp", "llama-tied")


@door("FSDP2, two processes")
def fsdp(folder: Path) -> Outcome:
    return _pair("fsdp", "llama")


@door('FSDP2, two processes, tied language model, output="frozen" (beside DDP without leanvocab)', **_CLOSE)
def fsdp_tied(folder: Path) -> Outcome:
    return _pair("fsdp", "llama-tied", "ddp")


@door("accelerate, two processes: accumulation, clipping, save_state, load_state, save_model")
def accelerate(folder: Path) -> Outcome:
    return _pair("accelerate", "llama")


@door('accelerate, two processes, tied language model, output="frozen"', **_CLOSE)
def accelerate_tied(folder: Path) -> Outcome:
    return _pair("accelerate", "llama-tied")


@door(
    "two processes (DDP) beside one, both shrunk",
    expects="close",
    within=1e-3,
    why="gradients of two halves of a batch are added in another order; rows outside the vocabulary are the same bits",
)
def two_beside_one(folder: Path) -> Outcome:
    two, one = _given()["ddp llama True"], pairs.one_thread(ranks.alone)("llama", True)
    outside = torch.ones(models.FULL_SIZE, dtype=torch.bool)
    outside[torch.tensor(models.vocabulary().token_ids)] = False
    name = "model.embed_tokens.weight"
    if not torch.equal(two.tensors[name][outside], one.tensors[name][outside]):
        return Outcome("different", "rows outside the vocabulary differ", float("inf"))
    return pairs.compare(one, two)


@door("one checkpoint through one process, DDP, FSDP2, a sharded checkpoint on disk, and a run without leanvocab")
def checkpoints(folder: Path) -> Outcome:
    wrong = _given()["layouts"]
    return Outcome("different" if wrong else "identical", ", ".join(wrong), float("inf") if wrong else 0.0)


@door("transformers Trainer, two processes, with checkpoints")
def trainer(folder: Path) -> Outcome:
    both = [_run_of(_given()["folder"] / "trainer" / str(lean)) for lean in (False, True)]
    return pairs.compare(*both)


@door("transformers Trainer in one process, resumed from a checkpoint of two")
def resumed(folder: Path) -> Outcome:
    return pairs.compare(*(_resumed(folder / str(lean), lean) for lean in (False, True)))


def _run_of(folder: Path) -> pairs.Run:
    import json

    history = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    return pairs.Run(losses=[entry["loss"] for entry in history if "loss" in entry], folder=folder)


@pairs.one_thread
def _resumed(folder: Path, lean: bool) -> pairs.Run:
    import transformers

    from doors.trainer import arguments

    model = ranks.made("llama", lean)
    trainer = transformers.Trainer(
        model, arguments(folder, max_steps=4, save_strategy="no"), train_dataset=models.examples()
    )
    checkpoint = _given()["folder"] / "trainer" / str(lean) / "checkpoint-2"
    trainer.train(resume_from_checkpoint=str(checkpoint))
    run = pairs.Run(losses=[entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    run.tensors = pairs.state_of(model)
    return run


@door("counts of each rank's shard of a stream, added over ranks")
def counts(folder: Path) -> Outcome:
    added, whole = _given()["counts"]
    return Outcome("identical" if added == whole else "different", "", 0.0 if added == whole else float("inf"))


@door(
    "FSDP2, the full state dict of a sharded model",
    expects="refused",
    refuses="partial_state_dicts",
    why="no rank has all kept rows; gather the partial rows, and load them into a model of one process",
)
def full_state_of_a_shard(folder: Path) -> Outcome:
    return _given()["full state of a shard"]  # type: ignore[no-any-return]


@door(
    "FSDP2, shrunk after sharding",
    expects="refused",
    refuses="its weight is sharded over processes; shrink the model before sharding it",
    why="rows of a sharded matrix lie in several processes; shrink before sharding",
)
def shrunk_late(folder: Path) -> Outcome:
    return _given()["shrunk late"]  # type: ignore[no-any-return]


@door("DeepSpeed ZeRO-2, two processes", needs=("deepspeed",), fast=False)
def zero2(folder: Path) -> Outcome:
    return pairs.compare(*ranks.start(ranks.zero, folder, 2))


@door("DeepSpeed ZeRO-2, two processes, the optimizer offloaded to the host", needs=("deepspeed",), fast=False)
def zero2_offloaded(folder: Path) -> Outcome:
    return pairs.compare(*ranks.start(ranks.zero, folder, 2, offload_optimizer={"device": "cpu"}))


@door("DeepSpeed ZeRO-3, two processes, tensors gathered", needs=("deepspeed",), fast=False)
def zero3(folder: Path) -> Outcome:
    return pairs.compare(*ranks.start(ranks.zero, folder, 3))


@functools.cache
def _zero3_saved() -> tuple[int, Outcome]:
    with tempfile.TemporaryDirectory() as folder:
        return ranks.start(ranks.zero3_saved, Path(folder))  # type: ignore[no-any-return]


@door(
    "DeepSpeed ZeRO-3, stage3_gather_16bit_weights_on_model_save",
    expects="different",
    why="DeepSpeed gathers parameters around state dicts: the saved table has the partial rows alone, and loads into no "
    "full model; save within deepspeed.zero.GatheredParameters",
    needs=("deepspeed",),
    fast=False,
)
def zero3_consolidated(folder: Path) -> Outcome:
    rows = _zero3_saved()[0]
    if rows == models.FULL_SIZE:
        return Outcome("identical")
    return Outcome("different", f"{rows} of {models.FULL_SIZE} rows")


@door(
    "DeepSpeed ZeRO-3, engine.save_checkpoint",
    expects="refused",
    refuses="rows",
    why="no rank has all kept rows when the state dict is taken; save within deepspeed.zero.GatheredParameters",
    needs=("deepspeed",),
    fast=False,
)
def zero3_checkpoint(folder: Path) -> Outcome:
    return _zero3_saved()[1]


@door(
    'DeepSpeed ZeRO-3, tied language model (output="frozen")',
    expects="refused",
    refuses="rows were taken away after its forward",
    why="the loss reads the output layer's rows, which ZeRO-3 takes away as soon as the layer has been called",
    needs=("deepspeed",),
    fast=False,
)
def zero3_frozen(folder: Path) -> Outcome:
    return ranks.start(ranks.zero3_frozen, folder)  # type: ignore[no-any-return]
