"""`leanvocab finetune`: the main job."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leanvocab.cli.options import settings_from, with_settings
from leanvocab.cli.shell import AsJson, clean_errors, print_json, print_rich, quiet_libraries

if TYPE_CHECKING:
    from rich.table import Table

    from leanvocab.finetune.job import FineTuneResult

_OUTPUTS = {
    "full": "full: stays whole",
    "frozen": "frozen: unused rows stay in the softmax",
    "restricted": "restricted: ANOTHER OBJECTIVE, over used rows alone",
}


@with_settings
def finetune(
    *,
    model: Annotated[str, typer.Argument(help="Pretrained model: a folder, or a name on the hub.")],
    data: Annotated[
        str,
        typer.Argument(
            help="Text, with labels for classification: a CSV, JSON lines or Parquet file, a folder of them with splits in "
            "their names, or a name on the hub."
        ),
    ],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Where the fine-tuned full model goes.")],
    validation: Annotated[Path | None, typer.Option(help="File of the validation split.")] = None,
    test: Annotated[Path | None, typer.Option(help="File of a test split, to count its tokens too.")] = None,
    as_json: AsJson = False,
    **knobs: Any,
) -> None:
    """Fine-tune a model on text with a partial vocabulary, and save the whole model.

    Classification and regression, of single texts or pairs, with the paper's defaults (Table 8); and language models:
    --task causal-lm (texts, prompts with completions, or chats), seq2seq-lm (prompts with completions) or masked-lm (texts).
    """
    with clean_errors(as_json):
        settings = settings_from(knobs)
        quiet_libraries()
        from leanvocab.finetune import job
        from leanvocab.finetune.loading import load_splits

        files = {"validation": validation, "test": test}
        source: Any = data
        if any(files.values()):
            splits = load_splits(data, settings.config_name)
            source = {**splits, **{name: file for name, file in files.items() if file is not None}}
        result = job.finetune(model, source, output_dir, settings)
    if as_json:
        print_json(result.to_dict())
    else:
        print_rich(*_summary(result))


def _summary(result: "FineTuneResult") -> "list[Table | str]":
    from rich.table import Table

    from leanvocab.reports.units import format_bytes

    table = Table(title=str(result.output_dir), show_header=False)
    table.add_column()
    table.add_column(justify="right")
    if result.vocabulary is None or result.memory is None:
        table.add_row("vocabulary", "full")
        table.add_row("parameters trained", f"{result.num_parameters:,}")
    else:
        kept, full = len(result.vocabulary), result.vocabulary.full_size
        all_parameters, left = result.memory.full.num_parameters, result.memory.partial.num_parameters
        is_adapter = result.num_parameters != left
        table.add_row("vocabulary used", f"{kept:,} of {full:,} rows ({kept / full:.1%})")
        of = "an adapter" if is_adapter else f"{all_parameters:,}"
        table.add_row("parameters trained", f"{result.num_parameters:,} of {of}")
        if result.output is not None:
            table.add_row("output layer", _OUTPUTS[result.output])
        table.add_row("parameters saved", f"{all_parameters - left:,} ({1 - left / all_parameters:.1%})")
        saved, saved_ratio = result.memory.saved_bytes, result.memory.saved_ratio
        table.add_row(
            "memory saved",
            f"{format_bytes(saved)} of {format_bytes(result.memory.full.total_bytes)} ({saved_ratio:.1%})",
        )
    table.add_section()
    for name, seconds in result.seconds.items():
        table.add_row(name, f"{seconds:,.2f} s")
    table.add_section()
    table.add_row("steps", f"{result.num_steps:,}")
    for name, score in result.scores.items():
        table.add_row(f"validation {name}", f"{score:.4f}")
    return [table, *result.notes]
