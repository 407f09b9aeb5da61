"""`leanvocab estimate`: what training holds in memory, with the full and with a partial vocabulary."""

from dataclasses import dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leanvocab.cli.command import Answer, as_command
from leanvocab.cli.data_counts import (
    DATA_HELP,
    DataOptions,
    Test,
    TokenColumns,
    Validation,
    config_beside,
    count_data,
    keep,
    load_tokenizer,
)
from leanvocab.cli.printing import quiet_libraries
from leanvocab.errors import ModelError, SettingsError
from leanvocab.files.presence import is_folder
from leanvocab.finetune.settings import FineTuneSettings

_KNOBS = (
    "config_name", "text_columns", "prompt_column", "completion_column", "messages_column", "task", "max_length",
    "max_target_length", "packing", "chat_template_kwargs", "batch_size", "dropout", "bf16", "output", "frozen_rows", "lora",
    "qlora", "lora_rank", "gradient_checkpointing", "cpu",
)  # fmt: skip
# Of these, those on which only a step depends: where one is given, a step is counted.
_OF_A_STEP = ("max_length", "max_target_length", "batch_size", "dropout", "gradient_checkpointing", "cpu")
NO_ACTIVATIONS = (
    "Activations are not among these figures: --activations counts a step (--batch-size, --max-length), in seconds."
)
if TYPE_CHECKING:
    RunOptions = FineTuneSettings
else:
    RunOptions = make_dataclass(
        "RunOptions",
        [
            (knob.name, knob.type, field(default=knob.default, metadata=knob.metadata))
            for knob in fields(FineTuneSettings)
            if knob.name in _KNOBS
        ],
        frozen=True,
        kw_only=True,
        namespace={"__doc__": "Options of `leanvocab finetune` on which its memory depends, in its words."},
    )


@dataclass(frozen=True)
class OtherOptions:
    """Options for training that is not `leanvocab finetune`."""

    activations: Annotated[
        bool,
        typer.Option(
            "--activations", help="Count a step, for its peak with activations; so do --batch-size and its like."
        ),
    ] = False
    validation: Validation = None
    test: Test = None
    token_columns: TokenColumns = None
    optimizer: Annotated[
        str, typer.Option(help="adamw, sgd, sgd_momentum, adafactor, torch_adafactor or adamw_8bit.")
    ] = "adamw"
    precision: Annotated[
        str | None, typer.Option(help="fp32, bf16 or mixed. By default as finetune: fp32, mixed with --bf16.")
    ] = None
    auto_class: Annotated[
        str | None, typer.Option(help="What the model becomes. By default the class of the task.")
    ] = None
    num_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens in a batch, to count a language model's loss among what training holds."),
    ] = None


@as_command
def estimate_command(
    *,
    model: Annotated[
        str, typer.Argument(help="Pretrained model: a folder, or a name on the hub. Its config is enough.")
    ],
    vocabulary: Annotated[Path | None, typer.Option(help="Partial vocabulary that `leanvocab count` wrote.")] = None,
    data: Annotated[str | None, typer.Option(help="Count this instead. " + DATA_HELP)] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Or only say how many rows to keep.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer of the text. By default the model's.")] = None,
    options: RunOptions,
    others: OtherOptions,
) -> Answer:
    """Estimate what `leanvocab finetune` holds with the same options, full beside partial, before any weight is loaded.

    Bytes of weights, gradients and optimizer states, and the cards that they fit on; with --activations, or options on which
    they depend (--batch-size, --max-length, --gradient-checkpointing, …), the peak of a step. With LoRA the vocabulary does not
    train: where the output layer is tied, a partial vocabulary then saves next to nothing but a smaller loss.
    """
    if sum(given is not None for given in (vocabulary, data, rows)) != 1:
        raise SettingsError("say what is kept by one of --vocabulary, --data and --rows")
    if data is None and (others.validation or others.test):
        raise SettingsError("--validation and --test are files beside those of --data: name it too")
    if options.task is not None and others.auto_class is not None:
        raise SettingsError("--task and --auto-class both say what the model becomes: give one of them")
    settings = FineTuneSettings(**vars(options))
    has_step = others.activations or any(
        getattr(options, knob.name) != knob.default for knob in fields(options) if knob.name in _OF_A_STEP
    )
    kept: Any = rows
    if vocabulary is not None:
        from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

        kept = PartialVocabulary.load(vocabulary)
    elif data is not None:
        kept = _counted(data, tokenizer or model, model, settings, others)
    estimated = None if has_step else _from_headers(model, kept, settings, others)
    if estimated is None:
        estimated = _from_model(model, kept, settings, others, has_step)
    notes = estimated.notes if has_step else (*estimated.notes, NO_ACTIVATIONS)
    return Answer(estimated.to_dict(), lambda: [estimated, *notes])


def _counted(data: str, tokenizer: str, model: str, settings: FineTuneSettings, others: OtherOptions) -> Any:
    """The vocabulary of data."""
    quiet_libraries()
    loaded = load_tokenizer(tokenizer)
    given = {**vars(settings), "text_columns": list(settings.text_columns), **vars(others)}
    reading = DataOptions(**{option.name: given[option.name] for option in fields(DataOptions)})
    config = _config_of(model)
    return keep(count_data(data, reading, loaded, config), loaded, config)


def _config_of(model: str) -> Any:
    config = config_beside(model)
    if config is None:
        raise ModelError(f"{model!r} is no folder with a model here, and the hub gave no model of that name")
    return config


def _from_headers(model: str, kept: Any, settings: FineTuneSettings, others: OtherOptions) -> Any:
    """The estimate of a checkpoint on this machine, by its headers; None where the model has to be built."""
    from leanvocab.reads.transformers_text import Unsure
    from leanvocab.reports.header_estimate import estimate_from_headers, folder_of

    folder = folder_of(model)
    if folder is None or settings.uses_lora or others.auto_class is not None or others.num_tokens is not None:
        return None
    try:
        estimated = estimate_from_headers(
            folder,
            kept,
            auto_class=settings.kind.auto_class,
            precision=others.precision or ("mixed" if settings.bf16 else "fp32"),
            optimizer=others.optimizer,
            output=settings.output,
            frozen_rows=settings.frozen_rows,
        )
    except Unsure:
        return None
    return replace(estimated, model=_name_of(model))


def _name_of(model: str) -> str:
    return Path(model).name if is_folder(model) else model


def _from_model(model: str, kept: Any, settings: FineTuneSettings, others: OtherOptions, has_step: bool) -> Any:
    """The estimate of the model that is built without memory."""
    quiet_libraries()
    from leanvocab.finetune.pretrained import estimate_run, set_dropout, training_step

    config = _config_of(model)
    set_dropout(config, settings.dropout)
    given = {"precision": others.precision, "auto_class": others.auto_class}
    estimated = estimate_run(
        config,
        kept,
        settings,
        training_step(settings, on_cpu=settings.cpu) if has_step else None,
        optimizer=others.optimizer,
        num_tokens=others.num_tokens,
        **{name: value for name, value in given.items() if value is not None},
    )
    return replace(estimated, model=_name_of(model))
