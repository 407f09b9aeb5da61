"""sentence-transformers, further: its other models, losses that change others, data sets of several kinds, older paths."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from doors import models, pairs, trl
from doors import sentence_transformers as sentences
from doors.registry import SLOW, Outcome, door

_NEEDS: dict[str, Any] = {"needs": ("sentence-transformers",), "pip": "'leanvocab[sentence-transformers]'"}
_RANKING = "MultipleNegativesRankingLoss"
_PROMPTS = {"sentence1": "w2 ", "sentence2": "w0 w2 "}


def static_encoder(folder: Path, **options: Any) -> Any:
    """A SentenceTransformer that is a bag of word vectors."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import StaticEmbedding
    from torch import nn

    torch.manual_seed(0)
    bag = StaticEmbedding(trl.tokenizer(), embedding_dim=models.DIM)
    bag.embedding = nn.EmbeddingBag(models.FULL_SIZE, models.DIM, **options)
    return SentenceTransformer(modules=[bag], device="cpu")


def late_interaction(folder: Path) -> Any:
    """A MultiVectorEncoder (ColBERT's kind): a vector for each token, narrowed by a layer."""
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.models import Dense, Normalize
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    transformer = sentences.transformer(folder, "RobertaModel")
    torch.manual_seed(0)
    of_tokens = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
    narrow = Dense(models.DIM, 16, bias=False, activation_function=torch.nn.Identity(), **of_tokens)
    return MultiVectorEncoder(modules=[transformer, narrow, MultiVectorMask(), Normalize(**of_tokens)], device="cpu")


def like(folder: Path, name: str) -> Any:
    """A tiny encoder of the structure of a real one: its modules in their order, and its architecture."""
    import transformers as hf
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense, Normalize, Pooling, Transformer

    config, pooling, dense = _structure(name)
    if not folder.exists():
        torch.manual_seed(0)
        hf.AutoModel.from_config(config).save_pretrained(folder)
        trl.tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    layers = [Dense(*sizes, bias=bias, activation_function=kind()) for *sizes, bias, kind in dense]
    modules = [
        Transformer(str(folder), max_seq_length=32),
        Pooling(models.DIM, pooling_mode=pooling),
        *layers,
        Normalize(),
    ]
    return SentenceTransformer(modules=modules, device="cpu")


def _structure(name: str) -> tuple[Any, str, list[tuple[Any, ...]]]:
    import transformers as hf

    sizes: dict[str, Any] = {
        "vocab_size": models.FULL_SIZE, "hidden_size": models.DIM, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
    }  # fmt: skip
    if name == "EmbeddingGemma":
        config = hf.Gemma3TextConfig(**sizes, num_key_value_heads=1, head_dim=16, use_bidirectional_attention=True)
        return config, "mean", [(models.DIM, 96, False, torch.nn.Identity), (96, models.DIM, False, torch.nn.Identity)]
    if name == "LaBSE":
        return hf.BertConfig(**sizes), "cls", [(models.DIM, models.DIM, True, torch.nn.Tanh)]
    return hf.XLMRobertaConfig(**sizes), "cls" if name == "BGE-M3" else "mean", []


@door("StaticEmbedding (nn.EmbeddingBag), MultipleNegativesRankingLoss", **_NEEDS)
def static(folder: Path) -> Outcome:
    return sentences.pair(folder, "pairs", sentences.loss_of(_RANKING), static_encoder)


@door("StaticEmbedding, MatryoshkaLoss; a maximum in place of the mean", **_NEEDS, **SLOW)
def static_matryoshka(folder: Path) -> Outcome:
    return sentences.pair(folder, "pairs", _matryoshka(_RANKING), functools.partial(static_encoder, mode="max"))


def _matryoshka(inner: str) -> Callable[[Any], Any]:
    def made(model: Any) -> Any:
        of_all = sentences.loss_of(inner)(model)
        return sentences.loss_of("MatryoshkaLoss", loss=of_all, matryoshka_dims=[models.DIM, 32, 8])(model)

    return made


@door("SentenceTransformerTrainer, MatryoshkaLoss of three widths, with gradient caching", **_NEEDS, **SLOW)
def matryoshka(folder: Path) -> Outcome:
    return sentences.pair(folder, "pairs", _matryoshka("CachedMultipleNegativesRankingLoss"))


@door("SentenceTransformerTrainer, CachedGISTEmbedLoss with a guide that is not shrunk", **_NEEDS, **SLOW)
def cached_gist(folder: Path) -> Outcome:
    guide = sentences.small_encoder(folder / "guide")
    return sentences.pair(folder, "pairs", sentences.loss_of("CachedGISTEmbedLoss", guide=guide, mini_batch_size=2))


@door("SentenceTransformerTrainer, prompts for each column", **_NEEDS, **SLOW)
def prompts(folder: Path) -> Outcome:
    return sentences.pair(folder, "pairs", sentences.loss_of(_RANKING), prompts=_PROMPTS)


@door("SentenceTransformerTrainer, two data sets with a loss each, in turn", **_NEEDS, **SLOW)
@pairs.one_thread
def several_data_sets(folder: Path) -> Outcome:
    data = {"pairs": sentences.rows("pairs"), "scored": sentences.rows("score")}

    def losses(model: Any) -> Any:
        return {
            "pairs": sentences.loss_of(_RANKING)(model),
            "scored": sentences.loss_of("CosineSimilarityLoss")(model),
        }

    runs = [
        sentences.train(model, folder / name, data, losses, trl.texts()[:4], multi_dataset_batch_sampler="round_robin")
        for name, model in _both(folder)
    ]
    return pairs.compare(*runs, models.left_out())


def _both(folder: Path, make: Callable[[Path], Any] = sentences.small_encoder) -> list[tuple[str, Any]]:
    return [("full", make(folder / "base")), ("lean", models.lean(make(folder / "base")))]


@door("mine_hard_negatives by a model that trains, and training on what was mined", **_NEEDS, **SLOW)
@pairs.one_thread
def mining(folder: Path) -> Outcome:
    from sentence_transformers import mine_hard_negatives

    runs = []
    for name, model in _both(folder):
        loss, data = sentences.loss_of(_RANKING), sentences.rows("pairs").select(range(16))
        sentences.train(model, folder / f"{name} before", data, loss, [], max_steps=4)
        mined = mine_hard_negatives(data, model, num_negatives=1, verbose=False)
        run = sentences.train(model, folder / name, mined, loss, trl.texts()[:4])
        run.others["mined"] = mined.to_list()
        runs.append(run)
    return pairs.compare(*runs, models.left_out())


@door(
    "SentenceTransformer.old_fit, as before version 3: InputExample, DataLoader, warm-up, weight decay of 0", **_NEEDS
)
@pairs.one_thread
def old_fit(folder: Path) -> Outcome:
    from sentence_transformers import InputExample
    from torch.utils.data import DataLoader

    runs = []
    for name, model in _both(folder):
        run = pairs.Run(folder=folder / name)
        examples = [InputExample(texts=list(row.values())) for row in sentences.rows("pairs").to_list()]
        loss = sentences.loss_of(_RANKING)(model)
        loss.register_forward_hook(lambda _, args, value, run=run: run.losses.append(value.item()))
        torch.manual_seed(0)
        with pairs.held_bytes(run, model):
            model.old_fit(
                [(DataLoader(examples, batch_size=4, shuffle=True), loss)], epochs=1, warmup_steps=4, weight_decay=0.0,
                optimizer_params={"lr": 1e-3}, show_progress_bar=False,
            )  # fmt: skip
        run.others["after"], run.tensors = sentences.encoded(model, trl.texts()[:4]), pairs.state_of(model)
        model.save_pretrained(str(folder / name / "final"), create_model_card=False)
        runs.append(run)
    return pairs.compare(*runs, models.left_out())


@door("MultiVectorEncoderTrainer (late interaction), MultiVectorMultipleNegativesRankingLoss", **_NEEDS, **SLOW)
def multi_vector(folder: Path) -> Outcome:
    return sentences.pair(folder, "pairs", _multi_vector_loss(""), late_interaction)


@door("MultiVectorEncoderTrainer, gradient caching", **_NEEDS, **SLOW)
def multi_vector_cached(folder: Path) -> Outcome:
    return sentences.pair(folder, "pairs", _multi_vector_loss("Cached"), late_interaction)


def _multi_vector_loss(kind: str) -> Callable[[Any], Any]:
    name = f"{kind}MultiVectorMultipleNegativesRankingLoss"
    return sentences.loss_of(name, "multi_vector_encoder", **({"mini_batch_size": 2} if kind else {}))


@door("CrossEncoderTrainer, LambdaLoss on lists; gradient accumulation", **_NEEDS, **SLOW)
def listwise(folder: Path) -> Outcome:
    return sentences.pair(folder, "lists", sentences.loss_of("LambdaLoss", "cross_encoder"), sentences.cross_encoder)


@door("CrossEncoderTrainer, gradient caching", **_NEEDS, **SLOW)
def reranking_cached(folder: Path) -> Outcome:
    loss = sentences.loss_of("CachedMultipleNegativesRankingLoss", "cross_encoder", mini_batch_size=2, num_negatives=2)
    return sentences.pair(folder, "pairs", loss, sentences.cross_encoder)


@door('SparseEncoderTrainer, CachedSpladeLoss, an untied head (output="full")', **_NEEDS, **SLOW)
def sparse_cached(folder: Path) -> Outcome:
    make = functools.partial(sentences.splade, tie_word_embeddings=False)
    return sentences.pair(folder, "pairs", _cached_splade, make)


def _cached_splade(model: Any) -> Any:
    ranking = sentences.loss_of("SparseMultipleNegativesRankingLoss", "sparse_encoder")(model)
    weights = {"document_regularizer_weight": 1e-3, "query_regularizer_weight": 1e-3}
    return sentences.loss_of("CachedSpladeLoss", "sparse_encoder", loss=ranking, mini_batch_size=2, **weights)(model)


@door(
    "SentenceTransformer.add_adapter (LoRA of peft on attention), a frozen table",
    needs=("sentence-transformers", "peft"), pip="'leanvocab[sentence-transformers,peft]'", **SLOW,
)  # fmt: skip
@pairs.one_thread
def adapters(folder: Path) -> Outcome:
    import peft

    runs = []
    for name, model in _both(folder):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights="gaussian")
        model.add_adapter(config)
        loss = sentences.loss_of(_RANKING)
        runs.append(sentences.train(model, folder / name, sentences.rows("pairs"), loss, trl.texts()[:4]))
    return pairs.compare(*runs, models.left_out())


def _real_structure(name: str) -> Callable[[Path], Outcome]:
    def run(folder: Path) -> Outcome:
        make = functools.partial(like, name=name)
        return sentences.pair(folder, "pairs", sentences.loss_of("CachedMultipleNegativesRankingLoss"), make)

    run.__module__ = __name__
    return run


for _name in ("EmbeddingGemma", "BGE-M3", "multilingual-e5", "LaBSE"):
    door(
        f"the structure of {_name}, tiny: its pooling, layers and normalising, with gradient caching",
        name="like_" + _name.lower().replace("-", "_"), **_NEEDS, **SLOW,
    )(_real_structure(_name))  # fmt: skip
