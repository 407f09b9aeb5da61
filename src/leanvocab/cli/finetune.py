"""`leanvocab finetune`: the main job."""

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leanvocab.cli.command import Answer, as_command
from leanvocab.cli.data_counts import Test, Validation, source_of
from leanvocab.cli.printing import Note, quiet_libraries, say_where_from
from leanvocab.finetune.settings import FineTuneSettings
from leanvocab.reports.memory_estimate import format_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from leanvocab.finetune.job import FineTuneResult
    from leanvocab.reports.peak import PeakMemory

_MOST_SHOWN = 8  # classes
_OUTPUTS = {
    "full": "full: stays whole",
    "frozen": "frozen: unused rows stay in the softmax",
    "restricted": "restricted: ANOTHER OBJECTIVE, over used rows alone",
}


@as_command
def finetune_command(
    *,
    model: Annotated[str, typer.Argument(help="Pretrained model: a folder, or a name on the hub.")],
    data: Annotated[
        str,
        typer.Argument(
            help="Text, with labels for classification: a CSV, JSON lines or Parquet file, a folder of them with splits in "
            "their names, or a name on the hub."
        ),
    ],
    output_dir: Annotated[str, typer.Option("--output-dir", "-o", help="Where the fine-tuned full model goes.")],
    validation: Validation = None,
    test: Test = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Say nothing on the way: the summary and errors alone.")
    ] = False,
    settings: FineTuneSettings,
) -> Answer:
    """Fine-tune a model on text with a partial vocabulary, and save the whole model.

    Classification and regression, of single texts or pairs, with the paper's defaults (Table 8); and language models:
    --task causal-lm (texts, prompts with completions, or chats), seq2seq-lm (prompts with completions) or masked-lm (texts).
    """
    quiet_libraries(quiet=quiet)
    if not quiet:
        say_where_from(model, data)
    from leanvocab.finetune.job import finetune

    source = source_of(data, validation, test, settings.config_name, settings.texts)
    result = finetune(model, source, output_dir, settings, progress=False if quiet else None)
    report = [f"report: {result.report}"] if result.report else []
    return Answer(result.to_dict(), lambda: [*_printed(result), *report, _next_step(model, output_dir, settings)])


def _next_step(model: str, output_dir: str, settings: FineTuneSettings) -> str:
    """The line that uses what the run left, to copy."""
    if settings.save == "delta":
        from leanvocab.checkpoints.delta_format import merge_command

        return f"to make the full model: {merge_command(model, output_dir)}"
    name, kind = json.dumps(output_dir), settings.kind
    if kind.pipeline is None:
        return f"to use it: transformers.{kind.auto_class}.from_pretrained({name})"
    return f'to use it: transformers.pipeline("{kind.pipeline}", {name})'


def _understood(understood: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What was read, in lines: a person sees first whether it is what they meant."""
    classes, left_out = understood.get("classes", ()), understood.get("left_out", {})
    more = f", … ({len(classes):,})" if len(classes) > _MOST_SHOWN else ""
    yield "task", understood["task"] + (f": {', '.join(classes[:_MOST_SHOWN])}{more}" if classes else "")
    for name, columns in understood["columns"].items():
        yield f"{name} column{'s' * (len(columns) > 1)}", ", ".join(columns)
    for name, number in understood["rows"].items():
        without = f" ({left_out[name]:,} left out, without a label)" if name in left_out else ""
        yield f"rows of {name}", f"{number:,}{without}"


def _printed(result: "FineTuneResult") -> "list[Table | str]":
    from rich.table import Column, Table

    grid = Table("", Column(justify="right"), title=str(result.output_dir), show_header=False)
    for name, value in _understood(result.understood):
        grid.add_row(name, value)
    grid.add_section()
    if result.vocabulary is None or result.memory is None:
        grid.add_row("vocabulary", "full")
        grid.add_row("parameters trained", f"{result.num_parameters:,}")
    else:
        kept, full_size, memory = len(result.vocabulary), result.vocabulary.full_size, result.memory
        full, partial = memory.full.num_parameters, memory.partial.num_parameters
        grid.add_row("vocabulary used", f"{kept:,} of {full_size:,} rows ({kept / full_size:.1%})")
        of = f"{full:,}" if result.num_parameters == partial else "an adapter"
        grid.add_row("parameters trained", f"{result.num_parameters:,} of {of}")
        if result.output is not None:
            grid.add_row("output layer", _OUTPUTS[result.output])
        if not memory.saves_little:
            grid.add_row("parameters saved", f"{full - partial:,} ({1 - partial / full:.1%})")
        saved, total = format_bytes(memory.saved_bytes), format_bytes(memory.full.total_bytes)
        grid.add_row("memory saved", f"{saved} of {total} ({memory.saved_ratio:.1%})")
        if memory.no_peak is None:
            grid.add_row("peak of a step, estimated", format_bytes(memory.partial.peak_bytes))
    grid.add_row("peak, measured", _measured(result.peak))
    grid.add_section()
    for name, seconds in result.seconds.items():
        grid.add_row(name, f"{seconds:,.2f} s")
    grid.add_section()
    grid.add_row("steps", f"{result.num_steps:,}")
    if result.losses:
        first, last = result.losses[0][1], result.losses[-1][1]
        grid.add_row("training loss, logged", f"{last:.4f}" if len(result.losses) == 1 else f"{first:.4f} … {last:.4f}")
    for name, score in result.scores.items():
        grid.add_row(f"validation {name}", f"{score:.4f}")
    if not result.scores:
        grid.add_row("validation", "none (some is held out by --validation-ratio)")
    notes = result.memory.notes if result.memory is not None else ()
    return [grid, *map(Note, (*notes, *result.notes))]


def _measured(peak: "PeakMemory") -> str:
    """What the device allocated, where there is one; what of this process was resident, libraries included."""
    allocated = f"{format_bytes(peak.peak_cuda_allocated_bytes)} allocated, " if peak.peak_cuda_allocated_bytes else ""
    return f"{allocated}{format_bytes(peak.peak_rss_bytes)} resident"
