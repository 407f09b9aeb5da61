"""`leanvocab estimate`: what training holds in memory, with the full and with a partial vocabulary."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from leanvocab.choices import FROZEN_ROWS_ON, OUTPUT_MODES
from leanvocab.cli.command import Answer, as_command
from leanvocab.cli.data_counts import DATA_HELP, DataOptions, config_beside, count_data, keep, load_tokenizer
from leanvocab.cli.printing import quiet_libraries
from leanvocab.errors import ModelError, SettingsError
from leanvocab.finetune.settings import TASKS


@dataclass(frozen=True)
class TrainingOptions:
    """Options that say how the model would be trained."""

    optimizer: Annotated[
        str, typer.Option(help="adamw, sgd, sgd_momentum, adafactor, torch_adafactor or adamw_8bit.")
    ] = "adamw"
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or mixed. By default as the config says.")] = None
    auto_class: Annotated[
        str | None, typer.Option(help="What the model becomes. By default AutoModelForSequenceClassification.")
    ] = None
    output: Annotated[
        str | None,
        typer.Option(
            help="Output layer of a language model: full, frozen or restricted. By default full, or frozen where it is tied."
        ),
    ] = None
    frozen_rows: Annotated[str, typer.Option(help="Where frozen rows are: device or host.")] = "device"
    num_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens in a batch, to count what a language model's loss holds too.")
    ] = None

    def arguments(self, task: str | None) -> dict[str, Any]:
        """Arguments of `estimate_memory` for a task; raises SettingsError where they contradict each other."""
        given = {**vars(self), "task": task}
        for name, allowed in (("task", TASKS), ("output", OUTPUT_MODES), ("frozen_rows", FROZEN_ROWS_ON)):
            if given[name] is not None and given[name] not in allowed:
                option = name.replace("_", "-")
                raise SettingsError(f"--{option} {given[name]}: expected one of {', '.join(allowed)}")
        if task is not None and self.auto_class is not None:
            raise SettingsError("--task and --auto-class both say what the model becomes: give one of them")
        if given.pop("task") is not None:
            given["auto_class"] = TASKS[str(task)].auto_class
        return given


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
    reading: DataOptions,
    training: TrainingOptions,
) -> Answer:
    """Estimate bytes of weights, gradients and optimizer states, full beside partial, before any weight is loaded."""
    if sum(given is not None for given in (vocabulary, data, rows)) != 1:
        raise SettingsError("say what is kept by one of --vocabulary, --data and --rows")
    arguments = training.arguments(reading.task)
    quiet_libraries()
    from leanvocab.reports.memory import estimate_memory
    from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

    config = config_beside(model)
    if config is None:
        raise ModelError(f"{model!r} is no folder with a model here, and the hub gave no model of that name")
    kept: Any = rows
    if vocabulary is not None:
        kept = PartialVocabulary.load(vocabulary)
    elif data is not None:
        loaded = load_tokenizer(tokenizer or model)
        kept = keep(count_data(data, reading, loaded), loaded, config)
    estimated = estimate_memory(model, kept, **arguments)
    return Answer(estimated.to_dict(), lambda: [estimated])
