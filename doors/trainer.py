"""transformers' Trainer and Seq2SeqTrainer."""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from doors import models, pairs
from doors.registry import SLOW, Outcome, door
from leanvocab.errors import LeanVocabWarning

FROZEN = 1e-4  # six steps of AdamW at a learning rate of 1e-2, which divides by small numbers at first
APART = (
    "the gradient of the hidden states is a product with the frozen rows and one with the kept rows, where ordinary training has "
    "one with all, and scores of kept rows are a product of their own: sums of the same terms, rounded apart"
)
CLOSE: Any = {"expects": "close", "within": FROZEN, "why": APART}
_APART_BF16 = APART + "; logits are rounded to bf16 in other places"
_CLOSE_BF16: Any = {"expects": "close", "within": 5e-2, "why": _APART_BF16}
GPU_SUMS = "a GPU adds up an embedding's gradient in an order that varies"


def arguments(folder: Path, *, seq2seq: bool = False, **options: Any) -> Any:
    """The Trainer's defaults on a CPU; six steps, logged one by one, nothing saved unless asked for."""
    import transformers as hf

    kind = hf.Seq2SeqTrainingArguments if seq2seq else hf.TrainingArguments
    defaults = {
        "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "report_to": [],
        "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    return kind(str(folder), **defaults | options)


@contextmanager
def _no_overrides_left() -> Iterator[None]:
    """bitsandbytes keeps what it was told of modules, and the modules too, for all optimizers of a process."""
    try:
        yield
    finally:
        if "bitsandbytes" in sys.modules:
            from bitsandbytes.optim import GlobalOptimManager

            GlobalOptimManager._instance = None


@_no_overrides_left()
def train(model: nn.Module, folder: Path, *, task: str = "classification", **options: Any) -> pairs.Run:
    """One run of the Trainer on a model, shrunk or not; its losses, its gradients' norms, its tensors, its saved files."""
    import transformers as hf

    seq2seq = task == "seq2seq-lm"
    extra = {name: options.pop(name) for name in ("callbacks", "compute_metrics", "optimizers") if name in options}
    resume, after = options.pop("resume", {}), options.pop("after", None)
    data = models.examples(task)
    if options.pop("uneven", False):
        data, extra["data_collator"] = list(map(_without_padding, data)), _padded
    trainer = (hf.Seq2SeqTrainer if seq2seq else hf.Trainer)(
        model,
        arguments(folder, seq2seq=seq2seq, **options),
        train_dataset=data,
        eval_dataset=data[:8],
        **extra,
    )
    run = pairs.Run(folder=folder)
    with pairs.held_bytes(run, model):
        trainer.train(**resume)
    trainer.save_model(str(folder / "final"))
    history = trainer.state.log_history
    run.losses = [entry["loss"] for entry in history if "loss" in entry]
    run.others["norms"] = [entry["grad_norm"] for entry in history if "grad_norm" in entry]
    run.others["scores"] = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    run.tensors = _tensors(trainer.model, folder / "final")
    if seq2seq and trainer.args.predict_with_generate:
        run.others["generated"] = trainer.predict(models.examples(task)[:4]).predictions.tolist()
    if after is not None:
        run.others |= after(trainer)
    return run


def _without_padding(row: dict[str, Tensor]) -> dict[str, Tensor]:
    length = int(row["attention_mask"].sum())
    return {name: value[:length] if value.ndim else value for name, value in row.items()}


def _padded(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch as long as its longest row: what a collator makes of rows of several lengths."""
    fill = {"input_ids": models.PAD, "attention_mask": 0, "labels": -100}
    return {
        name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=fill[name])
        if rows[0][name].ndim
        else torch.stack([row[name] for row in rows])
        for name in rows[0]
    }


def _tensors(model: nn.Module, saved: Path) -> dict[str, Tensor]:
    """All tensors of a model; as it was saved where some are offloaded, and lie on no device."""
    if not any(each.is_meta for each in model.parameters()):
        return pairs.state_of(model)
    from safetensors.torch import load_file

    return load_file(saved / "model.safetensors")


@pairs.one_thread
def pair(
    folder: Path,
    family: str = "roberta",
    *,
    tables: int = 1,
    output: str | None = None,
    shrink: dict[str, Any] | None = None,
    make: dict[str, Any] | None = None,
    change: Callable[[nn.Module], nn.Module] | None = None,
    announces: str = "",
    **options: Any,
) -> Outcome:
    """The same settings on the full model and on the shrunk one; for frozen rows the reference masks their gradients.

    `announces`: a part of what leanvocab is to warn of; where it is empty, it is to warn of nothing.
    """

    def made() -> nn.Module:
        model = models.make_model(family, **make or {})
        return change(model) if change else model

    reference = models.masked(made()) if output == "frozen" else made()
    full = train(reference, folder / "full", **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lean = train(models.lean(made(), output=output, **shrink or {}), folder / "lean", **options)
    said = [str(each.message) for each in caught if issubclass(each.category, LeanVocabWarning)]
    assert any(announces in each for each in said) if announces else not said, f"leanvocab announced {said}"
    return pairs.compare(full, lean, models.left_out(tables))


_GENERATES = {"predict_with_generate": True, "generation_max_length": 10}


@door("Trainer, its defaults (AdamW, clipping)")
def defaults(folder: Path) -> Outcome:
    return pair(folder)


@door("Trainer, a decoder with a classification head")
def decoder(folder: Path) -> Outcome:
    return pair(folder, "llama")


@door('Trainer, tables for each layer (Gemma 4, output="full")')
def per_layer(folder: Path) -> Outcome:
    return pair(folder, "gemma4-untied", task="causal-lm", output="full", tables=3)


@door("Trainer, LeanVocabCallback in place of shrink_")
@pairs.one_thread
def callback(folder: Path) -> Outcome:
    import leanvocab as lv

    full = train(models.make_model("roberta"), folder / "full")
    lean = train(models.make_model("roberta"), folder / "lean", callbacks=[lv.LeanVocabCallback(models.vocabulary())])
    return pairs.compare(full, lean, models.left_out())


@door("Trainer, bf16 autocast")
def bf16(folder: Path) -> Outcome:
    return pair(folder, bf16=True)


@door("Trainer, fp16 autocast and a gradient scaler", gpu=True, expects="close", within=1e-2, why=GPU_SUMS)
def fp16(folder: Path) -> Outcome:
    return pair(folder, fp16=True, use_cpu=False)


@door("Trainer, a model in fp16 (SGD)", **SLOW)
def half_weights(folder: Path) -> Outcome:
    return pair(folder, change=lambda model: model.half(), optim="sgd", learning_rate=1e-1)


@door("Trainer, a model in bf16")
def bf16_weights(folder: Path) -> Outcome:
    return pair(folder, change=lambda model: model.bfloat16())


@door("Trainer, gradient accumulation")
def accumulation(folder: Path) -> Outcome:
    return pair(folder, per_device_train_batch_size=2, gradient_accumulation_steps=2)


@door("Trainer, gradient checkpointing")
def checkpointing(folder: Path) -> Outcome:
    return pair(folder, gradient_checkpointing=True)


@door("Trainer, gradient checkpointing (reentrant)", **SLOW)
def reentrant_checkpointing(folder: Path) -> Outcome:
    return pair(folder, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})


@door("Trainer, torch_compile (inductor)", fast=False)
def compiled(folder: Path) -> Outcome:
    return pair(folder, torch_compile=True)


@door("Trainer, group_by_length")
def grouped_by_length(folder: Path) -> Outcome:
    return pair(folder, uneven=True, train_sampling_strategy="group_by_length")


@door("Trainer, auto_find_batch_size (a first size that does not fit)", fast=False)
def auto_find_batch_size(folder: Path) -> Outcome:
    return pair(folder, change=_out_of_memory_above(4), per_device_train_batch_size=8, auto_find_batch_size=True)


def _out_of_memory_above(rows: int) -> Callable[[nn.Module], nn.Module]:
    def limited(model: nn.Module) -> nn.Module:
        def refuse(module: nn.Module, args: Any, kwargs: Any) -> None:
            if module.training and kwargs["input_ids"].shape[0] > rows:
                raise RuntimeError("CUDA out of memory. Tried to allocate")

        model.register_forward_pre_hook(refuse, with_kwargs=True)
        return model

    return limited


@door("Trainer, weight decay (decay_unused_rows=True)")
def weight_decay(folder: Path) -> Outcome:
    return pair(folder, shrink={"decay_unused_rows": True}, weight_decay=0.1)


@door(
    "Trainer, weight decay (default)",
    expects="different",
    why="ordinary training decays unused rows too, and here they stay as they were, which is announced",
)
def weight_decay_unused(folder: Path) -> Outcome:
    return pair(folder, weight_decay=0.1, announces="decays this matrix")


@door("Trainer, label smoothing", **SLOW)
def label_smoothing(folder: Path) -> Outcome:
    return pair(folder, label_smoothing_factor=0.1)


@door("Trainer, NEFTune noise", **SLOW)
def neftune(folder: Path) -> Outcome:
    return pair(folder, neftune_noise_alpha=5.0)


@door("Trainer, checkpoints, early stopping and load_best_model_at_end", **SLOW)
def best_model(folder: Path) -> Outcome:
    return pair(folder, **_stopping_early(), learning_rate=5e-2)


def _stopping_early() -> dict[str, Any]:
    import transformers as hf

    saving = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    stopping = hf.EarlyStoppingCallback(early_stopping_patience=2)
    rest = {"max_steps": 12, "load_best_model_at_end": True, "callbacks": [stopping], "after": _best_before_last}
    return saving | rest


def _best_before_last(trainer: Any) -> dict[str, int]:
    """Steps of the best model and of the end: the best is not the last, and training stopped early where it was to."""
    state = trainer.state
    assert 0 < state.best_global_step < state.global_step, "the best model is not the last"
    stops = any(type(each).__name__ == "EarlyStoppingCallback" for each in trainer.callback_handler.callbacks)
    assert stops == (state.global_step < state.max_steps)
    return {"stopped": state.global_step, "best": state.best_global_step}


@door("Trainer, resumed from a checkpoint of itself")
@pairs.one_thread
def resumed(folder: Path) -> Outcome:
    """Two runs that stop after three steps and go on, the shrunk one from the ordinary run's checkpoint."""
    runs = {}
    for name in ("full", "lean"):
        saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
        train(_maybe_lean(name), folder / name, **saving)
        resume = {"resume_from_checkpoint": str(folder / "full" / "checkpoint-3")}
        runs[name] = train(_maybe_lean(name), folder / name, resume=resume, **saving)
    return pairs.compare(runs["full"], runs["lean"], models.left_out())


def _maybe_lean(name: str, family: str = "roberta") -> nn.Module:
    model = models.make_model(family)
    return models.lean(model) if name == "lean" else model


@door("Trainer.predict and evaluate, with ids that were not counted", **SLOW)
def predict(folder: Path) -> Outcome:
    unseen = [{**row, "input_ids": torch.arange(3, 15) + index} for index, row in enumerate(models.examples())]

    def predictions(trainer: Any) -> dict[str, Any]:
        found = trainer.predict(unseen)
        return {"predictions": found.predictions.tolist(), "loss": found.metrics["test_loss"]}

    return pair(folder, after=predictions, announces="are served from the base")


@door("Trainer.hyperparameter_search (optuna): every trial", needs="optuna", fast=False)
def hyperparameter_search(folder: Path) -> Outcome:
    return _searches(folder)


@pairs.one_thread
def _searches(folder: Path, family: str = "roberta", task: str = "classification") -> Outcome:
    """Three trials each: their parameters, their values, and the model of each."""
    import optuna
    import transformers as hf

    def search(name: str) -> pairs.Run:
        made: list[nn.Module] = []

        def model_init() -> nn.Module:
            made.append(_maybe_lean(name, family))
            return made[-1]

        seq2seq = task == "seq2seq-lm"
        trainer = (hf.Seq2SeqTrainer if seq2seq else hf.Trainer)(
            model_init=model_init,
            args=arguments(folder / name, seq2seq=seq2seq, eval_strategy="steps", eval_steps=3),
            train_dataset=models.examples(task),
            eval_dataset=models.examples(task)[:8],
        )
        kept = optuna.storages.InMemoryStorage()
        best = trainer.hyperparameter_search(
            hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True)},
            sampler=optuna.samplers.RandomSampler(seed=0),
            n_trials=3,
            backend="optuna",
            direction="minimize",
            study_name=name,
            storage=kept,
        )
        trials = optuna.load_study(study_name=name, storage=kept).trials
        assert len({each.value for each in trials}) == 3, "three trials that differ"
        others = {
            f"trial {each.number}": [*each.params.values(), *each.intermediate_values.values()] for each in trials
        }
        tensors = {f"{n}.{key}": each for n, model in enumerate(made) for key, each in pairs.state_of(model).items()}
        return pairs.Run([each.value for each in trials], tensors, others | {"best": best.hyperparameters})

    return pairs.compare(search("full"), search("lean"))


@door("Trainer.push_to_hub (its local part: what would be uploaded)", **SLOW)
def push_to_hub(folder: Path) -> Outcome:
    return pair(folder, after=_pushed)


def _pushed(trainer: Any) -> dict[str, Any]:
    """Calls push_to_hub with the client of the hub replaced: the files that it is handed are kept by their digests."""
    import hashlib
    from unittest import mock

    trainer.hub_model_id = "someone/tuned"
    with mock.patch("transformers.trainer.hf_api") as client:
        trainer.push_to_hub()
    uploaded = Path(client().upload_folder.call_args.kwargs["folder_path"])
    files = [path for path in uploaded.iterdir() if path.is_file()]
    unstable = ("README.md", "training_args.bin")  # a card with a date, a pickle with the folder's path
    return {each.name: hashlib.sha256(each.read_bytes()).hexdigest() for each in files if each.name not in unstable}


@door("Trainer, a saved model loaded in its own dtype")
def loaded(folder: Path) -> Outcome:
    return _pair_loaded(folder)


@door("Trainer, a saved fp32 model loaded in bf16", **SLOW)
def loaded_in_bf16(folder: Path) -> Outcome:
    return _pair_loaded(folder, dtype="bfloat16")


@door('Trainer, a model loaded with device_map="cpu"')
def device_map(folder: Path) -> Outcome:
    return _pair_loaded(folder, device_map="cpu")


@door('Trainer, a model loaded with device_map="auto"', **SLOW)
def device_map_auto(folder: Path) -> Outcome:
    return _pair_loaded(folder, device_map="auto")


@door("Trainer, a model loaded with a device_map that has a frozen layer on disk, and the table on the CPU", **SLOW)
def device_map_disk(folder: Path) -> Outcome:
    return _pair_loaded(
        folder, device_map=_on_disk("roberta.encoder.layer.0"), offload_folder=str(folder / "offloaded")
    )


@door(
    "Trainer, a model loaded with a device_map that has the table on disk",
    expects="refused",
    refuses="offloaded by accelerate; shrink the model before it is dispatched",
    why="accelerate puts the weight in place for each call, and would put the full one there",
)
def device_map_disk_table(folder: Path) -> Outcome:
    loading = {"device_map": _on_disk("roberta.embeddings"), "offload_folder": str(folder / "offloaded")}
    model = _loader(folder, "roberta", **loading)(models.make_model("roberta"))
    return pairs.refused(lambda: models.lean(model))


def _on_disk(path: str) -> dict[str, str]:
    paths = ("roberta.embeddings", "roberta.encoder.layer.0", "roberta.encoder.layer.1", "classifier")
    return {each: "disk" if each == path else "cpu" for each in paths}


def _loader(folder: Path, family: str, **loading: Any) -> Callable[[nn.Module], nn.Module]:
    """Loads what is saved now; what is offloaded to disk does not train."""
    models.make_model(family).save_pretrained(folder / "base")  # type: ignore[operator]

    def load(model: nn.Module) -> nn.Module:
        loaded: nn.Module = type(model).from_pretrained(folder / "base", **loading)  # type: ignore[attr-defined]
        for parameter in loaded.parameters():
            parameter.requires_grad_(not parameter.is_meta)
        return loaded

    return load


def _pair_loaded(
    folder: Path, family: str = "roberta", settings: dict[str, Any] | None = None, **loading: Any
) -> Outcome:
    return pair(folder, family, change=_loader(folder, family, **loading), **settings or {})


# --- language models --------------------------------------------------------------------------------------------------


@door('Trainer, causal language model, untied (output="full")')
def causal_full(folder: Path) -> Outcome:
    return pair(folder, "llama-untied", task="causal-lm")


@door('Trainer, causal language model, tied (output="frozen")', **CLOSE)
def causal_tied(folder: Path) -> Outcome:
    return pair(folder, "llama-tied", task="causal-lm", output="frozen")


@door('Trainer, causal language model, untied (output="frozen")', **CLOSE)
def causal_frozen(folder: Path) -> Outcome:
    return pair(folder, "llama-untied", tables=2, task="causal-lm", output="frozen")


@door(
    'Trainer, causal language model (output="restricted")',
    expects="different",
    why="the softmax is over the kept rows alone: another objective, announced when the model is shrunk",
    **SLOW,
)
def causal_restricted(folder: Path) -> Outcome:
    return pair(folder, "llama-tied", task="causal-lm", output="restricted", announces="trains a softmax over")


@door(
    'Trainer, causal language model, tied, bf16 autocast (output="frozen")',
    **_CLOSE_BF16,
)
def causal_bf16(folder: Path) -> Outcome:
    return pair(folder, "llama-tied", task="causal-lm", output="frozen", bf16=True, learning_rate=1e-3)


@door(
    'Trainer, causal language model in bf16, tied (output="frozen")',
    **_CLOSE_BF16,
)
def causal_bf16_weights(folder: Path) -> Outcome:
    options = {"change": lambda model: model.bfloat16(), "learning_rate": 1e-3}
    return pair(folder, "llama-tied", task="causal-lm", output="frozen", **options)


@door(
    'Trainer, causal language model, tied, gradient checkpointing and accumulation (output="frozen")',
    **CLOSE,
)
def causal_checkpointing(folder: Path) -> Outcome:
    both = {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    return pair(folder, "llama-tied", task="causal-lm", output="frozen", **both)


@door(
    'Trainer, causal language model, tied, compute_metrics and predict (output="frozen")',
    **CLOSE,
)
def causal_metrics(folder: Path) -> Outcome:
    """The Trainer gathers, pads and joins the logits themselves."""

    def accuracy(evaluated: Any) -> dict[str, float]:
        found, labels = evaluated.predictions.argmax(-1)[:, :-1], evaluated.label_ids[:, 1:]
        return {"accuracy": float((found == labels)[labels != -100].mean())}

    def predicted(trainer: Any) -> dict[str, Any]:
        given = trainer.predict(models.examples("causal-lm")[:4])
        return {"predictions": given.predictions.tolist(), "accuracy": trainer.evaluate()["eval_accuracy"]}

    options = {"compute_metrics": accuracy, "after": predicted, "eval_strategy": "steps", "eval_steps": 3}
    return pair(folder, "llama-tied", task="causal-lm", output="frozen", **options)


@door(
    'Trainer, causal language model, tied, label smoothing (output="frozen")',
    **CLOSE,
)
def causal_smoothed(folder: Path) -> Outcome:
    return pair(folder, "llama-tied", task="causal-lm", output="frozen", label_smoothing_factor=0.1)


@door(
    'Trainer, causal language model, tied, torch_compile (output="frozen")',
    **CLOSE,
    fast=False,
)
def causal_compiled(folder: Path) -> Outcome:
    return pair(folder, "llama-tied", task="causal-lm", output="frozen", torch_compile=True)


@door(
    'Trainer, causal language model, tied, loaded with device_map="auto" (output="frozen")',
    **CLOSE,
)
def causal_device_map(folder: Path) -> Outcome:
    settings = {"task": "causal-lm", "output": "frozen"}
    return _pair_loaded(folder, "llama-tied", settings, device_map="auto")


@door('Seq2SeqTrainer with predict_with_generate, untied (output="full")')
def seq2seq_full(folder: Path) -> Outcome:
    return pair(folder, "bart-untied", tables=3, task="seq2seq-lm", **_GENERATES)  # one of the three gets no gradient


@door(
    'Seq2SeqTrainer with predict_with_generate and beams, tied (output="frozen")',
    **CLOSE,
)
def seq2seq_tied(folder: Path) -> Outcome:
    options = {
        **_GENERATES,
        "generation_num_beams": 2,
        "announces": "are served from the base",
    }  # ids that are generated
    return pair(folder, "t5-tied", task="seq2seq-lm", output="frozen", **options)


@door(
    'Seq2SeqTrainer, bf16 autocast, accumulation, checkpointing, best model at the end, untied (output="full")', **SLOW
)
def seq2seq_best(folder: Path) -> Outcome:
    saving = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    both = {
        "bf16": True,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "load_best_model_at_end": True,
        "after": _best_before_last,
        "learning_rate": 5e-2,
        "max_steps": 20,
    }
    return pair(folder, "bart-untied", tables=3, task="seq2seq-lm", **saving, **both)


_UNTIED: dict[str, Any] = {"tables": 3, "task": "seq2seq-lm", "output": "full"}


def _untied(folder: Path, **options: Any) -> Outcome:
    return pair(folder, "bart-untied", **_UNTIED, **options)


for name, combined, fast, run in (
    (
        "grouped_by_length", "group_by_length", True,
        lambda folder: _untied(folder, uneven=True, train_sampling_strategy="group_by_length", **_GENERATES),
    ),
    ("compiled", "torch_compile (inductor)", False, lambda folder: _untied(folder, torch_compile=True)),
    (
        "auto_find_batch_size", "auto_find_batch_size (a first size that does not fit)", False,
        lambda folder: _untied(
            folder, change=_out_of_memory_above(4), per_device_train_batch_size=8, auto_find_batch_size=True
        ),
    ),
    (
        "early_stopping", "checkpoints, early stopping and load_best_model_at_end", False,
        lambda folder: _untied(folder, **_stopping_early(), **_GENERATES, learning_rate=5e-2),
    ),
    ("push_to_hub", "push_to_hub (its local part)", True, lambda folder: _untied(folder, after=_pushed)),
    (
        "device_map", 'loaded with device_map="auto"', True,
        lambda folder: _pair_loaded(folder, "bart-untied", _UNTIED | _GENERATES, device_map="auto"),
    ),
):  # fmt: skip
    door(f'Seq2SeqTrainer, {combined}, untied (output="full")', name=f"seq2seq_{name}", fast=fast)(run)


@door("Seq2SeqTrainer.hyperparameter_search (optuna): every trial, untied", needs="optuna", fast=False)
def seq2seq_search(folder: Path) -> Outcome:
    return _searches(folder, "bart-untied", "seq2seq-lm")
