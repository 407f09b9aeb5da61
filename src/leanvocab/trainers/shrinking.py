"""One line before training: what a trainer's data use is counted, and its model is shrunk to that."""

import inspect
from collections.abc import Iterable
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, DynamoBackend
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import TrainerCallback

from leanvocab.errors import DataError, ModelError, SettingsError
from leanvocab.model.growing import see_batches
from leanvocab.model.input_tables import table_at
from leanvocab.model.shrink import shrink_
from leanvocab.model.status import Status, Vocabularies, check_shrunk_as, status
from leanvocab.partial.module import partial_modules
from leanvocab.trainers.data_sets import DataSet, count_data_sets, data_sets, why_not_countable
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary
from leanvocab.vocabulary.special_ids import model_full_size


def shrink_trainer_(trainer: Any, *, vocabulary: Vocabularies | None = None, **options: Any) -> Status:
    """Shrinks a trainer's model to the rows that its data use, in place, before it trains; returns `status(model)`.

    Takes transformers' `Trainer` and what is made of it: TRL's trainers, those of sentence-transformers, and classes of your own.
    Its data sets for training and evaluation are counted, columns of token ids as they are and anything else as the trainer's
    own collator reads it, and so is what its tokenizer and model insert. Streams, words that a collator draws and tokens that the
    model generates cannot be counted: there rows come as their ids do (`on_missing="extend"`). A reference model
    (`trainer.ref_model`) is shrunk too. An optimizer that the trainer has already is handed over.

    Args:
        vocabulary: the rows to keep, where they are known; nothing is counted.
        options: those of `shrink_`.

    Raises:
        SettingsError: the trainer has no data to count, makes its model later (`model_init`), or its run takes no further rows.
        ModelError: the model is wrapped or compiled, or `shrink_` refuses it. `AlreadyShrunkError`: it is shrunk otherwise.
        DataError: a data set cannot be read.

    Source: docs/training.md.
    """
    model = _model_of(trainer)
    inspect.signature(shrink_).bind(model, vocabulary, optimizer=None, **options)
    if status(model):
        check_shrunk_as(model, vocabulary, options)
        return status(model)
    _check_not_wrapped(trainer, model)
    parts = [
        *data_sets("train_dataset", trainer.train_dataset, trainer.data_collator, trains=True),
        *data_sets("eval_dataset", getattr(trainer, "eval_dataset", None), trainer.data_collator, trains=False),
    ]
    tokenizer = getattr(trainer, "processing_class", None)
    if vocabulary is None:
        vocabulary, options = find_rows(model, parts, tokenizer, trainer.args, options)
    _check_reference_keeps_up(trainer, options)
    shrink_(model, vocabulary, optimizer=trainer.optimizer, **options)
    if vocabulary is not None and (reference := _reference_of(trainer, model)) is not None:
        shrink_(reference, vocabulary, **options | {"on_missing": "base", "decay_unused_rows": False})
    if options.get("on_missing") == "extend":
        trainer.add_callback(_SeesBatches())
    return status(model)


def find_rows(
    model: nn.Module, parts: Iterable[DataSet], tokenizer: Any, args: Any, options: dict[str, Any]
) -> tuple[PartialVocabulary | None, dict[str, Any]]:
    """The vocabulary of data sets (None: nothing of them can be counted), and the options of `shrink_` that go with it."""
    parts = list(parts)
    if options.get("ids") == "partial":
        raise SettingsError('ids="partial" is for data that a vocabulary has remapped; give that vocabulary')
    if not any(part.trains for part in parts):
        raise SettingsError("the trainer has no train_dataset to count; make it with one, or give the vocabulary")
    reasons = [reason for part in parts if part.trains for reason in why_not_countable(part)]
    reasons += ["the model trains on tokens that it samples"] if samples(args) else []
    options = _growing_where_needed(reasons, args, options)
    counted = count_data_sets(parts, model, tokenizer)
    reasons += counted.uncounted
    options = _growing_where_needed(reasons, args, options)
    if not counted.counts.num_tokens and options.get("on_missing") != "extend":
        raise DataError(
            f"nothing of the data can be counted: {'; '.join(reasons) or 'it is empty'}. Give the vocabulary"
        )
    if not counted.counts.num_tokens:
        return None, {"tokenizer": tokenizer} | options
    named = options.get("embedding") or ()
    sizes = [table_at(model, path).num_embeddings for path in ([named] if isinstance(named, str) else named)]
    size = max(sizes, default=model_full_size(model))
    return PartialVocabulary.from_counts(counted.counts, full_size=size, tokenizer=tokenizer, model=model), options


def _growing_where_needed(reasons: list[str], args: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The options, with rows that come where not all ids can be counted; `SettingsError` where none can come."""
    if reasons and options.get("on_missing") is None:
        options = options | {"on_missing": "extend"}
    if options.get("on_missing") == "extend" and (around := around_the_model(args)):
        raise SettingsError(
            f"{'; '.join(reasons) or 'on_missing'}: rows would have to come while the model trains, which they cannot under "
            f'{around}. Give the vocabulary (vocabulary=), or serve other ids from the base, untrained (on_missing="base")'
        )
    return options


class _SeesBatches(TrainerCallback):
    """Looks at batches before they go to a device."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        see_batches_of(args, model, kwargs.get("train_dataloader"))


def see_batches_of(args: Any, model: nn.Module, batches: Any) -> None:
    """Lets rows come while a batch is on the host, where it shows all ids that a model on another device will look up."""
    grows = any(module.table.on_missing == "extend" for module in partial_modules(model).values())
    is_on_host = next(model.parameters()).device.type == "cpu"
    if grows and not is_on_host and hasattr(batches, "base_dataloader") and not samples(args):
        see_batches(batches, model)


def samples(args: Any) -> bool:
    """True for the settings of trainers whose model trains on what it generates (GRPO, RLOO, GKD, online DPO, …)."""
    return hasattr(args, "temperature")


def around_the_model(args: Any) -> str | None:
    """What a run puts around its model, or makes of its rows, when training begins; None where it trains as it is."""
    state = AcceleratorState()
    if (kind := state.distributed_type) != DistributedType.NO:
        names = {DistributedType.DEEPSPEED: "DeepSpeed (ZeRO)", DistributedType.FSDP: "FSDP"}
        return names.get(kind, f"DistributedDataParallel ({kind.value})")
    if getattr(args, "torch_compile", False) or state.dynamo_plugin.backend != DynamoBackend.NO:
        return "torch.compile"
    return f"DataParallel over {args.n_gpu} GPUs" if getattr(args, "n_gpu", 1) > 1 else None


def _model_of(trainer: Any) -> nn.Module:
    lacking = [
        name for name in ("model", "args", "train_dataset", "data_collator", "optimizer") if not hasattr(trainer, name)
    ]
    if lacking:
        raise SettingsError(
            f"expected a Trainer of transformers or of what is made of it (TRL, sentence-transformers), got "
            f"{type(trainer).__name__}, which has no {', '.join(lacking)}; shrink_(model, vocabulary) shrinks a model itself"
        )
    if getattr(trainer, "model_init", None) is not None:
        raise SettingsError(
            "the trainer makes another model when training begins (model_init), so that shrinking this one would do nothing: "
            "call shrink_(model, vocabulary) within model_init, or give the trainer callbacks=[LeanVocabCallback()]"
        )
    if not isinstance(trainer.model, nn.Module):
        raise SettingsError(f"the trainer's model is {trainer.model!r}, expected a torch.nn.Module; make it with one")
    return trainer.model


def _check_not_wrapped(trainer: Any, model: nn.Module) -> None:
    wrapped = getattr(trainer, "model_wrapped", model)
    if wrapped is not model or not _is_itself(model):
        raise ModelError(
            f"the trainer's model is wrapped or compiled already ({type(wrapped).__name__}), and what was made of its rows would "
            "not see that they are fewer: make the trainer with the model itself, and call shrink_trainer_ before train()"
        )


def _is_itself(model: nn.Module) -> bool:
    """False where something was made of a model's forward or parameters that does not see them change."""
    around = isinstance(model, DataParallel | DistributedDataParallel) or hasattr(model, "_orig_mod")
    return not (around or model._compiled_call_impl is not None)


def _reference_of(trainer: Any, model: nn.Module) -> nn.Module | None:
    """The model that the trained one is compared with, where it is one like it, and whole."""
    reference = getattr(trainer, "ref_model", None)
    if not isinstance(reference, nn.Module) or type(reference) is not type(model) or not _is_itself(reference):
        return None
    is_alike = model_full_size(reference) == model_full_size(model)
    return reference if is_alike and not status(reference) else None


def _check_reference_keeps_up(trainer: Any, options: dict[str, Any]) -> None:
    if options.get("on_missing") == "extend" and getattr(trainer.args, "sync_ref_model", False):
        raise SettingsError(
            "sync_ref_model copies the trained parameters into the reference model, which cannot follow rows that come while "
            "training; give the vocabulary (vocabulary=), or leave sync_ref_model out"
        )
