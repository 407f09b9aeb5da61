"""Two processes: accelerate, DistributedDataParallel, FSDP2, the Trainer; counts over ranks."""

import functools
from pathlib import Path
from typing import Any

import torch

from doors import models, pairs, ranks
from doors.registry import SLOW, Outcome, door
from doors.trainer import APART

_CLOSE: Any = {"expects": "close", "within": 1e-3, "why": APART}


@functools.cache
def _given() -> dict[str, Any]:
    return ranks.kept(ranks.everything)  # type: ignore[no-any-return]


def _pair(kind: str, family: str, reference: str = "") -> Outcome:
    full, lean = _given()[f"{reference or kind} {family} False"], _given()[f"{kind} {family} True"]
    return pairs.compare(full, lean, models.left_out() if full.held_bytes and lean.held_bytes else None)


@door("DistributedDataParallel, two processes")
def ddp(folder: Path) -> Outcome:
    return _pair("ddp", "llama")


@door('DistributedDataParallel, two processes, tied language model, output="frozen"', **_CLOSE, **SLOW)
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
    "a checkpoint of two processes (DDP or FSDP2), shrunk, beside one of one process without leanvocab",
    expects="close",
    within=1e-3,
    why="gradients of two halves of a batch are added in another order; rows that no batch has, kept or not, are the same bits",
)
def two_beside_one(folder: Path) -> Outcome:
    one = pairs.one_thread(ranks.alone)("llama", False)
    untouched = torch.ones(models.FULL_SIZE, dtype=torch.bool)
    untouched[torch.cat([ranks.share(step, "classification")["input_ids"] for step in range(4)])] = False
    kept = torch.tensor(models.vocabulary().token_ids)
    assert untouched[kept].any(), "some kept rows are in no batch"
    outcomes = []
    for two in (_given()["ddp llama True"], _given()["fsdp llama True"]):
        name = "model.embed_tokens.weight"
        if not torch.equal(two.tensors[name][untouched], one.tensors[name][untouched]):
            return Outcome("different", "rows that no batch has differ", float("inf"))
        outcomes.append(pairs.compare(one, pairs.Run(two.losses, two.tensors)))
    return max(outcomes, key=lambda each: each.difference)


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
    return pairs.nothing_wrong([] if added == whole else ["the counts"])


@door(
    "FSDP2, shrunk after sharding",
    expects="refused",
    refuses="its weight is sharded over processes; shrink the model before sharding it",
    why="rows of a sharded matrix lie in several processes; shrink before sharding",
)
def shrunk_late(folder: Path) -> Outcome:
    return _given()["shrunk late"]  # type: ignore[no-any-return]
