"""A name or folder → config, tokenizer and model, made ready for a task; what cannot work is an error at once."""

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, PreTrainedConfig
from transformers.quantizers.auto import AutoHfQuantizer

from leanvocab.adapters.lora import add_lora
from leanvocab.errors import ModelError, SettingsError, first_line
from leanvocab.extras import require
from leanvocab.files.presence import is_folder
from leanvocab.finetune.settings import (
    CAUSAL_LM,
    MASKED_LM,
    MAX_TARGET_LENGTH,
    SEQ2SEQ_LM,
    DataSettings,
    FineTuneSettings,
)
from leanvocab.finetune.tasks import Task
from leanvocab.partial.devices import accelerator_at_hand
from leanvocab.reports.memory import estimate_memory
from leanvocab.reports.memory_estimate import MemoryEstimate, TrainingStep
from leanvocab.texts.fitting import check_sizes

# Of classifiers: what peft trains and saves, and layers below it that checkpoints of language models lack.
_HEADS = ("classifier", "score", "pre_classifier", "pooler.dense")
# Where configs keep the dropout of hidden states and of attention.
_DROPOUT_NAMES = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "hidden_dropout", "dropout", "attention_dropout",
    "dropout_rate", "embd_pdrop", "attn_pdrop", "resid_pdrop",
)  # fmt: skip


@dataclass(frozen=True)
class Pretrained:
    """A model that is not loaded yet: where it lies, its config, its tokenizer, and what was repaired."""

    name: str
    config: Any
    tokenizer: Any
    auto_class: Any
    notes: tuple[str, ...]
    lengths: Mapping[str, Any] = field(default_factory=dict)  # settings, as the model takes them

    def load(self, task: Task, *, few_bits: bool = False, on_cpu: bool = False) -> tuple[Any, tuple[str, ...]]:
        """The model with a head for the task, and what a user should know of it.

        It is in fp32 on CPU; with `few_bits` in 4 bits on the device that trains, which is the CPU if it is said so.

        A classification head is new where the checkpoint has none of that size, or one for something else. A language
        model's is the checkpoint's own; weights of it that are not there start anew, and are named.

        Raises:
            ModelError: the weights are not there or not readable, or there is no head of this kind.
        """
        task.set_labels(self.config)
        try:
            network, loading = self.auto_class.from_pretrained(
                self.name,
                config=self.config,
                **(_in_four_bits(on_cpu, task.has_new_head) if few_bits else {"dtype": torch.float32}),
                ignore_mismatched_sizes=task.has_new_head,
                output_loading_info=True,
            )
        except Exception as error:  # what lies in its files: readers raise whatever they meet
            raise ModelError(f"the model {self.name!r} cannot be loaded: {first_line(error)}") from error
        if task.replaces_head:
            self._make_head_anew(network)
        new = [] if task.has_new_head else sorted(loading["missing_keys"])
        return network, tuple(f"The checkpoint has no {name}; it starts anew." for name in new)

    def _make_head_anew(self, network: Any) -> None:
        """Gives a head the values that it has in a model that was never trained; the loaded ones are of the same shape."""
        config = copy.deepcopy(self.config)
        config.num_labels += 1
        with torch.device("meta"):
            untrained, wider = (self.auto_class.from_config(each) for each in (self.config, config))
        shapes = {name: parameter.shape for name, parameter in untrained.named_parameters()}
        head = [name for name, parameter in wider.named_parameters() if parameter.shape != shapes[name]]
        for name in head:
            path, _, attribute = name.rpartition(".")
            unset = nn.Parameter(torch.full(shapes[name], torch.nan, device="cpu"))
            setattr(untrained.get_submodule(path), attribute, unset)
        untrained.apply(untrained._init_weights)  # nothing happens to what is on the meta device
        for name in head:
            loaded, new = network.get_parameter(name), untrained.get_parameter(name)
            if loaded.shape != new.shape or new.isnan().any():
                raise ModelError(f"{name} of {self.name!r}, which was trained for other classes, cannot be made anew")
            with torch.no_grad():
                loaded.copy_(new)


def _in_four_bits(on_cpu: bool, is_classifier: bool) -> dict[str, Any]:
    """Arguments that load a model for QLoRA: 4 bits (nf4, scales quantized too), computing in bf16, on the device that trains.

    The head of a classifier trains, and is new: neither can be in 4 bits. transformers itself leaves a language model's as it is.
    """
    bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=list(_HEADS) if is_classifier else None,
    )
    is_cpu = on_cpu or accelerator_at_hand() is None
    device = "cpu" if is_cpu else int(os.environ.get("LOCAL_RANK", "0"))
    return {"quantization_config": bits, "dtype": torch.bfloat16, "device_map": {"": device}}


def find_pretrained(name: str | Path, settings: DataSettings, dropout: float) -> Pretrained:
    """Config and tokenizer of a model, made ready for fine-tuning; no weights.

    Raises:
        ModelError: there is no such model, it has no tokenizer or one that is not its own, or nothing to pad with.
        SettingsError: texts may become longer than the model can take.
    """
    try:
        config = _with_names_of_classes(AutoConfig.from_pretrained(name), name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # what lies in its files: readers raise whatever they meet
        where = "is no folder here, and the hub did not give it" if not is_folder(name) else "cannot be read"
        raise ModelError(f"the model {str(name)!r} {where}: {first_line(error)}") from error
    check_sizes(tokenizer, config, str(name))
    auto_class = getattr(transformers, settings.kind.auto_class)
    if type(config) not in auto_class._model_mapping:
        raise ModelError(f"transformers has no {settings.kind.head} for models of the type {config.model_type!r}")
    if settings.task == MASKED_LM and tokenizer.mask_token is None:
        raise ModelError(f"the tokenizer of {str(name)!r} has no mask token, which masked-lm needs")
    lengths, notes = fit_lengths(settings, config, tokenizer)
    if settings.task != CAUSAL_LM:
        notes += _set_padding(config, tokenizer, str(name), settings.is_language_model)
    set_dropout(config, dropout)
    return Pretrained(str(name), config, tokenizer, auto_class, notes, lengths)


def set_dropout(config: Any, dropout: float) -> None:
    """Sets the dropout of hidden states and of attention; below 0 leaves them as they are."""
    if dropout >= 0:
        for part in (config, config.get_text_config()):
            for field in _DROPOUT_NAMES:
                if isinstance(getattr(part, field, None), float | int):
                    setattr(part, field, dropout)


def training_step(settings: FineTuneSettings, *, on_cpu: bool) -> TrainingStep:
    """The step of a run with the longest batch that it may meet."""
    return TrainingStep(
        batch_size=settings.batch_size,
        length=settings.max_length,
        target_length=settings.max_target_length if settings.task == SEQ2SEQ_LM else None,
        gradient_checkpointing=settings.gradient_checkpointing,
        on_cpu=on_cpu,
    )


def estimate_run(
    config: Any, kept: Any, settings: FineTuneSettings, step: TrainingStep | None, **others: Any
) -> MemoryEstimate:
    """Estimates what training with these settings holds, of a model that is loaded as `Pretrained.load` does; `others` are
    arguments of `estimate_memory` for training of another kind."""
    if step is not None and "auto_class" not in others:
        lengths, _ = fit_lengths(settings, config)
        step = replace(step, length=min(step.length, lengths["max_length"]))
    config, arguments = run_arguments(config, settings)
    if settings.qlora and step is not None:
        no_peak = "kernels for weights of 4 bits need values"
        return replace(estimate_memory(config, kept, **arguments | others), step=step, no_peak=no_peak)
    return estimate_memory(config, kept, step=step, **arguments | others)


def run_arguments(config: Any, settings: FineTuneSettings) -> tuple[Any, dict[str, Any]]:
    """The config, and the arguments of `estimate_memory`, with which training with these settings is estimated."""
    lora = partial(add_lora, adapter_type=settings.kind.adapter_type, rank=settings.lora_rank)
    arguments: dict[str, Any] = {
        "precision": "mixed" if settings.bf16 else "fp32",
        "auto_class": settings.kind.auto_class,
        "output": settings.output,
        "frozen_rows": settings.frozen_rows,
        "adapt": lora if settings.uses_lora else None,
    }
    if settings.qlora:
        is_classifier = not settings.is_language_model
        config = copy.deepcopy(config)
        config.dtype = torch.bfloat16
        arguments |= {
            "precision": "mixed" if settings.bf16 else None,
            "adapt": lambda model: lora(_quantized(model, is_classifier)),
        }
    return config, arguments


def _quantized(model: Any, is_classifier: bool) -> Any:
    """A model without memory with the weights that one has that was loaded in 4 bits and made ready to train."""
    require("bitsandbytes", extra="quantization")
    bits = _in_four_bits(True, is_classifier)["quantization_config"]
    quantizer = AutoHfQuantizer.from_config(bits, pre_quantized=False)
    quantizer.preprocess_model(model, device_map=None)
    packed_once: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if type(weight).__name__ == "Params4bit":
                packed = torch.empty((weight.numel() + 1) // 2, 1, dtype=torch.uint8, device="meta")
            else:
                packed = weight.detach().to(torch.float32)
            weights = packed_once.setdefault(id(weight), nn.Parameter(packed, requires_grad=False))
            setattr(module, name, weights)
    return model


def _with_names_of_classes(config: Any, name: str | Path) -> Any:
    """The config, with the names that it has in `label2id` alone, which transformers leaves behind."""
    written, _ = PreTrainedConfig.get_config_dict(name)
    label2id = written.get("label2id")
    if (
        "id2label" not in written
        and isinstance(label2id, dict)
        and sorted(label2id.values()) == [*range(len(label2id))]
    ):
        config.id2label = {number: label for label, number in sorted(label2id.items(), key=lambda item: item[1])}
    return config


def _set_padding(config: Any, tokenizer: Any, name: str, is_language_model: bool) -> tuple[str, ...]:
    """Something to pad with. Causal language models need none: their padding is masked by its position, whatever its id."""
    notes: tuple[str, ...] = ()
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(
                f"the tokenizer of {name!r} has neither a padding nor an end-of-sequence token to pad batches with; "
                "give it one (tokenizer.pad_token = …), save it and name that folder"
            )
        tokenizer.pad_token = tokenizer.eos_token
        notes = (f"The tokenizer has no padding token; its end of sequence {tokenizer.eos_token!r} pads.",)
    if not is_language_model and getattr(config.get_text_config(), "pad_token_id", None) is None:
        # Decoder models find the last token of a text by it. (An embedding would not train the row of its padding_idx, which
        # a language model that ends its texts with that token needs.)
        config.pad_token_id = config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return notes


def fit_lengths(settings: DataSettings, config: Any, tokenizer: Any = None) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Lengths of texts by their settings, and what to say of them: a default that is too long for the model gives way.

    Raises:
        SettingsError: a length that was asked for is more than the model takes.
    """
    defaults = {"max_length": settings.kind.max_length}
    if settings.task == SEQ2SEQ_LM:
        defaults["max_target_length"] = MAX_TARGET_LENGTH
    lengths, notes = dict[str, Any](), []
    for name, default in defaults.items():
        lengths[name] = asked = getattr(settings, name)
        most = min(_limits(config, tokenizer, getattr(transformers, settings.kind.auto_class), asked), default=asked)
        if most < asked != default:
            raise SettingsError(f"{name} is {asked}, but the model takes {most} tokens at most")
        if most < asked:
            lengths[name] = most
            notes.append(f"The model takes {most} tokens at most, so that {name} is {most}, and not {asked}.")
    return lengths, tuple(notes)


def _limits(config: Any, tokenizer: Any, auto_class: Any, max_length: int) -> list[int]:
    """Tokens that a tokenizer and the positions of a model allow at most; what is not given allows any."""
    return [
        limit
        for limit in (getattr(tokenizer, "model_max_length", None), _positions(config, auto_class, max_length))
        if isinstance(limit, int) and limit > 0
    ]


def _positions(config: Any, auto_class: Any, max_length: int) -> Any:
    if config is None:
        return None
    text_config = config.get_text_config()
    positions, pad_id = (getattr(text_config, name, None) for name in ("max_position_embeddings", "pad_token_id"))
    if isinstance(positions, int) and isinstance(pad_id, int) and positions - pad_id - 1 < max_length:
        with torch.device("meta"):
            network = auto_class.from_config(config)
        tables = [module for module in network.modules() if isinstance(module, nn.Embedding)]
        # Positions are counted from behind padding_idx where their own table has one (RoBERTa and its kin).
        offsets = [t.padding_idx + 1 for t in tables if t.num_embeddings == positions and t.padding_idx is not None]
        has_vocabulary = positions == getattr(text_config, "vocab_size", None)
        positions -= 0 if has_vocabulary else max(offsets, default=0)
    return positions
