"""Tables 2, 3 and 4: how much of a model the tokens of a data set leave out."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from leanvocab.vocabulary.counts import TokenCounts
from reproduction.bench import Bench
from reproduction.cells import Cell, make_cell
from reproduction.grid import Entry, Grid, Result, cell_grid
from reproduction.paper import DEBERTA_SIZES, MODELS, TASKS, XNLI_LANGUAGES, XNLI_SUBSETS, Model, Task
from reproduction.sizes import Reduction, used_alone, with_special
from reproduction.sources import NotHereError, TextData, check_tokenizer

TOLERANCE = 0.1
"""Distance at which a reduction may lie from the published one, in the unit of its table."""
TASK_LABELS = {task.name: task.label for task in TASKS} | {"mean": "Mean"}
_EMBEDDING, _MODEL = "table2_embedding_reduction_percent", "table2_model_reduction_percent"
_MILLIONS = "table3_deberta_v3_reduction_millions"
_XNLI_EMBEDDING, _XNLI_MODEL = "table4_xnli_embedding_reduction_percent", "table4_xnli_model_reduction_percent"
_XNLI_LABELS = 3


@dataclass(frozen=True)
class Measured:
    """Reductions for one model and one data set; None where nothing of it is at hand. `gaps`: what is not at hand."""

    used: Reduction | None
    special: Reduction | None
    gaps: tuple[str, ...]


def measure(bench: Bench, checkpoint: str, tokenizer_name: str, texts: Sequence[TextData], num_labels: int) -> Measured:
    """Share of a model that the tokens of some texts leave out: in the paper's way, and in the library's default.

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
    """True where what is at hand of incomplete data sets contradicts a published number."""
    bounded = [cell for cell in cells if cell.at_most is not None and cell.published is not None and not cell.variant]
    kept = sum(cell.published <= cell.at_most + TOLERANCE for cell in bounded)  # type: ignore[operator]
    if not bounded:
        return ()
    return (
        f"Undecided cells for which a part of the data is at hand: {len(bounded)}. The published reduction is no larger "
        f"than that part allows in {kept} of them.",
    )


def _variant_notes(models: Sequence[Model], cells: Sequence[Cell]) -> list[str]:
    """Comparison of the two checkpoints that a row may stand for on the decided cells."""
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
    """Seconds of all complete tasks, by tokenizer."""
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
    """Missing data, said by language: fifteen languages lack much."""
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
