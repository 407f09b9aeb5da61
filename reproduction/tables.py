"""Tables 2 to 8: how much a partial vocabulary leaves out, how large models and data sets are, and the defaults."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from leanvocab.counts import TokenCounts
from reproduction.cells import Cell, make_cell
from reproduction.counting import Counter
from reproduction.grid import Entry, Grid, Result, cell_grid
from reproduction.paper import DEBERTA_SIZES, MODELS, TASKS, XNLI_LANGUAGES, XNLI_SUBSETS, Model, Paper, Task
from reproduction.sizes import Reduction, Sizes, used_alone, with_special
from reproduction.sources import NotHereError, Sources, TextData, check_tokenizer

TOLERANCE = 0.1
"""How far a reduction may lie from the published one, in the unit of its table."""
TASK_LABELS = {task.name: task.label for task in TASKS} | {"mean": "Mean"}
_EMBEDDING, _MODEL = "table2_embedding_reduction_percent", "table2_model_reduction_percent"
_MILLIONS = "table3_deberta_v3_reduction_millions"
_XNLI_EMBEDDING, _XNLI_MODEL = "table4_xnli_embedding_reduction_percent", "table4_xnli_model_reduction_percent"
_XNLI_LABELS = 3


@dataclass
class Bench:
    """What all tables are made with: the paper, the sources, and what was counted and built before."""

    sources: Sources
    counter: Counter
    sizes: Sizes

    @classmethod
    def of(cls, sources: Sources, progress: bool | None = None) -> "Bench":
        return cls(sources, Counter(sources, progress), Sizes(sources))

    @property
    def paper(self) -> Paper:
        return self.sources.paper


@dataclass(frozen=True)
class Measured:
    """Reductions for one model and one data set; None where nothing of it is at hand. `gaps`: what is not at hand."""

    used: Reduction | None
    special: Reduction | None
    gaps: tuple[str, ...]


def measure(bench: Bench, checkpoint: str, tokenizer_name: str, texts: Sequence[TextData], num_labels: int) -> Measured:
    """How much of a model the tokens of some texts leave out: in the paper's way, and in the library's default.

    Raises:
        ModelError: tokenizer and config do not belong together.
    """
    gaps = tuple(dict.fromkeys(gap for data in texts for gap in data.gaps))
    try:
        tokenizer, config = bench.sources.tokenizer(tokenizer_name), bench.sources.config(checkpoint)
    except NotHereError as error:
        return Measured(None, None, (str(error),))
    check_tokenizer(tokenizer_name, tokenizer, checkpoint, config)
    held = [data for data in texts if data.splits]
    if not held:
        return Measured(None, None, gaps)
    counts = _sum(bench.counter.count_all(tokenizer_name, held))
    used = bench.sizes.reduction(checkpoint, num_labels, used_alone(counts, config.vocab_size))
    special = bench.sizes.reduction(checkpoint, num_labels, with_special(counts, tokenizer, config))
    return Measured(used, special, gaps)


def _sum(counts: Iterable[TokenCounts]) -> TokenCounts:
    first, *others = counts
    return sum(others, first)


# ------------------------------------------------------------------------------------------------- Tables 2 and 3


def table2(bench: Bench, tasks: Sequence[Task] = TASKS, models: Sequence[Model] = MODELS) -> Result:
    """Reduction of embedding and of model parameters, in percent, for every model and task of GLUE."""
    rows: dict[tuple[str, str], dict[str, Measured]] = {}
    _count_ahead(bench, [model.tokenizer for model in models] + [model.size_tokenizer for model in models], tasks)
    for model in models:
        rows[model.name, ""] = _measure_row(bench, model.checkpoint, model.tokenizer, tasks)
    for model in models:
        if model.size_checkpoint:
            variant = _short(model.size_checkpoint)
            row = _measure_row(bench, model.size_checkpoint, model.size_tokenizer, tasks)
            rows[model.name, variant] = row
    embedding = _reduction_cells(bench, _EMBEDDING, rows, "embedding_percent")
    whole = _reduction_cells(bench, _MODEL, rows, "model_percent")
    return Result(
        "table2",
        "Table 2: reduction in embedding and model parameters (%) across GLUE",
        _both_ways("Model", {"Embedding parameters": embedding, "Model parameters": whole}, "%"),
        (*embedding, *whole),
        notes=(
            "Rows named with a checkpoint show what the checkpoint gives that Table 5's numbers point to.",
            *_bound_note((*embedding, *whole)),
            *_variant_notes(models, (*embedding, *whole)),
            *_time_notes(bench, tasks),
        ),
        records={"counting_times": _times(bench)},
    )


def _bound_note(cells: Sequence[Cell]) -> tuple[str, ...]:
    """Whether what is at hand of incomplete data sets contradicts a published number."""
    bounded = [cell for cell in cells if cell.at_most is not None and cell.published is not None and not cell.variant]
    kept = sum(cell.published <= cell.at_most + TOLERANCE for cell in bounded)  # type: ignore[operator]
    if not bounded:
        return ()
    return (
        f"Undecided cells for which a part of the data is at hand: {len(bounded)}. The published reduction is no larger "
        f"than that part allows in {kept} of them.",
    )


def _variant_notes(models: Sequence[Model], cells: Sequence[Cell]) -> list[str]:
    """How the two checkpoints that a row may stand for compare on the decided cells."""
    notes = []
    for model in models:
        if model.size_checkpoint:
            parts = []
            for variant, checkpoint in (("", model.checkpoint), (_short(model.size_checkpoint), model.size_checkpoint)):
                decided = [cell for cell in cells if cell.row == model.name and cell.variant == variant]
                decided = [cell for cell in decided if cell.status != "undecided"]
                matched = sum(cell.status == "matched" for cell in decided)
                parts.append(f"{matched} of {len(decided)} decided cells match with {_short(checkpoint)}")
            notes.append(f"{model.name}: {', '.join(parts)}.")
    return notes


def _short(name: str) -> str:
    return name.rpartition("/")[2]


def table3(bench: Bench, tasks: Sequence[Task] = TASKS, sizes: Sequence[Model] = DEBERTA_SIZES) -> Result:
    """Reduction of model parameters, in millions, for every size of DeBERTaV3."""
    _count_ahead(bench, [size.tokenizer for size in sizes], tasks)
    rows = {(size.name, ""): _measure_row(bench, size.checkpoint, size.tokenizer, tasks) for size in sizes}
    cells = _reduction_cells(bench, _MILLIONS, rows, "saved_millions")
    title = "Table 3: reduction in model parameters (millions) for each size of DeBERTaV3 across GLUE"
    grids = _both_ways("Size", {"Model parameters": cells}, "millions")
    return Result("table3", title, grids, tuple(cells), _bound_note(cells))


def _count_ahead(bench: Bench, tokenizers: Iterable[str], tasks: Sequence[Task]) -> None:
    """All tasks with one tokenizer under one progress bar."""
    texts = [data for data in map(bench.sources.glue, tasks) if data.splits]
    for name in dict.fromkeys(name for name in tokenizers if name):
        try:
            bench.sources.tokenizer(name)
        except NotHereError:
            continue
        bench.counter.count_all(name, texts)


def _measure_row(bench: Bench, checkpoint: str, tokenizer: str, tasks: Sequence[Task]) -> dict[str, Measured]:
    return {
        task.name: measure(bench, checkpoint, tokenizer, [bench.sources.glue(task)], task.num_labels) for task in tasks
    }


def _reduction_cells(
    bench: Bench, table: str, rows: dict[tuple[str, str], dict[str, Measured]], unit: str
) -> list[Cell]:
    published = bench.paper.numbers(table)
    cells = []
    for (row, variant), found in rows.items():
        made = [
            _reduction_cell(table, row, column, published[row].get(column), measured, unit, variant)
            for column, measured in found.items()
        ]
        cells += made
        if len(made) == len(TASKS):
            cells.append(_mean_cell(table, row, published[row].get("mean"), made, variant))
    return cells


def _reduction_cell(
    table: str, row: str, column: str, published: float | None, found: Measured, unit: str, variant: str = ""
) -> Cell:
    used = None if found.used is None else getattr(found.used, unit)
    special = None if found.special is None else getattr(found.special, unit)
    if found.gaps:
        reason = "; ".join(found.gaps)
        return make_cell(table, row, column, published, None, reason=reason, at_most=used, variant=variant)
    return make_cell(table, row, column, published, used, tolerance=TOLERANCE, with_special=special, variant=variant)


def _mean_cell(table: str, row: str, published: float | None, cells: Sequence[Cell], variant: str) -> Cell:
    used, special = ([getattr(cell, name) for cell in cells] for name in ("measured", "with_special"))
    if None in used:
        reason = f"a mean needs all {len(cells)} tasks"
        return make_cell(table, row, "mean", published, None, reason=reason, variant=variant)
    return make_cell(
        table, row, "mean", published, sum(used) / len(used),
        tolerance=TOLERANCE, with_special=sum(special) / len(special), variant=variant,
    )  # fmt: skip


def _both_ways(first_heading: str, tables: dict[str, list[Cell]], unit: str) -> tuple[Grid, ...]:
    """Each table as the paper counts, and with special tokens always kept."""
    grids = []
    for label, cells in tables.items():
        title = f"Reduction in {label.lower()} ({unit})"
        grids.append(cell_grid(title, first_heading, cells, TASK_LABELS))
        decided = [cell for cell in cells if cell.with_special is not None]
        if decided:
            title += ", special tokens always kept (the library's default)"
            grids.append(cell_grid(title, first_heading, decided, TASK_LABELS, lambda cell: cell.with_special))
    return tuple(grids)


def _times(bench: Bench) -> list[dict[str, Any]]:
    return [
        {"tokenizer": _short(tokenizer), "texts": texts, "seconds": seconds}
        for (tokenizer, texts), seconds in bench.counter.seconds.items()
    ]


def _time_notes(bench: Bench, tasks: Sequence[Task]) -> list[str]:
    """How long all complete tasks took, by tokenizer."""
    complete = {task.name for task in tasks if bench.sources.glue(task).is_complete}
    totals: dict[str, float] = {}
    for (tokenizer, texts), seconds in bench.counter.seconds.items():
        if texts in complete:
            totals[tokenizer] = totals.get(tokenizer, 0.0) + seconds
    if not totals:
        return []
    shown = ", ".join(f"{name.rpartition('/')[2]} {seconds:.1f} s" for name, seconds in totals.items())
    return [f"Tokenizing and counting all complete tasks ({', '.join(sorted(complete))}) took: {shown}."]


# ------------------------------------------------------------------------------------------------------- Table 4


def table4(bench: Bench, models: Sequence[Model] = MODELS) -> Result:
    """Reduction for the multilingual models on subsets of XNLI's languages."""
    published = bench.paper.numbers(_XNLI_EMBEDDING)
    models = [model for model in models if model.name in published]
    texts = {language: bench.sources.xnli(language) for language in XNLI_LANGUAGES}
    rows: dict[tuple[str, str], dict[str, Measured]] = {}
    for model in models:
        found = {}
        for name, languages in XNLI_SUBSETS.items():
            subset = [texts[language] for language in languages]
            measured = measure(bench, model.checkpoint, model.tokenizer, subset, _XNLI_LABELS)
            gaps = measured.gaps if measured.used is None and any(data.splits for data in subset) else _gaps(subset)
            found[name] = Measured(measured.used, measured.special, gaps)
        rows[model.name, ""] = found
    embedding = _xnli_cells(bench, _XNLI_EMBEDDING, rows, "embedding_percent")
    whole = _xnli_cells(bench, _XNLI_MODEL, rows, "model_percent")
    return Result(
        "table4",
        "Table 4: reduction in parameters (%) on subsets of XNLI",
        (
            *_both_ways("Model", {"Embedding parameters": embedding, "Model parameters": whole}, "%"),
            _holdings_grid(texts),
        ),
        (*embedding, *whole),
        notes=_bound_note((*embedding, *whole)),
        records={"table4_xnli_held_splits": _holdings(texts)},
    )


def _xnli_cells(bench: Bench, table: str, rows: dict[tuple[str, str], dict[str, Measured]], unit: str) -> list[Cell]:
    published = bench.paper.numbers(table)
    return [
        _reduction_cell(table, row, column, published[row].get(column), measured, unit)
        for (row, _), found in rows.items()
        for column, measured in found.items()
    ]


def _gaps(subset: Sequence[TextData]) -> tuple[str, ...]:
    """What is missing, said by language: fifteen languages lack much."""
    nothing = [data.name.rpartition(".")[2] for data in subset if not data.splits]
    some = [data for data in subset if data.splits and not data.is_complete]
    gaps = []
    if nothing:
        gaps.append(f"nothing of {', '.join(nothing)} is at hand")
    for missing in dict.fromkeys(_missing_splits(data) for data in some):
        languages = [data.name.rpartition(".")[2] for data in some if _missing_splits(data) == missing]
        gaps.append(f"{missing} of {', '.join(languages)}")
    return tuple(gaps)


def _missing_splits(data: TextData) -> str:
    return ", ".join(gap.removeprefix(f"{data.name}.") for gap in data.gaps)


def _holdings(texts: dict[str, TextData]) -> list[dict[str, Any]]:
    return [
        {"language": language, "split": split.name, "rows": len(split.rows), "partial": split.is_partial}
        for language, data in texts.items()
        for split in data.splits
    ]


def _holdings_grid(texts: dict[str, TextData]) -> Grid:
    splits = ("train", "validation", "test")
    rows = []
    for language, data in texts.items():
        held = {split.name: f"{len(split.rows):,}{' (partial)' if split.is_partial else ''}" for split in data.splits}
        rows.append((language, tuple(Entry(held.get(split, "–")) for split in splits)))
    return Grid("Rows of XNLI at hand, which were counted", ("Language", *splits), tuple(rows))


# ------------------------------------------------------------------------------------------------ Tables 5 to 8

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
            variant = _short(model.checkpoint)
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
    """The hyperparameters for GLUE, beside the defaults of `leanvocab.settings`."""
    from leanvocab.settings import FineTuneSettings

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
