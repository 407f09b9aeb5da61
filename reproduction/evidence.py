"""Numbers that do not fit together in the paper, or could be taken otherwise: each with the numbers that show it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary
from reproduction.bench import Bench
from reproduction.grid import Entry, Grid, Result
from reproduction.paper import DEBERTA_SIZES, MODELS, TASKS, Model, Paper
from reproduction.sizes import used_alone, with_special
from reproduction.sources import NotHereError

_HALF = 0.05 + 1e-9  # a number with one decimal stands for this much on either side
_EMBEDDING, _MODEL = "table2_embedding_reduction_percent", "table2_model_reduction_percent"
_MILLIONS = "table3_deberta_v3_reduction_millions"


def evidence(bench: Bench) -> Result:
    """Checks of the published numbers against each other, and of other ways to count."""
    checks = (*_table2_shares(bench), *_other_checks(bench))
    ways = _ways_of_counting(bench)
    notes = (*_bert_note(checks), *_ways_note(ways))
    grids = (_checks_grid(checks), *([_ways_grid(ways)] if ways else []))
    return Result("evidence", "Evidence: the published numbers against each other", grids, (), notes)


# ----------------------------------------------------------------------- the published numbers against each other


@dataclass(frozen=True)
class Check:
    """Published numbers that must fit together, up to their rounding: how many do, and the first that do not."""

    what: str
    fitting: int
    of: int
    failing: tuple[str, ...] = ()


def _check(what: str, verdicts: Iterable[tuple[str, bool]]) -> Check:
    found = list(verdicts)
    return Check(what, sum(fits for _, fits in found), len(found), tuple(name for name, fits in found if not fits))


def _table2_shares(bench: Bench) -> list[Check]:
    """Reduction of the model = reduction of the embeddings × their share of the model, whichever tokens are kept."""
    embedding, model = bench.paper.numbers(_EMBEDDING), bench.paper.numbers(_MODEL)
    checks = []
    for row in MODELS:
        for checkpoint in filter(None, (row.checkpoint, row.size_checkpoint)):
            try:
                full = bench.sizes.full(checkpoint)
            except NotHereError:
                continue
            share = full.num_embedding_parameters / full.num_parameters
            verdicts = [
                (column, _overlap(number, share, model[row.name][column]))
                for column, number in embedding[row.name].items()
            ]
            short = checkpoint.rpartition("/")[2]
            checks.append(_check(f"Table 2, {row.name}: both halves, with the sizes of {short}", verdicts))
    return checks


def _overlap(left: float, factor: float, right: float) -> bool:
    """True where left × factor may be right, both known to half of their last digit."""
    return (left - _HALF) * factor <= right + _HALF and (left + _HALF) * factor >= right - _HALF


def _other_checks(bench: Bench) -> list[Check]:
    paper = bench.paper
    return [
        _check("Table 3: Table 2's DeBERTaV3 row × embedding parameters", _table3_verdicts(bench)),
        _check("Table 4: both halves, with the sizes of Table 5's configs", _table4_verdicts(bench)),
        *(_check(f"{name}: means of the rounded cells", _mean_verdicts(paper, table)) for name, table in _MEANS),
        _check("Tables 5 and 6: N_emb/N", _ratio_verdicts(paper)),
        _check("Table 7: totals", _total_verdicts(paper)),
        _check("Table 9: percentages", _percent_verdicts(paper)),
        _check("Table 10: means of the rounded cells", _score_verdicts(paper)),
        _check("Section 3: six of nine data sets use at most half of the vocabulary", _half_verdicts(paper)),
    ]


_MEANS = (("Table 2, upper half", _EMBEDDING), ("Table 2, lower half", _MODEL), ("Table 3", _MILLIONS))
_Verdicts = list[tuple[str, bool]]


def _table3_verdicts(bench: Bench) -> _Verdicts:
    embedding, millions = bench.paper.numbers(_EMBEDDING)["DeBERTaV3"], bench.paper.numbers(_MILLIONS)
    verdicts = []
    for size in DEBERTA_SIZES:
        factor = bench.sizes.full(size.checkpoint).num_embedding_parameters / 1e8
        for column, number in embedding.items():
            verdicts.append((f"{size.name} {column}", _overlap(number, factor, millions[size.name][column])))
    return verdicts


def _table4_verdicts(bench: Bench) -> _Verdicts:
    embedding = bench.paper.numbers("table4_xnli_embedding_reduction_percent")
    model = bench.paper.numbers("table4_xnli_model_reduction_percent")
    rows = {row.name: row for row in MODELS}
    verdicts = []
    for name, found in embedding.items():
        full = bench.sizes.full(rows[name].checkpoint, num_labels=3)
        share = full.num_embedding_parameters / full.num_parameters
        verdicts += [
            (f"{name} {column}", _overlap(number, share, model[name][column])) for column, number in found.items()
        ]
    return verdicts


def _mean_verdicts(paper: Paper, table: str) -> _Verdicts:
    return [
        (row, abs(sum(found[task.name] for task in TASKS) / len(TASKS) - found["mean"]) <= 2 * _HALF)
        for row, found in paper.numbers(table).items()
    ]


def _ratio_verdicts(paper: Paper) -> _Verdicts:
    verdicts = []
    for table in ("table5_model_sizes", "table6_deberta_v3_sizes"):
        for row, found in paper.numbers(table).items():
            part, whole = found["embedding_parameters_millions"], found["model_parameters_millions"]
            low, high = 100 * (part - _HALF) / (whole + _HALF), 100 * (part + _HALF) / (whole - _HALF)
            verdicts.append((row, low - _HALF <= found["embedding_percent"] <= high + _HALF))
    return verdicts


def _total_verdicts(paper: Paper) -> _Verdicts:
    return [
        (task, found["total"] == sum(number for name, number in found.items() if name != "total"))
        for task, found in paper.num_examples.items()
    ]


def _percent_verdicts(paper: Paper) -> _Verdicts:
    verdicts = []
    for task, found in paper.numbers("table9_runtime_seconds").items():
        low = 100 * (found["pema_seconds"] - _HALF) / (found["finetuning_seconds"] + _HALF)
        high = 100 * (found["pema_seconds"] + _HALF) / (found["finetuning_seconds"] - _HALF)
        verdicts.append((task, low - _HALF <= found["percent"] <= high + _HALF))
    return verdicts


def _score_verdicts(paper: Paper) -> _Verdicts:
    scores = {(line["model"], line["pema"]): line for line in paper.rows("table10_glue_scores")}
    verdicts = []
    for line in paper.rows("table10_glue_means"):
        cells = scores[line["model"], line["pema"]]
        mean = sum(float(cells[task.name]) for task in TASKS) / len(TASKS)
        verdicts.append((f"{line['model']} {line['pema']}", abs(mean - float(line["mean"])) <= 2 * _HALF))
    return verdicts


def _half_verdicts(paper: Paper) -> _Verdicts:
    """RoBERTa's pieces are GPT-2's, so that its row says how much of GPT-2's vocabulary is not used."""
    row = paper.numbers(_EMBEDDING)["RoBERTa"]
    below = [task for task in TASKS if row[task.name] >= 50]
    return [("six", len(below) == 6)]


def _checks_grid(checks: Sequence[Check]) -> Grid:
    rows = []
    for check in checks:
        text = f"{check.fitting} of {check.of}"
        failing = ", ".join(check.failing[:3]) + (" …" if len(check.failing) > 3 else "")
        good = check.fitting == check.of
        rows.append((check.what, (Entry(text, "same" if good else "differs"), Entry(failing))))
    return Grid(
        "Published numbers that must fit together, up to their rounding", ("What", "fit", "do not"), tuple(rows)
    )


def _bert_note(checks: Sequence[Check]) -> list[str]:
    notes = []
    for row in MODELS:
        if row.size_checkpoint:
            found = [check for check in checks if f" {row.name}:" in check.what]
            parts = [f"in {check.fitting} of {check.of} with {check.what.rpartition(' ')[2]}" for check in found]
            notes.append(
                f"{row.name}: Table 5 has the sizes of {row.size_checkpoint.rpartition('/')[2]}. The columns of Table 2 "
                f"in which the two halves fit together, given the share of embeddings in the model: {', '.join(parts)}."
            )
    return notes


# ------------------------------------------------------------------------------------------ other ways of counting


@dataclass(frozen=True)
class Way:
    """A way of choosing the kept tokens: how many decided cells get the published digits, and which do not."""

    label: str
    fitting: int
    of: int
    failing: tuple[str, ...]


def _ways_of_counting(bench: Bench) -> list[Way]:
    """Special tokens where they occur; the pad token as well; every special token."""
    verdicts: dict[str, _Verdicts] = {label: [] for label in ("occurring", "padded", "special")}
    for model in (*MODELS, *(size for size in DEBERTA_SIZES if size.name != "Base")):
        try:
            tokenizer, config = bench.sources.tokenizer(model.tokenizer), bench.sources.config(model.checkpoint)
        except NotHereError:
            continue
        for task in TASKS:
            data = bench.sources.glue(task)
            if data.is_complete:
                counts = bench.counter.count(model.tokenizer, data)
                used = used_alone(counts, config.vocab_size)
                kept = {
                    "occurring": used,
                    "padded": used | PartialVocabulary([tokenizer.pad_token_id], config.vocab_size),
                    "special": with_special(counts, tokenizer, config),
                }
                for label, vocabulary in kept.items():
                    verdicts[label] += _digits(bench, model, task.name, task.num_labels, vocabulary)
    return [
        Way(label, sum(fits for _, fits in found), len(found), tuple(name for name, fits in found if not fits))
        for label, found in verdicts.items()
        if found
    ]


def _digits(bench: Bench, model: Model, task: str, num_labels: int, vocabulary: PartialVocabulary) -> _Verdicts:
    """True where each cell of the model and task is printed with the published digits."""
    reduction = bench.sizes.reduction(model.checkpoint, num_labels, vocabulary)
    cells: list[tuple[str, str, float]] = []
    is_size = model.name in {size.name for size in DEBERTA_SIZES}
    if not is_size:
        cells += [(_EMBEDDING, model.name, reduction.embedding_percent), (_MODEL, model.name, reduction.model_percent)]
    if is_size or model.name == "DeBERTaV3":
        cells.append((_MILLIONS, model.name if is_size else "Base", reduction.saved_millions))
    verdicts = []
    for table, row, measured in cells:
        published = bench.paper.numbers(table)[row][task]
        name = f"{table.split('_')[0].replace('table', 'Table ')} {table.split('_')[1]} {row} {task} ({measured:.4f})"
        verdicts.append((name, f"{measured:.1f}" == f"{published:.1f}"))
    return verdicts


_WAYS = {
    "occurring": "special tokens where they occur (no padding)",
    "padded": "the same, and the pad token",
    "special": "every special token (the library's default)",
}


def _ways_grid(ways: Sequence[Way]) -> Grid:
    rows = tuple(
        (
            _WAYS[way.label],
            (
                Entry(f"{way.fitting} of {way.of}", "same" if way.fitting == way.of else "near"),
                Entry("; ".join(way.failing)),
            ),
        )
        for way in ways
    )
    return Grid("Decided cells of Tables 2 and 3 with the published digits", ("Kept tokens", "cells", "others"), rows)


def _ways_note(ways: Sequence[Way]) -> list[str]:
    whole = [_WAYS[way.label] for way in ways if way.fitting == way.of]
    if len(whole) != 2:
        return []
    return [
        "Whether the paper counts the pad token cannot be told: with and without it every decided cell has the "
        "published digits. It does not keep all special tokens."
    ]
