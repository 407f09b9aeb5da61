"""sentence-transformers: losses, encoding during and after training, its own layout on disk."""

from pathlib import Path
from typing import Any

import torch

import leanvocab as lv
from doors import models, pairs, trl
from doors.registry import Outcome, door, real_file
from leanvocab.model import shrink_

_NEEDS = {"needs": ("sentence-transformers",), "pip": "'leanvocab[sentence-transformers]'"}


def small_encoder(folder: Path) -> Any:
    """A SentenceTransformer of a random RoBERTa, with mean pooling, on a CPU."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from transformers import RobertaModel

    if not folder.exists():
        RobertaModel(models.make_model("roberta").config).save_pretrained(folder)
        trl.tokenizer().save_pretrained(folder)
    module = Transformer(str(folder), max_seq_length=32)
    return SentenceTransformer(modules=[module, Pooling(module.get_embedding_dimension())], device="cpu")


def rows(kind: str) -> Any:
    """Pairs of texts, alone, with a score, or with a label."""
    import datasets

    texts = trl.texts()
    found = [{"sentence1": a, "sentence2": b} for a, b in zip(texts, texts[1:] + texts[:1], strict=True)]
    extra: dict[str, Any] = {"score": lambda i: i % 5 / 5, "label": lambda i: i % 2}.get(kind)  # type: ignore[assignment]
    return datasets.Dataset.from_list([each | ({kind: extra(i)} if extra else {}) for i, each in enumerate(found)])


def train(model: Any, folder: Path, data: Any, loss: Any, texts: list[str], **options: Any) -> pairs.Run:
    """One run of SentenceTransformerTrainer, encoding `texts` before each evaluation and afterwards."""
    import sentence_transformers as st
    from sentence_transformers.base.evaluation import BaseEvaluator

    run = pairs.Run(folder=folder)

    class Encode(BaseEvaluator):
        def __call__(self, model: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
            run.others[f"during {len(run.others)}"] = model.encode(texts).tolist()
            return {"zero": 0.0}

    defaults = {
        "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1, "report_to": [],
        "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "eval_strategy": "steps", "eval_steps": 3,
    }  # fmt: skip
    trainer = st.SentenceTransformerTrainer(
        model, st.SentenceTransformerTrainingArguments(str(folder), **defaults | options), train_dataset=data,
        loss=loss(model), evaluator=Encode(),
    )  # fmt: skip
    with pairs.held_bytes(run, model):
        trainer.train()
    run.others["after"] = model.encode(texts).tolist()
    model.save_pretrained(str(folder / "final"), create_model_card=False)
    run.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    run.tensors = pairs.state_of(model)
    run.others["loaded"] = st.SentenceTransformer(str(folder / "final"), device="cpu").encode(texts).tolist()
    return run


@pairs.one_thread
def pair(folder: Path, kind: str, loss: Any, **options: Any) -> Outcome:
    """The same on the full model and on the shrunk one; texts that are encoded have words that nobody counted."""
    texts = [*trl.texts()[:4], "w400 w401 w4"]
    full = train(small_encoder(folder / "base"), folder / "full", rows(kind), loss, texts, **options)
    shrunk = models.lean(small_encoder(folder / "base"))
    return pairs.compare(full, train(shrunk, folder / "lean", rows(kind), loss, texts, **options), models.left_out())


def _loss(name: str, **options: Any) -> Any:
    def made(model: Any) -> Any:
        from sentence_transformers import losses

        return getattr(losses, name)(model, **options)

    return made


@door("SentenceTransformerTrainer, MultipleNegativesRankingLoss; encode during and after; its own layout", **_NEEDS)
def ranking(folder: Path) -> Outcome:
    return pair(folder, "pairs", _loss("MultipleNegativesRankingLoss"))


@door("SentenceTransformerTrainer, CosineSimilarityLoss", fast=False, **_NEEDS)
def cosine(folder: Path) -> Outcome:
    return pair(folder, "score", _loss("CosineSimilarityLoss"))


@door("SentenceTransformerTrainer, CachedMultipleNegativesRankingLoss (gradient caching)", fast=False, **_NEEDS)
def cached(folder: Path) -> Outcome:
    return pair(folder, "pairs", _loss("CachedMultipleNegativesRankingLoss", mini_batch_size=2))


@door("SentenceTransformerTrainer, ContrastiveLoss, gradient accumulation, bf16 autocast", **_NEEDS)
def contrastive(folder: Path) -> Outcome:
    return pair(folder, "label", _loss("ContrastiveLoss"), gradient_accumulation_steps=2, bf16=True)


def _real(folder: Path, name: str, languages: tuple[str, ...], prompt: str = "") -> Outcome:
    """Sentences of XNLI and what follows from them, in several languages; unseen ones are encoded afterwards."""
    import datasets
    import pyarrow.parquet
    from sentence_transformers import SentenceTransformer

    found: list[dict[str, str]] = []
    for language in languages:
        path = real_file(f"data/xnli/xnli.{language}.validation.parquet")
        entailed = [row for row in pyarrow.parquet.read_table(path).to_pylist() if row["label"] == 0]
        found += [{"anchor": prompt + row["premise"], "positive": prompt + row["hypothesis"]} for row in entailed[:32]]
        unseen = [prompt + row["premise"] for row in entailed[-4:]]
    data = datasets.Dataset.from_list(found)
    path = str(real_file(f"models/{name}"))
    torch.manual_seed(0)  # a checkpoint may have no pooler
    encoder = SentenceTransformer(path, device="cpu")
    counts = lv.count_tokens(encoder.tokenizer([text for row in found for text in row.values()])["input_ids"])
    vocabulary = lv.PartialVocabulary.from_counts(counts, tokenizer=encoder.tokenizer, model=encoder[0].auto_model)
    options = {"learning_rate": 2e-5, "per_device_train_batch_size": 4, "max_steps": 3, "eval_steps": 2}
    loss = _loss("MultipleNegativesRankingLoss")
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
