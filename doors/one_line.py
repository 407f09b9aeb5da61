"""`shrink_trainer_`, the one line between a trainer and its training, beside the same trainer without leanvocab."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import leanvocab as lv
from doors import models, pairs, sentence_transformers, trainer, trl
from doors.registry import Outcome, door

_TRL: dict[str, Any] = {"needs": ("trl",), "pip": "'leanvocab[trl]'"}
_ST: dict[str, Any] = {"needs": ("sentence-transformers",), "pip": "'leanvocab[sentence-transformers]'"}


@pairs.one_thread
def _pair(folder: Path, make: Callable[[Path], Any]) -> Outcome:
    """What `make` gives, trained as it is, and after the one line."""
    runs = []
    for name in ("full", "lean"):
        made = make(folder / name)
        began = lv.shrink_trainer_(made) if name == "lean" else lv.status(made.model)
        assert bool(began) == (name == "lean")
        run = pairs.Run(folder=folder / name)
        with pairs.held_bytes(run, made.model):
            made.train()
        made.save_model(str(folder / name / "final"))
        history = made.state.log_history
        run.losses = [entry["loss"] for entry in history if "loss" in entry]
        run.others["scores"] = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
        run.tensors = pairs.state_of(made.model)
        runs.append(run)
    table = lv.status(made.model).tables[0]
    return pairs.compare(*runs, (table.full_size - table.num_rows) * table.embedding_dim)


@door("Trainer, shrink_trainer_")
def of_transformers(folder: Path) -> Outcome:
    import transformers

    rows = models.examples()

    def made(folder: Path) -> Any:
        args = trainer.arguments(folder, eval_strategy="steps", eval_steps=3)
        return transformers.Trainer(models.make_model("roberta"), args, train_dataset=rows[:12], eval_dataset=rows[12:])

    return _pair(folder, made)


@door("Trainer, LeanVocabCallback() without a vocabulary: shrunk when training begins, the optimizer handed over")
@pairs.one_thread
def callback(folder: Path) -> Outcome:
    full = trainer.train(models.make_model("roberta"), folder / "full")
    model = models.make_model("roberta")
    lean = trainer.train(model, folder / "lean", callbacks=[lv.LeanVocabCallback()])
    table = lv.status(model).tables[0]
    return pairs.compare(full, lean, (table.full_size - table.num_rows) * table.embedding_dim)


def _of_trl(kind: str, rows: str, **extra: Any) -> Callable[[Path], Any]:
    options = extra.pop("options", {})

    def made(folder: Path) -> Any:
        return trl.of_trl("Trainer", kind)(
            model=models.make_model("llama-untied"), args=trl.settings(kind, folder, **options),
            train_dataset=trl.data(rows), processing_class=trl.tokenizer(), **extra,
        )  # fmt: skip

    return made


@door('SFTTrainer, untied, output="full", chat template, shrink_trainer_', **_TRL)
def sft(folder: Path) -> Outcome:
    return _pair(folder, _of_trl("SFT", "chat"))


@door(
    'GRPOTrainer, untied, output="full", shrink_trainer_: prompts are counted, and what is generated gets its rows',
    **_TRL,
)
def grpo(folder: Path) -> Outcome:
    options = {"num_generations": 2, "max_completion_length": 6, "max_steps": 3, "beta": 0.0, "max_grad_norm": 0}

    def rewards(completions: Any, **_: Any) -> list[float]:
        return [float(len(text) % 5) for text in completions]

    return _pair(folder, _of_trl("GRPO", "prompt", reward_funcs=rewards, options=options))


@door("SentenceTransformerTrainer, shrink_trainer_: texts with prompts, as its collator tokenizes them", **_ST)
def prompts(folder: Path) -> Outcome:
    import sentence_transformers as st
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    rows = sentence_transformers.rows("pairs")

    def made(run: Path) -> Any:
        model = sentence_transformers.small_encoder(folder / "base")
        args = st.SentenceTransformerTrainingArguments(
            str(run), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-3, logging_steps=1, report_to=[],
            save_strategy="no", use_cpu=True, disable_tqdm=True, prompts={"sentence1": "w411 ", "sentence2": "w412 "},
        )  # fmt: skip
        return st.SentenceTransformerTrainer(
            model,
            args,
            train_dataset=rows,
            eval_dataset=rows.select(range(8)),
            loss=MultipleNegativesRankingLoss(model),
        )

    return _pair(folder, made)
