"""The main job: text + a pretrained model → a fine-tuned full model. Short enough to read as an example.

`finetune` tokenizes, counts, shrinks, trains with transformers' own Trainer, validates and saves. The model that it
leaves in the output directory is full, and bit for bit the one that the same run with `full_vocabulary=True` leaves,
unless an output layer is frozen in part or restricted (`output`).
"""

import copy
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
import transformers
from transformers import Trainer, TrainingArguments

from leanvocab.adapters.lora import add_lora
from leanvocab.checkpoints.base_checkpoint import find_base
from leanvocab.checkpoints.delta_format import FILES, TENSORS, is_delta
from leanvocab.checkpoints.delta_saving import write_delta
from leanvocab.checkpoints.full_saving import save_full
from leanvocab.errors import CheckpointError, DataError, SettingsError
from leanvocab.extras import require
from leanvocab.files.atomic_folders import written_whole
from leanvocab.files.copying import share_bytes
from leanvocab.files.free_space import check_free_space
from leanvocab.files.headers import is_weights_file
from leanvocab.finetune.callbacks import StoppableTrainer, StopsEarly, show_progress
from leanvocab.finetune.earlier_runs import (
    CHECKPOINTS_FOLDER,
    RESULT_FILE,
    RemovesHalves,
    RunRecord,
    find_earlier_run,
    last_whole,
)
from leanvocab.finetune.pretrained import Pretrained, estimate_run, find_pretrained, training_step
from leanvocab.finetune.reading import Examples, read_examples
from leanvocab.finetune.scores import TOKEN_LOSS, without_prefix
from leanvocab.finetune.settings import FineTuneSettings, TrainingSettings
from leanvocab.finetune.tasks import Task
from leanvocab.model.shrink import shrink_
from leanvocab.model.status import status
from leanvocab.partial.devices import accelerator_at_hand
from leanvocab.reports.data_report import DataReport, RunReport, report_on_data
from leanvocab.reports.html_report import check_page, write_report
from leanvocab.reports.memory import estimate_memory
from leanvocab.reports.memory_estimate import MemoryEstimate
from leanvocab.reports.peak import PeakMemory, record_peak
from leanvocab.reports.state_bytes import tensor_bytes
from leanvocab.trainers.callback import LeanVocabCallback
from leanvocab.trainers.resuming import resume_from_delta, train_from
from leanvocab.vocabulary.counts import count_tokens
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary
from leanvocab.vocabulary.special_ids import model_full_size

require("accelerate", extra="finetune")  # the Trainer needs it

_SECONDS_BETWEEN_LOOKS = 0.02
VOCABULARY_FILE = "partial_vocabulary.json"
_TOKENIZER = "tokenizer.json"
RESTRICTED_NOTE = (
    "The output layer was restricted: the softmax knew the kept rows alone, which is another objective than that of the full "
    "model; loss and perplexity are over these rows too, and compare with no other mode's."
)
ADAPTER_NOTE = (
    "LoRA was trained, and the adapter alone was saved: it loads on the pretrained model, with the whole vocabulary "
    "(PeftModel.from_pretrained), where leanvocab is not installed."
)


@dataclass(frozen=True)
class FineTuneResult:
    """Result of a run. `vocabulary` and `memory` are None with the full vocabulary.

    `understood` is what was read: the task, its columns and classes, and the rows of each split, in plain values.
    `output` is what became of a language model's output layer: "full", "frozen" or "restricted"; None where it is that of
    ordinary training. The bytes are what this run's training held, `peak` is the memory of the process and of the GPU meanwhile,
    beside which `memory` has the estimate of a step's peak; `losses` are (step, loss) as logged, `scores` those of
    validation.
    """

    output_dir: Path
    task: Task
    understood: Mapping[str, Any]
    output: str | None
    vocabulary: PartialVocabulary | None
    memory: MemoryEstimate | None
    num_parameters: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    peak: PeakMemory
    num_steps: int
    seconds: Mapping[str, float]
    losses: tuple[tuple[int, float], ...]
    scores: Mapping[str, float]
    notes: tuple[str, ...]
    report: str | None = None
    """The page that was written, if one was asked for."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        plain = vars(self) | {"output_dir": str(self.output_dir), "memory": self.memory and self.memory.to_dict()}
        plain["peak"] = self.peak.to_dict()
        plain["task"] = {name: value for name, value in vars(self.task).items() if not name.startswith("_")}
        if (kept := self.vocabulary) is not None:
            plain["vocabulary"] = {"kept_rows": len(kept), "full_rows": kept.full_size, "digest": kept.digest}
        return plain


def finetune(
    model: str | Path,
    data: Any,
    output_dir: str | Path,
    settings: FineTuneSettings | None = None,
    *,
    progress: bool | None = None,
) -> FineTuneResult:
    """Fine-tunes a pretrained model on text, and writes the whole model and its tokenizer.

    Args:
        model: a folder or a name on the hub; any model that the task's class of transformers takes (`settings.TASKS`).
        data: whatever `leanvocab.texts.data_files.load_splits` takes. The tokens of all its splits are counted.
        output_dir: a folder that is empty, or not there yet.
        settings: the knobs; None: the paper's (Table 8), for classification and regression.
        progress: True: progress bars; False: nothing; None: bars on a terminal, and lines elsewhere.

    Raises:
        LeanVocabError: mostly before any long work (DataError, ModelError, SettingsError, CheckpointError).

    Source: Section 4 of the paper. Its D' is never made, since the lookup remaps.
    """
    settings, output_dir = settings or FineTuneSettings(), _named(output_dir)
    _check_extras(settings)
    earlier = find_earlier_run(output_dir, Path(model), settings)
    if settings.report is not None:
        check_page(Path(settings.report), settings.overwrite or settings.resume, beside=output_dir)
    _check_room(output_dir, model, settings)
    pretrained = find_pretrained(model, settings, settings.dropout)
    settings = replace(settings, **pretrained.lengths)
    examples = read_examples(data, pretrained.tokenizer, settings, pretrained.config)
    seconds = {"tokenizing": examples.seconds}
    record = RunRecord(settings, examples.encoded)
    record.check(earlier.checkpoint)
    prepared = _prepare(pretrained, examples, settings, seconds)
    trainer = _make_trainer(prepared, output_dir, settings, progress)
    trainer.add_callback(RemovesHalves(earlier.halves))
    if trainer.is_world_process_zero():
        record.write(output_dir / CHECKPOINTS_FOLDER)
    stops = StopsEarly(trainer, saves=settings.save_strategy != "no")
    with _timed(seconds, "training"), record_peak(_SECONDS_BETWEEN_LOOKS) as peak, stops.watching():
        _train(trainer, earlier.checkpoint)
    stops.raise_if_stopped()
    notes = (*prepared.outcome.pop("notes"), *earlier.notes_after(trainer.state.global_step))
    scores = without_prefix(trainer.evaluate()) if prepared.task.eval_split else {}
    facts = _training_facts(trainer, prepared.network) | {"report": settings.report}
    result = FineTuneResult(
        output_dir, prepared.task, seconds=seconds, peak=peak, scores=scores, notes=notes, **prepared.outcome, **facts
    )
    if trainer.is_world_process_zero():
        _save(prepared.network, pretrained.tokenizer, result, settings.save)  # full while shrunk
        if settings.report is not None:
            write_report(_report(result, examples.encoded, trainer), settings.report)
    trainer.accelerator.wait_for_everyone()
    return result


def _named(output_dir: str | Path) -> Path:
    if not os.fspath(output_dir):
        raise SettingsError("the output directory has no name (output_dir is empty); '.' is the folder where you are")
    return Path(output_dir)


def _train(trainer: Trainer, checkpoint: Path | None) -> None:
    if checkpoint is not None and is_delta(checkpoint):
        resume_from_delta(trainer, checkpoint)
    else:
        train_from(trainer, checkpoint)


def _check_extras(settings: TrainingSettings) -> None:
    if settings.uses_lora:
        require("peft", extra="peft")
    if settings.qlora:
        require("bitsandbytes", extra="quantization")


def _check_room(output_dir: Path, model: str | Path, settings: FineTuneSettings) -> None:
    """Room for the model in fp32 and, in checkpoints, AdamW's two states; an adapter takes next to none."""
    num_values = 0
    if not settings.uses_lora:
        with suppress(CheckpointError):  # no safetensors at hand: its size is not known before it is loaded
            num_values = sum(math.prod(entry.shape) for _, entry in find_base(None, model).weights.tensors.values())
    num_checkpoints = (
        0 if settings.save_strategy == "no" else settings.save_total_limit + 1
    )  # the next, before the last goes
    num_bytes = num_values * 4 * (1 + 3 * num_checkpoints)
    advice = "free some, name another folder, or keep fewer checkpoints (save_total_limit, save_strategy)"
    check_free_space(output_dir, num_bytes, f"the model with {num_checkpoints} checkpoints", advice)


@dataclass(frozen=True)
class _Prepared:
    """A model that is ready to train, a Trainer's arguments for it, and what was done to it: fields of the result."""

    network: Any
    task: Task
    for_trainer: dict[str, Any]
    outcome: dict[str, Any]


def _prepare(
    pretrained: Pretrained, examples: Examples, settings: FineTuneSettings, seconds: dict[str, float]
) -> _Prepared:
    task, encoded, tokenizer = examples.task, examples.encoded, pretrained.tokenizer
    transformers.set_seed(settings.seed)  # the new head is the same with and without the full vocabulary
    network, loading_notes = pretrained.load(task, few_bits=settings.qlora, on_cpu=settings.cpu)
    task.check_network(network, settings)
    vocabulary = None
    if not settings.full_vocabulary or task.draws_words:
        with _timed(seconds, "counting"):
            counts = count_tokens(encoded, task.token_columns)
            vocabulary = PartialVocabulary.from_counts(counts, tokenizer=tokenizer, model=network)
            if settings.vocabulary:
                vocabulary = _given_vocabulary(settings.vocabulary, vocabulary, tokenizer)
    collator, callbacks = task.batches(encoded, network, tokenizer, vocabulary, settings)
    kept = None if settings.full_vocabulary else vocabulary
    output = None if kept is None else _shrink(network, kept, settings, seconds)
    notes = [*pretrained.notes, *loading_notes, *examples.notes]
    if settings.uses_lora:
        network = add_lora(network, settings.kind.adapter_type, settings.lora_rank, few_bits=settings.qlora)
        notes.append(ADAPTER_NOTE)
    memory = None if kept is None else _estimated(network, pretrained.config, kept, encoded[task.train_split], settings)
    if output == "restricted":
        notes.append(RESTRICTED_NOTE)
    outcome = {
        "understood": examples.understood,
        "output": output,
        "vocabulary": kept,
        "memory": memory,
        "notes": tuple(notes),
    }
    for_trainer = {
        "train_dataset": encoded[task.train_split],
        "eval_dataset": encoded[task.eval_split] if task.eval_split else None,
        "data_collator": collator,
        "processing_class": tokenizer,
        "callbacks": list(callbacks),
        **task.scoring(),
    }
    return _Prepared(network, task, for_trainer, outcome)


def _given_vocabulary(path: str, needed: PartialVocabulary, tokenizer: Any) -> PartialVocabulary:
    """The vocabulary of a file; raises `DataError` where it lacks rows that the data use, or tokenizer and model insert."""
    given = PartialVocabulary.load(path)
    if given.full_size != needed.full_size:
        raise DataError(
            f"{path} is of {given.full_size:,} rows, and the model has {needed.full_size:,}; count with its tokenizer"
        )
    lacking = np.setdiff1d(needed.token_ids, given.token_ids)
    if len(lacking):
        named = ", ".join(f"{i} ({tokenizer.convert_ids_to_tokens(i)})" for i in lacking[:3].tolist())
        raise DataError(
            f"{path} lacks {len(lacking):,} of the {len(needed):,} rows that this run needs, such as {named}: count these data, "
            "with the same columns, or leave the vocabulary out, and it is counted"
        )
    return given


def _estimated(
    network: Any, config: Any, kept: PartialVocabulary, rows: Any, settings: FineTuneSettings
) -> MemoryEstimate:
    """Bytes of the network that is there, and the peak of its step with the longest rows, as `leanvocab estimate` finds it.

    That with the full vocabulary, for which the step would be taken again, is left to the command: it takes seconds.
    """
    memory = estimate_memory(network, precision="mixed" if settings.bf16 else None)
    length = pc.max(pc.list_value_length(rows.data.column("input_ids"))).as_py()
    step = replace(
        training_step(settings, on_cpu=settings.cpu or accelerator_at_hand() is None),
        batch_size=min(settings.batch_size, len(rows)),
        length=length,
    )
    twin = estimate_run(copy.deepcopy(config), kept, settings, step, full_peak=False)
    partial = replace(memory.partial, peak_bytes=twin.partial.peak_bytes)
    return replace(memory, step=twin.step, no_peak=twin.no_peak, partial=partial)


def _shrink(
    network: Any, vocabulary: PartialVocabulary, settings: FineTuneSettings, seconds: dict[str, float]
) -> str | None:
    """Shrinks the model, and returns what became of a language model's output layer.

    It is not merged at the end, which would bring the full matrix to the device: what is saved is full in any case.
    """
    decays = settings.weight_decay > 0 and not settings.uses_lora
    layer: dict[str, Any] = {"output": settings.output, "frozen_rows": settings.frozen_rows}
    layer["filter_eps"] = settings.filter_threshold
    with _timed(seconds, "shrinking"):
        shrink_(network, vocabulary, decay_unused_rows=decays, **layer)
    return status(network).output if settings.is_language_model else None


def _make_trainer(
    prepared: _Prepared, output_dir: Path, settings: FineTuneSettings, progress: bool | None
) -> StoppableTrainer:
    network = prepared.network
    if settings.overwrite:
        _remove_earlier_run(output_dir)
    if settings.gradient_checkpointing:  # transformers is renaming it, and the Trainer's argument too
        getattr(network, "activation_checkpointing_enable", network.gradient_checkpointing_enable)()
    arguments = _training_arguments(prepared, output_dir / CHECKPOINTS_FOLDER, settings)
    if settings.checkpoints == "delta":
        prepared.for_trainer["callbacks"].append(LeanVocabCallback(checkpoints="delta"))
    trainer = StoppableTrainer(network, arguments, **prepared.for_trainer)
    show_progress(trainer, progress)
    return trainer


def _training_arguments(prepared: _Prepared, folder: Path, settings: FineTuneSettings) -> TrainingArguments:
    best = TOKEN_LOSS if settings.best == "loss" and settings.is_language_model else settings.best
    return TrainingArguments(
        output_dir=str(folder),
        **settings.trainer_arguments() | {"use_cpu": settings.cpu or not torch.accelerator.is_available()},
        max_steps=settings.max_steps or -1,
        per_device_eval_batch_size=settings.eval_batch_size or settings.batch_size,
        learning_rate=settings.learning_rate_for(prepared.network.config.model_type),
        **(_grouping_by_length() if settings.group_by_length else {}),
        eval_strategy=settings.eval_strategy if prepared.task.eval_split else "no",
        load_best_model_at_end=settings.best is not None,
        metric_for_best_model=best,
        greater_is_better=best not in ("loss", TOKEN_LOSS, "perplexity"),
        batch_eval_metrics=settings.is_language_model,  # predictions over a vocabulary are not held
        report_to="none",
        logging_nan_inf_filter=False,  # it puts an average in the place of a loss that is not finite
        dataloader_pin_memory=accelerator_at_hand() is not None,
    )


def _grouping_by_length() -> dict[str, Any]:
    """The Trainer's argument for texts of like length in one batch, under the name that it has here."""
    names = {field.name for field in fields(TrainingArguments)}
    strategy = "train_sampling_strategy"
    return {strategy: "group_by_length"} if strategy in names else {"group_by_length": True}


def _training_facts(trainer: Trainer, network: Any) -> dict[str, Any]:
    """Steps and logged losses, and the bytes that training held in parameters, gradients and optimizer states."""
    parameters = list(network.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer: Any = trainer.optimizer
    return {
        "num_parameters": sum(p.numel() for p in (trained if hasattr(network, "peft_config") else parameters)),
        "weights_bytes": tensor_bytes(parameters),
        "gradients_bytes": tensor_bytes(trained),
        "optimizer_bytes": tensor_bytes(optimizer.state),
        "num_steps": trainer.state.global_step,
        "losses": tuple((int(log["step"]), log["loss"]) for log in trainer.state.log_history if "loss" in log),
    }


def _save(network: Any, tokenizer: Any, result: FineTuneResult, kind: str) -> None:
    """Leaves model, tokenizer and the account of the run, all at once: nothing half-written counts as a result."""
    with written_whole(result.output_dir, keeps=lambda name: not _is_of_a_result(name)) as (folder, target):
        if hasattr(network, "peft_config"):
            network.save_pretrained(folder)
        elif kind == "delta":
            write_delta(network, folder, find_base(network))
        else:
            save_full(network, folder)
        tokenizer.save_pretrained(folder)
        if kind == "delta" and (last := last_whole(target / CHECKPOINTS_FOLDER)) is not None:
            for name in (TENSORS, _TOKENIZER):  # what is large
                share_bytes(last / name, folder / name)
        if result.vocabulary is not None:
            result.vocabulary.save(folder / VOCABULARY_FILE)
        (folder / RESULT_FILE).write_text(json.dumps(result.to_dict(), indent=2) + "\n")
    with suppress(OSError):  # the Trainer makes the folder even where no checkpoint is asked for
        (result.output_dir / CHECKPOINTS_FOLDER).rmdir()


def _report(result: FineTuneResult, encoded: Mapping[str, Any], trainer: Any) -> DataReport:
    """Numbers of the run and of its data. Of two validations at a step the first is the run's, the other the result's."""
    task, log, peak = result.task, trainer.state.log_history, result.peak
    validations = {int(entry["step"]): scores for entry in reversed(log) if (scores := without_prefix(entry))}
    of_process = {"resident": peak.peak_rss_bytes, "allocated on the GPU": peak.peak_cuda_allocated_bytes}
    run = RunReport(
        num_steps=result.num_steps,
        losses=result.losses,
        validations=tuple(sorted(validations.items())),
        scores=result.scores,
        seconds=result.seconds,
        peak_bytes={f"peak, {name}": num_bytes for name, num_bytes in of_process.items() if num_bytes},
    )
    kept = result.vocabulary
    full_size = kept.full_size if kept is not None else model_full_size(trainer.model)
    assert full_size is not None  # of a model with input embeddings
    return report_on_data(
        {name: count_tokens(split, task.token_columns) for name, split in encoded.items()},
        full_size=full_size,
        kept_rows=None if kept is None else len(kept),
        tokenizer=trainer.processing_class,
        title=f"Fine-tuning in {result.output_dir}",
        training_split=task.train_split,
        memory=result.memory,
        run=run,
        notes=result.notes,
    )


def _is_of_a_result(name: str) -> bool:
    """True for the files of a model that an earlier run may have left, as whatever it was saved, and of its account."""
    return is_weights_file(name) or name.startswith("adapter_") or name in (*FILES, RESULT_FILE, VOCABULARY_FILE)


def _remove_earlier_run(output_dir: Path) -> None:
    """Removes what an earlier run left and this one might not write again. Its model stays until the new one is whole."""
    shutil.rmtree(output_dir / CHECKPOINTS_FOLDER, ignore_errors=True)
    for name in (RESULT_FILE, VOCABULARY_FILE):
        (output_dir / name).unlink(missing_ok=True)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
