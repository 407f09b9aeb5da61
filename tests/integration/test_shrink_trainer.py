"""`shrink_trainer_`, the one line: every kind of trainer trains, to the bit, as after counting and shrinking by hand."""

import copy
import importlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import leanvocab as lv
from doors import models, pairs
from doors import sentence_transformers as st
from doors import trainer as hf
from doors import trl as trl_doors


@pytest.fixture(autouse=True)
def _one_quiet_thread() -> Iterator[None]:
    """As in doors: sums in one order, and what other libraries warn of is not what is tested here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(before)


GRPO: Any = {"num_generations": 2, "max_completion_length": 6, "max_steps": 3, "beta": 0.0}


def lora(model: Any) -> dict[str, Any]:
    from peft import LoraConfig

    return {"peft_config": LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])}


def with_reference(model: Any) -> dict[str, Any]:
    return {"ref_model": copy.deepcopy(model)}


def rewards(model: Any) -> dict[str, Any]:
    return {"reward_funcs": lambda completions, **_: [float(len(text) % 5) for text in completions]}


def loss_named(name: str, of: str = "sentence_transformer") -> Callable[[Any], Any]:
    return lambda model: getattr(importlib.import_module(f"sentence_transformers.{of}.losses"), name)(model)


def splade_loss(model: Any) -> Any:
    from sentence_transformers.sparse_encoder import losses

    ranking = losses.SparseMultipleNegativesRankingLoss(model)
    return losses.SpladeLoss(model, ranking, document_regularizer_weight=1e-3, query_regularizer_weight=1e-3)


def finished(trainer: Any, folder: Path) -> pairs.Run:
    """The run of a trainer: losses, tensors, saved files."""
    trainer.train()
    trainer.save_model(str(folder / "final"))
    history = trainer.state.log_history
    run = pairs.Run([entry["loss"] for entry in history if "loss" in entry], pairs.state_of(trainer.model))
    run.others["scores"] = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    run.folder = folder / "final"
    return run


def as_by_hand(make: Callable[[Path], Any], folder: Path, by_hand: Callable[[Any], Any]) -> tuple[Any, Any]:
    """Trains what `make` gives twice, shrunk by hand and by the one line, with equal results to the bit.

    Returns what the line returned, and the model's status after training.
    """
    trainer = make(folder / "hand")
    by_hand(trainer)
    expected = finished(trainer, folder / "hand")
    trainer = make(folder / "line")
    began = lv.shrink_trainer_(trainer)
    assert began == lv.status(trainer.model)
    outcome = pairs.compare(expected, finished(trainer, folder / "line"))
    assert outcome.verdict == "identical", outcome
    return began, lv.status(trainer.model)


def shrunk_to(vocabulary: lv.PartialVocabulary) -> Callable[[Any], None]:
    """Shrinks a trainer's model by hand, and the one that it compares with."""

    def shrink(trainer: Any) -> None:
        lv.shrink_(trainer.model, vocabulary)
        if getattr(trainer, "ref_model", None) is not None:
            lv.shrink_(trainer.ref_model, vocabulary, on_missing="base")

    return shrink


def vocabulary_of(*ids: Any, tokenizer: Any = None, model: Any = None) -> lv.PartialVocabulary:
    counts = lv.count_tokens([list(each) for each in ids])
    return lv.PartialVocabulary.from_counts(counts, tokenizer=tokenizer, model=model)


def of_transformers(family: str, task: str, folder: Path, **options: Any) -> Any:
    import transformers

    kind = transformers.Seq2SeqTrainer if task == "seq2seq-lm" else transformers.Trainer
    rows = models.examples(task)
    options = {"train_dataset": rows[:12], "eval_dataset": {"a": rows[12:14], "b": rows[14:]}} | options
    args = hf.arguments(folder, seq2seq=task == "seq2seq-lm", eval_strategy="steps", eval_steps=3)
    return kind(models.make_model(family), args, **options)


@pytest.mark.parametrize(
    ("family", "task"), [("roberta", "classification"), ("llama-untied", "causal-lm"), ("t5-untied", "seq2seq-lm")]
)
def test_trainers_of_transformers(family: str, task: str, tmp_path: Path) -> None:
    vocabulary = vocabulary_of(*models.token_rows().tolist(), model=models.make_model(family))
    began, _ = as_by_hand(lambda folder: of_transformers(family, task, folder), tmp_path, shrunk_to(vocabulary))
    assert began.tables[0].digest == vocabulary.digest
    assert began.tables[0].on_missing is None


def of_trl(kind: str, family: str, rows: str, folder: Path, extra: Any = None, **options: Any) -> Any:
    model = models.make_model(family, **({"num_labels": 1} if kind == "Reward" else {}))
    data = trl_doors.data(rows)
    return trl_doors.of_trl("Trainer", kind)(
        model=model, args=trl_doors.settings(kind, folder, **options), train_dataset=data,
        eval_dataset=data.select(range(4)), processing_class=trl_doors.tokenizer(), **(extra(model) if extra else {}),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "family", "rows", "extra"),
    [
        ("SFT", "llama-tied", "chat", None),
        ("SFT", "llama-untied", "text", lora),
        ("DPO", "llama-tied", "preference", with_reference),
        ("KTO", "llama-tied", "labelled", with_reference),
        ("Reward", "llama", "preference", None),
    ],
    ids=["SFT", "SFT with LoRA", "DPO", "KTO", "Reward"],
)
def test_trainers_of_trl_that_tokenize_when_they_are_made(
    kind: str, family: str, rows: str, extra: Any, tmp_path: Path
) -> None:
    def by_hand(trainer: Any) -> None:
        counts = lv.count_tokens(trainer.train_dataset) + lv.count_tokens(trainer.eval_dataset)
        tokenizer = trainer.processing_class
        shrunk_to(lv.PartialVocabulary.from_counts(counts, tokenizer=tokenizer, model=trainer.model))(trainer)

    began, ended = as_by_hand(lambda folder: of_trl(kind, family, rows, folder, extra), tmp_path, by_hand)
    assert began == ended
    assert began.tables[0].on_missing is None


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_trainers_of_trl_that_generate_get_rows_as_ids_come(kind: str, tmp_path: Path) -> None:
    """By hand and by the line the model begins with the prompts and what is inserted, and grows."""

    def made(folder: Path) -> Any:
        return of_trl(kind, "llama-tied", "prompt", folder, rewards, **GRPO)

    def by_hand(trainer: Any) -> None:
        tokenizer = trainer.processing_class
        counts = lv.count_tokens(trainer.train_dataset, tokenizer=tokenizer)
        vocabulary = lv.PartialVocabulary.from_counts(counts, tokenizer=tokenizer, model=trainer.model)
        lv.shrink_(trainer.model, vocabulary, on_missing="extend")

    began, ended = as_by_hand(made, tmp_path, by_hand)
    assert began.tables[0].on_missing == "extend"
    assert ended.tables[0].num_rows > began.tables[0].num_rows


def of_sentence_transformers(model: Any, folder: Path, rows: Any, loss: Any, **options: Any) -> Any:
    import sentence_transformers

    kind = type(model).__name__
    args = getattr(sentence_transformers, f"{kind}TrainingArguments")(
        str(folder), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-3, logging_steps=1, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, eval_strategy="steps", eval_steps=2, **options,
    )  # fmt: skip
    evaluated = (
        {name: part.select(range(8)) for name, part in rows.items()}
        if isinstance(rows, dict)
        else rows.select(range(8))
    )
    return getattr(sentence_transformers, f"{kind}Trainer")(
        model, args, train_dataset=rows, eval_dataset=evaluated, loss=loss(model)
    )


@pytest.mark.parametrize(
    ("make", "kind", "loss"),
    [
        (st.small_encoder, "pairs", loss_named("MultipleNegativesRankingLoss")),
        (st.cross_encoder, "label", loss_named("BinaryCrossEntropyLoss", "cross_encoder")),
        (st.splade, "pairs", splade_loss),
    ],
    ids=["SentenceTransformer", "CrossEncoder", "SparseEncoder"],
)
def test_trainers_of_sentence_transformers(make: Any, kind: str, loss: Any, tmp_path: Path) -> None:
    model = make(tmp_path / "base")
    ids = model.tokenizer(trl_doors.texts())["input_ids"]
    vocabulary = vocabulary_of(*ids, tokenizer=model.tokenizer, model=model)

    def made(folder: Path) -> Any:
        return of_sentence_transformers(make(tmp_path / "base"), folder, st.rows(kind), loss)

    began, _ = as_by_hand(made, tmp_path, shrunk_to(vocabulary))
    assert began.tables[0].digest == vocabulary.digest
    assert began.tables[0].on_missing is None


def test_prompts_of_sentence_transformers_are_counted_with_the_texts_that_they_precede(tmp_path: Path) -> None:
    rows = {name: st.rows("pairs").select(range(start, start + 8)) for name, start in (("a", 0), ("b", 8))}
    prompts = {"a": {"sentence1": "w411 "}, "b": {"sentence2": "w412 "}}
    model = st.small_encoder(tmp_path / "base")
    loss = loss_named("MultipleNegativesRankingLoss")
    lv.shrink_trainer_(of_sentence_transformers(model, tmp_path / "run", rows, loss, prompts=prompts))
    texts = [
        "w411",
        "w412",
        *(text for part in rows.values() for row in part for text in row.values() if isinstance(text, str)),
    ]
    expected = vocabulary_of(*model.tokenizer(texts)["input_ids"], tokenizer=model.tokenizer, model=model)
    assert lv.status(model).tables[0].digest == expected.digest
