"""sentence-transformers: losses, encoding during and after training, its own layout on disk."""

import functools
import importlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import leanvocab as lv
from doors import models, pairs, trl
from doors.registry import SLOW, Outcome, door, real_file
from doors.trainer import CLOSE
from leanvocab.model.shrink import shrink_

_NEEDS: dict[str, Any] = {"needs": ("sentence-transformers",), "pip": "'leanvocab[sentence-transformers]'"}


def small_encoder(folder: Path) -> Any:
    """A SentenceTransformer of a random RoBERTa, with mean pooling, on a CPU."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling

    module = transformer(folder, "RobertaModel")
    return SentenceTransformer(modules=[module, Pooling(module.get_embedding_dimension())], device="cpu")


def cross_encoder(folder: Path) -> Any:
    """A CrossEncoder of a random RoBERTa, which scores pairs of texts."""
    from sentence_transformers import CrossEncoder

    _save_model(folder, "RobertaForSequenceClassification", num_labels=1)
    return CrossEncoder(str(folder), max_length=48, device="cpu")


def autoencoder(folder: Path) -> Any:
    """A SparseEncoder of a random RoBERTa, with a sparse autoencoder on top of its mean."""
    from sentence_transformers import SparseEncoder
    from sentence_transformers.models import Pooling
    from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder

    torch.manual_seed(0)
    top = SparseAutoEncoder(input_dim=models.DIM, hidden_dim=4 * models.DIM, k=16, k_aux=32)
    module = transformer(folder, "RobertaModel")
    return SparseEncoder(modules=[module, Pooling(models.DIM), top], device="cpu")


def splade(folder: Path, **changes: Any) -> Any:
    """A SparseEncoder of a random RoBERTa with its masked language model's head: a score for each token of the vocabulary."""
    from sentence_transformers import SparseEncoder
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    module = transformer(folder, "RobertaForMaskedLM", transformer_task="fill-mask", **changes)
    return SparseEncoder(modules=[module, SpladePooling()], device="cpu")


def transformer(folder: Path, name: str, transformer_task: str = "feature-extraction", **changes: Any) -> Any:
    """The module of a random RoBERTa, of the class that is named."""
    from sentence_transformers.models import Transformer

    _save_model(folder, name, **changes)
    return Transformer(str(folder), max_seq_length=32, transformer_task=transformer_task)


def _save_model(folder: Path, name: str, **changes: Any) -> None:
    import transformers as hf

    if not folder.exists():
        config = models.make_model("roberta", **changes).config
        torch.manual_seed(0)
        getattr(hf, name)(config).save_pretrained(folder)
        trl.tokenizer().save_pretrained(folder)


def rows(kind: str) -> Any:
    """48 pairs of texts, alone, with a score, or with a label; or lists of texts for each query."""
    import datasets

    texts = trl.texts()
    both = [pair for by in (1, 2, 3) for pair in zip(texts, texts[by:] + texts[:by], strict=True)]
    found = [{"sentence1": a, "sentence2": b} for a, b in both]
    if kind == "lists":
        queries = [(texts[i], [texts[i - 1], texts[i - 2], texts[i - 3]]) for i in range(len(texts))]
        return datasets.Dataset.from_list([{"query": q, "docs": docs, "labels": [1, 0, 0]} for q, docs in queries])
    extra: dict[str, Any] = {"score": lambda i: i % 5 / 5, "label": lambda i: i % 2}.get(kind)  # type: ignore[assignment]
    return datasets.Dataset.from_list([each | ({kind: extra(i)} if extra else {}) for i, each in enumerate(found)])


def encoded(model: Any, texts: list[str]) -> list[Any]:
    """Numbers that a model makes of texts: embeddings, or scores of neighbouring ones where it takes pairs."""
    if hasattr(model, "rank"):
        return model.predict(list(itertools.pairwise(texts))).tolist()  # type: ignore[no-any-return]
    found = model.encode(texts)
    if isinstance(found, list):  # a vector for each token
        return [vectors.tolist() for vectors in found]
    return (found.to_dense() if isinstance(found, torch.Tensor) else found).tolist()


def train(model: Any, folder: Path, data: Any, loss: Any, texts: list[str], **options: Any) -> pairs.Run:
    """One run of the trainer that fits the model, encoding `texts` before each evaluation and afterwards."""
    import sentence_transformers as st
    from sentence_transformers.base.evaluation import BaseEvaluator

    run = pairs.Run(folder=folder)

    class Encode(BaseEvaluator):
        def __call__(self, model: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
            run.others[f"during {len(run.others)}"] = encoded(model, texts)
            return {"zero": 0.0}

    defaults = {
        "max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1, "report_to": [],
        "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "eval_strategy": "steps", "eval_steps": 6,
    }  # fmt: skip
    resume = options.pop("resume", {})
    kind = type(model).__name__
    trainer = getattr(st, f"{kind}Trainer")(
        model, getattr(st, f"{kind}TrainingArguments")(str(folder), **defaults | options), train_dataset=data,
        eval_dataset=_few(data), loss=loss(model), evaluator=Encode(),
    )  # fmt: skip
    with pairs.held_bytes(run, model):
        trainer.train(**resume)
    run.others["after"] = encoded(model, texts)
    model.save_pretrained(str(folder / "final"), create_model_card=False)
    run.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    run.others["best"] = trainer.state.best_global_step
    run.others["scores"] = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    run.tensors = pairs.state_of(model)
    run.others["loaded"] = encoded(type(model)(str(folder / "final"), device="cpu"), texts)
    return run


def _few(data: Any) -> Any:
    return {name: _few(each) for name, each in data.items()} if isinstance(data, dict) else data.select(range(8))


@pairs.one_thread
def pair(folder: Path, kind: str, loss: Any, make: Callable[[Path], Any] = small_encoder, **options: Any) -> Outcome:
    """The same on the full model and on the shrunk one; texts that are encoded have words that nobody counted."""
    frozen, data = options.pop("output", None) == "frozen", rows(kind)
    full = make(folder / "base")
    full = train(models.masked(full) if frozen else full, folder / "full", data, loss, _texts(), **options)
    lean = train(models.lean(make(folder / "base")), folder / "lean", data, loss, _texts(), **options)
    return pairs.compare(full, lean, models.left_out())


def _texts() -> list[str]:
    return [*trl.texts()[:4], "w400 w401 w4"]


def loss_of(name: str, of: str = "sentence_transformer", **options: Any) -> Any:
    """A function that makes a loss of sentence-transformers for a model."""

    def made(model: Any) -> Any:
        return getattr(importlib.import_module(f"sentence_transformers.{of}.losses"), name)(model, **options)

    return made


@door(
    "SentenceTransformerTrainer, MultipleNegativesRankingLoss; encode during and after; its own layout",
    **_NEEDS,
    **SLOW,
)
def ranking(folder: Path) -> Outcome:
    return pair(folder, "pairs", loss_of("MultipleNegativesRankingLoss"))


@door("SentenceTransformerTrainer, CosineSimilarityLoss", fast=False, **_NEEDS)
def cosine(folder: Path) -> Outcome:
    return pair(folder, "score", loss_of("CosineSimilarityLoss"))


@door("SentenceTransformerTrainer, CachedMultipleNegativesRankingLoss (gradient caching)", fast=False, **_NEEDS)
def cached(folder: Path) -> Outcome:
    return pair(folder, "pairs", loss_of("CachedMultipleNegativesRankingLoss", mini_batch_size=2))


@door("SentenceTransformerTrainer, ContrastiveLoss, gradient accumulation, bf16 autocast", **_NEEDS)
def contrastive(folder: Path) -> Outcome:
    return pair(folder, "label", loss_of("ContrastiveLoss"), gradient_accumulation_steps=2, max_steps=8, bf16=True)


@door(
    "SentenceTransformerTrainer, its checkpoints: load_best_model_at_end, resumed from one of the run without leanvocab",
    fast=False,
    **_NEEDS,
)
@pairs.one_thread
def checkpoints(folder: Path) -> Outcome:
    """Eight steps, and again from the ordinary run's fourth; both times the best model is not the last."""
    loss, data = loss_of("MultipleNegativesRankingLoss"), rows("pairs")
    saving = {"save_strategy": "steps", "save_steps": 2, "eval_steps": 2, "load_best_model_at_end": True}
    options = {**saving, "max_steps": 8, "learning_rate": 3e-3, "lr_scheduler_type": "constant"}
    made = {"full": small_encoder, "lean": lambda base: models.lean(small_encoder(base))}
    outcomes = []
    for resume in ({}, {"resume_from_checkpoint": str(folder / "full" / "checkpoint-4")}):
        runs = []
        for name, make in made.items():
            run = train(make(folder / "base"), folder / name, data, loss, _texts(), resume=resume, **options)
            assert 0 < run.others["best"] < 8, "the best model is not the last"
            run.folder = (
                folder / name / ("final" if resume else "")
            )  # a resumed run's state names the folder of the first
            runs.append(run)
        outcomes.append(pairs.compare(*runs, models.left_out()))
    return max(outcomes, key=lambda each: (each.verdict != "identical", each.difference))


@door("CrossEncoderTrainer, BinaryCrossEntropyLoss; predict during and after; its own layout", **_NEEDS, fast=False)
def reranking(folder: Path) -> Outcome:
    return pair(folder, "label", loss_of("BinaryCrossEntropyLoss", "cross_encoder"), cross_encoder)


@door("SparseEncoderTrainer, CSRLoss: a sparse autoencoder on an encoder", **_NEEDS, fast=False)
def sparse_autoencoder(folder: Path) -> Outcome:
    return pair(folder, "pairs", loss_of("CSRLoss", "sparse_encoder"), autoencoder)


def _splade_loss(model: Any) -> Any:
    from sentence_transformers.sparse_encoder import losses

    ranking = losses.SparseMultipleNegativesRankingLoss(model)
    return losses.SpladeLoss(model, ranking, document_regularizer_weight=1e-3, query_regularizer_weight=1e-3)


@door('SparseEncoderTrainer, SpladeLoss, an untied head (output="full")', **_NEEDS, fast=False)
def sparse_untied(folder: Path) -> Outcome:
    return pair(folder, "pairs", _splade_loss, functools.partial(splade, tie_word_embeddings=False))


@door(
    'SparseEncoderTrainer, SpladeLoss, a tied head (output="frozen")',
    **CLOSE,
    **_NEEDS,
)
def sparse_tied(folder: Path) -> Outcome:
    return pair(folder, "pairs", _splade_loss, splade, output="frozen")


def _real(folder: Path, name: str, languages: tuple[str, ...], prompt: str = "") -> Outcome:
    """Sentences of XNLI and what follows from them, in several languages; unseen ones are encoded afterwards."""
    import datasets
    import pyarrow.parquet
    from sentence_transformers import SentenceTransformer

    found: list[dict[str, str]] = []
    unseen: list[str] = []
    for language in languages:
        path = real_file(f"data/xnli/xnli.{language}.validation.parquet")
        entailed = [row for row in pyarrow.parquet.read_table(path).to_pylist() if row["label"] == 0]
        found += [{"anchor": prompt + row["premise"], "positive": prompt + row["hypothesis"]} for row in entailed[:64]]
        unseen += [prompt + row["premise"] for row in entailed[-4:]]
    data = datasets.Dataset.from_list(found)
    path = str(real_file(f"models/{name}"))
    torch.manual_seed(0)  # a checkpoint may have no pooler
    encoder = SentenceTransformer(path, device="cpu")
    counts = lv.count_tokens(encoder.tokenizer([text for row in found for text in row.values()])["input_ids"])
    vocabulary = lv.PartialVocabulary.from_counts(counts, tokenizer=encoder.tokenizer, model=encoder[0].auto_model)
    options = {"learning_rate": 2e-5, "per_device_train_batch_size": 4, "max_steps": 6, "eval_steps": 4}
    loss = loss_of("MultipleNegativesRankingLoss")
    full = train(encoder, folder / "full", data, loss, unseen, **options)
    torch.manual_seed(0)
    shrunk = shrink_(SentenceTransformer(path, device="cpu"), vocabulary)
    table = lv.status(shrunk).tables[0]
    lean = train(shrunk, folder / "lean", data, loss, unseen, **options)
    return pairs.compare(full, lean, (table.full_size - table.num_rows) * table.embedding_dim)


@door(
    "SentenceTransformerTrainer on all-MiniLM-L6-v2, English NLI",
    files=("models/minilm", "data/xnli"), fast=False, **_NEEDS,
)  # fmt: skip
def minilm(folder: Path) -> Outcome:
    return pairs.one_thread(_real)(folder, "minilm", ("en",))


@door(
    "SentenceTransformerTrainer on multilingual-e5-small, NLI in seven languages",
    files=("models/e5-small", "data/xnli"), fast=False, **_NEEDS,
)  # fmt: skip
def e5_small(folder: Path) -> Outcome:
    return pairs.one_thread(_real)(folder, "e5-small", ("ar", "de", "en", "sw", "th", "ur", "zh"), "query: ")
