"""Vocabularies that grow while the model trains, from the ids that are inserted alone; not counted beforehand."""

import functools
from pathlib import Path
from typing import Any

from torch import nn

import leanvocab as lv
from doors import loop, models, pairs, sentence_transformers, trainer
from doors.registry import Outcome, door

_ST: dict[str, Any] = {"needs": ("sentence-transformers",), "pip": "'leanvocab[sentence-transformers]'"}


def growing(model: Any, **options: Any) -> Any:
    """A model that has the rows of the ids that it inserts."""
    return lv.shrink_(model, on_missing="extend", **options)


def _rows_came(model: nn.Module) -> None:
    tables = lv.status(model).tables
    assert 3 < max(table.num_rows for table in tables) <= models.FULL_SIZE, "no rows came"


@pairs.one_thread
def _of_trainer(
    folder: Path, family: str = "roberta", *, make: dict[str, Any] | None = None, **options: Any
) -> Outcome:
    """Clipping sums the squares of all gradients, absent rows' zeros among them: their order is the one thing that differs."""
    shrink = options.pop("shrink", {})
    options = {"max_grad_norm": 0} | options
    full = trainer.train(models.make_model(family, **make or {}), folder / "full", **options)
    model = growing(models.make_model(family, **make or {}), **shrink)
    lean = trainer.train(model, folder / "lean", **options)
    _rows_came(model)
    return pairs.compare(full, lean)


@door("Trainer, a vocabulary that grows; its checkpoints")
def of_trainer(folder: Path) -> Outcome:
    return _of_trainer(folder, save_strategy="steps", save_steps=3)


@door("Trainer, a vocabulary that grows, gradient accumulation and checkpointing")
def accumulated(folder: Path) -> Outcome:
    return _of_trainer(
        folder, per_device_train_batch_size=2, gradient_accumulation_steps=2, gradient_checkpointing=True
    )


@door('Seq2SeqTrainer, a vocabulary that grows (encoder and decoder, output="full")')
def seq2seq(folder: Path) -> Outcome:
    return _of_trainer(folder, "bart-untied", task="seq2seq-lm", shrink={"output": "full"})


@door("Trainer, a vocabulary that grows, resumed from checkpoints of a grown run and of an ordinary one")
@pairs.one_thread
def resumed(folder: Path) -> Outcome:
    """Three runs of six steps from a third: ordinary from ordinary, grown from grown, grown from ordinary."""
    saving = {"save_strategy": "steps", "save_steps": 3, "max_grad_norm": 0}
    made = {"full": models.make_model, "grown": lambda family: growing(models.make_model(family))}
    for name, make in made.items():
        trainer.train(make("roberta"), folder / name, **saving)
    outcomes = []
    for first in ("full", "grown"):
        runs = []
        for name, source in (("full", "full"), ("grown", first)):
            resume = {"resume_from_checkpoint": str(folder / source / "checkpoint-3")}
            run = trainer.train(made[name]("roberta"), folder / f"{name} from {source}", resume=resume, **saving)
            run.folder = run.folder / "final" if run.folder else None
            runs.append(run)
        outcomes.append(pairs.compare(*runs))
    return max(outcomes, key=lambda each: (each.verdict != "identical", each.difference))


@door("plain loop, a vocabulary that grows, fp16 autocast and a scaler that leaves out steps")
@pairs.one_thread
def scaled(folder: Path) -> Outcome:
    import torch

    full = loop.train(models.make_model("roberta"), folder / "full", autocast=torch.float16)
    lean = loop.train(growing(models.make_model("roberta")), folder / "lean", autocast=torch.float16)
    return pairs.compare(full, lean)


@pairs.one_thread
def _of_sentences(folder: Path, loss: str, **options: Any) -> Outcome:
    """Two columns of one loss: two lookups of one graph, and rows come in both."""
    data, texts = sentence_transformers.rows("pairs"), sentence_transformers.trl.texts()[:4]
    runs = []
    for name, change in (("full", lambda model: model), ("lean", growing)):
        model = change(sentence_transformers.small_encoder(folder / "base"))
        made = functools.partial(_loss, loss, options)
        runs.append(sentence_transformers.train(model, folder / name, data, made, texts, max_grad_norm=0))
    return pairs.compare(*runs)


def _loss(name: str, options: dict[str, Any], model: Any) -> Any:
    import sentence_transformers.sentence_transformer.losses as losses

    return getattr(losses, name)(model, **options)


@door("SentenceTransformerTrainer, a vocabulary that grows, MultipleNegativesRankingLoss", **_ST)
def ranking(folder: Path) -> Outcome:
    return _of_sentences(folder, "MultipleNegativesRankingLoss")


@door("SentenceTransformerTrainer, a vocabulary that grows, CachedMultipleNegativesRankingLoss", fast=False, **_ST)
def cached(folder: Path) -> Outcome:
    return _of_sentences(folder, "CachedMultipleNegativesRankingLoss", mini_batch_size=2)


@door(
    "Trainer, a vocabulary that grows under DistributedDataParallel",
    expects="refused",
    refuses="no rows can come here while the model trains",
    why="each process would get other rows; count first",
)
def in_parallel(folder: Path) -> Outcome:
    import torch

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(growing(models.make_model("roberta")).train())
        row = models.examples()[0]
        batch = {name: torch.as_tensor(value)[None] for name, value in row.items()}
        return pairs.refused(lambda: model(**batch))
    finally:
        torch.distributed.destroy_process_group()
