"""Tables 5 to 8: the sizes of models and data sets, and the hyperparameters."""

from collections.abc import Sequence
from typing import Any

from reproduction.bench import Bench
from reproduction.cells import Cell, make_cell
from reproduction.grid import Entry, Grid, Result, cell_grid
from reproduction.paper import DEBERTA_SIZES, MODELS, TASKS, Model, Task

_SIZE_LABELS = {
    "vocabulary_size": "|V|",
    "embedding_parameters_millions": "N_emb (M)",
    "model_parameters_millions": "N (M)",
    "embedding_percent": "N_emb/N (%)",
    "layers": "l",
    "heads": "h",
    "hidden_size": "d_model",
}
_WHOLE_NUMBERS = ("vocabulary_size", "layers", "heads", "hidden_size")


def table5(bench: Bench, models: Sequence[Model] = MODELS) -> Result:
    """Vocabulary and parameters of each model, to the last digit."""
    table = "table5_model_sizes"
    published = bench.paper.numbers(table)
    cells: list[Cell] = []
    for model in models:
        checkpoint = model.size_checkpoint or model.checkpoint
        cells += _size_cells(bench, table, model.name, checkpoint, published[model.name])
    for model in models:
        if model.size_checkpoint:
            variant = model.checkpoint.rpartition("/")[2]
            cells += _size_cells(bench, table, model.name, model.checkpoint, published[model.name], variant)
    title = "Table 5: vocabulary size and parameters of each model"
    notes = ("Rows named with a checkpoint show the size of the checkpoint that Table 2's numbers point to.",)
    return Result("table5", title, (cell_grid(title, "Model", cells, _SIZE_LABELS),), tuple(cells), notes)


def table6(bench: Bench, sizes: Sequence[Model] = DEBERTA_SIZES) -> Result:
    """The DeBERTaV3 family, to the last digit."""
    table = "table6_deberta_v3_sizes"
    published = bench.paper.numbers(table)
    cells: list[Cell] = []
    for size in sizes:
        cells += _size_cells(bench, table, size.name, size.checkpoint, published[size.name])
    title = "Table 6: the DeBERTaV3 family"
    return Result("table6", title, (cell_grid(title, "Size", cells, _SIZE_LABELS),), tuple(cells))


def _size_cells(
    bench: Bench, table: str, row: str, checkpoint: str, published: dict[str, float], variant: str = ""
) -> list[Cell]:
    config, full = bench.sources.config(checkpoint), bench.sizes.full(checkpoint)
    measured = {
        "vocabulary_size": config.vocab_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "hidden_size": config.hidden_size,
        "embedding_parameters_millions": full.num_embedding_parameters / 1e6,
        "model_parameters_millions": full.num_parameters / 1e6,
        "embedding_percent": 100 * full.num_embedding_parameters / full.num_parameters,
    }
    return [
        make_cell(
            table, row, column, number, float(measured[column]),
            decimals=0 if column in _WHOLE_NUMBERS else 1, variant=variant,
        )
        for column, number in published.items()
    ]  # fmt: skip


def table7(bench: Bench, tasks: Sequence[Task] = TASKS) -> Result:
    """Examples in each split; a partial split decides nothing."""
    table = "table7_glue_examples"
    cells = []
    for task in tasks:
        published, total, whole = bench.paper.num_examples[task.name], 0, True
        data = bench.sources.glue(task)
        for heading in dict.fromkeys(heading for _, heading in task.splits):
            names = [split for split, under in task.splits if under == heading]
            held = [split for split in data.splits if split.name in names]
            rows = sum(len(split.rows) for split in held)
            complete = len(held) == len(names) and not any(split.is_partial for split in held)
            total, whole = total + rows, whole and complete
            reason = "" if complete else _why_incomplete(names, held)
            measured = float(rows) if complete else None
            cells.append(make_cell(table, task.label, heading, published[heading], measured, reason=reason, decimals=0))
        reason = "" if whole else "a total needs all splits"
        measured = float(total) if whole else None
        cells.append(make_cell(table, task.label, "total", published["total"], measured, reason=reason, decimals=0))
    title = "Table 7: examples per split of each GLUE data set"
    return Result("table7", title, (cell_grid(title, "Dataset", cells, {}),), tuple(cells))


def _why_incomplete(names: Sequence[str], held: Sequence[Any]) -> str:
    partial = [f"{split.name} is partial ({len(split.rows):,} rows)" for split in held if split.is_partial]
    absent = [f"{name} is not at hand" for name in names if name not in {split.name for split in held}]
    return "; ".join(partial + absent)


def table8(bench: Bench) -> Result:
    """The hyperparameters for GLUE, beside the defaults of `leanvocab.finetune.settings`."""
    from leanvocab.finetune.settings import FineTuneSettings

    settings = FineTuneSettings()
    table, heading = "table8_hyperparameters", "glue"
    defaults = {
        "adam_epsilon": settings.adam_epsilon,
        "adam_beta1": settings.adam_beta1,
        "adam_beta2": settings.adam_beta2,
        "batch_size": settings.batch_size,
        "dropout_attention": settings.dropout,
        "dropout_hidden": settings.dropout,
        "learning_rate_peak": settings.learning_rate_for("roberta"),
        "sequence_length": settings.max_length,
        "training_epochs": settings.epochs,
    }
    published = {line["hyperparameter"]: line[heading] for line in bench.paper.rows(table)}
    cells = [
        make_cell(table, name, heading, float(published[name].split()[0]), float(value), decimals=9)
        for name, value in defaults.items()
    ]
    title = "Table 8: hyperparameters for GLUE, beside the library's defaults"
    xlm = settings.learning_rate_for("xlm-roberta")
    rows = [(cell.row, (Entry(f"{cell.measured:g}"), Entry(published[cell.row]))) for cell in cells]
    rows.append(("learning_rate_schedule", (Entry(settings.scheduler), Entry(published["learning_rate_schedule"]))))
    rows.append(("learning_rate_peak, XLM models", (Entry(f"{xlm:g}"), Entry(published["learning_rate_peak"]))))
    return Result(
        "table8", title, (Grid(title, ("Hyperparameter", "default", "published"), tuple(rows)),), tuple(cells)
    )
