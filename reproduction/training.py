"""Tables 9 and 10: the time that a partial vocabulary costs beside fine-tuning, and the scores with and without it."""

import gc
import hashlib
import math
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanvocab.errors import DataError
from leanvocab.finetune.settings import FineTuneSettings
from reproduction.cells import Cell, make_cell
from reproduction.grid import Entry, Grid, Look, Result
from reproduction.paper import MODELS, TASKS, Task
from reproduction.sources import Sources

if TYPE_CHECKING:
    from leanvocab.finetune.job import FineTuneResult

NUM_RUNS = 5
_TIMES, _SCORES = "table9_runtime_seconds", "table10_glue_scores"
_TABLE9_MODEL = "FacebookAI/roberta-base"
_METRIC_LABELS = {"matthews": "Matthews", "f1": "F1", "accuracy": "accuracy", "spearman": "Spearman"}


@dataclass(frozen=True)
class Limits:
    """Part of a fine-tuning that is run; None: all of it, as in the paper."""

    max_steps: int | None = None
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    epochs: float = 3.0
    cpu: bool = False

    @property
    def is_whole(self) -> bool:
        return self.max_steps is None and self.max_train_samples is None and self.max_eval_samples is None

    def describe(self) -> str:
        """In words, for a report."""
        parts = [
            f"{number:,} {what}"
            for number, what in (
                (self.max_steps, "steps"),
                (self.max_train_samples, "training examples"),
                (self.max_eval_samples, "validation examples"),
            )
            if number is not None
        ]
        return f"at most {', '.join(parts)}; {self.epochs:g} epochs" if parts else f"whole, {self.epochs:g} epochs"

    def settings(self, seed: int, **more: Any) -> FineTuneSettings:
        """The paper's settings (Table 8), limited; every loss is logged, nothing is saved on the way."""
        return FineTuneSettings(
            seed=seed, max_steps=self.max_steps, max_train_samples=self.max_train_samples,
            max_eval_samples=self.max_eval_samples, epochs=self.epochs, cpu=self.cpu,
            eval_strategy="no", save_strategy="no", logging_steps=1, **more,
        )  # fmt: skip


def trainable_tasks(sources: Sources, tasks: Sequence[Task] | None) -> list[Task]:
    """The tasks to train on: those asked for, or all that are complete.

    Raises:
        DataError: a task that was asked for is not complete.
    """
    if tasks is None:
        return [task for task in TASKS if sources.glue(task).is_complete]
    for task in tasks:
        if gaps := sources.require(task).gaps:
            raise DataError(f"the task {task.name!r} is not complete, so it is not trained on: {'; '.join(gaps)}")
    return list(tasks)


@contextmanager
def _finetuned(
    sources: Sources, model: str, task: Task, settings: FineTuneSettings, *, is_scored: bool
) -> "Iterator[tuple[FineTuneResult, Path]]":
    """A fine-tuning into a temporary folder, which goes away with its model.

    Without scores the other splits are counted under names that are not taken for one to validate on.
    """
    from leanvocab.finetune.job import finetune

    held = sources.glue(task).splits
    splits = {split.name if is_scored else f"counted_{split.name}": split.rows for split in held}
    splits |= {split.name: split.rows for split in held if split.name == settings.train_split}
    with tempfile.TemporaryDirectory() as folder:
        yield finetune(sources.model(model), splits, Path(folder) / "model", settings, progress=False), Path(folder)
    gc.collect()  # a Trainer and its model refer to each other: two models at once may not fit


# ------------------------------------------------------------------------------------------------------- Table 9


@dataclass(frozen=True)
class Timing:
    """One fine-tuning: seconds to count and shrink, and to train so many of all steps."""

    task: str
    run: int
    tokenizing_seconds: float
    counting_seconds: float
    shrinking_seconds: float
    training_seconds: float
    num_steps: int
    whole_steps: int

    @property
    def pema_seconds(self) -> float:
        """Seconds that the method costs: the data set is tokenized with or without it."""
        return self.counting_seconds + self.shrinking_seconds

    @property
    def finetuning_seconds(self) -> float:
        """Training all steps; of a limited run, its seconds a step × all steps."""
        return self.training_seconds / self.num_steps * self.whole_steps


def table9(
    sources: Sources,
    model: str | None = None,
    tasks: Sequence[Task] | None = None,
    *,
    runs: int = NUM_RUNS,
    limits: Limits = Limits(),
    progress: bool | None = None,
) -> Result:
    """Time to count and shrink beside time to fine-tune, per task: mean and standard deviation over the runs."""
    name = model or next(iter(_smallest_first(sources)), _TABLE9_MODEL)
    timings = []
    chosen = trainable_tasks(sources, tasks)
    for task, run in _with_progress([(task, run) for task in chosen for run in range(runs)], "table 9", progress):
        timings.append(_time(sources, name, task, run, limits))
    short = name.rpartition("/")[2]
    notes = (
        f"Model {short}; {runs} runs; fine-tuning: {limits.describe()}."
        + ("" if limits.is_whole else " Its seconds are those of a step × all steps of the paper's 3 epochs."),
        "Counting and shrinking take the whole data set, all splits, in every run.",
    )
    title = "Table 9: seconds to count and shrink, and to fine-tune (mean ± standard deviation)"
    cells = _time_cells(sources, timings, short)
    records = {"table9_runs": [_timing_record(timing) for timing in timings]}
    return Result("table9", title, (_time_grid(sources, timings, title),), tuple(cells), notes, records)


def _time(sources: Sources, model: str, task: Task, run: int, limits: Limits) -> Timing:
    with _finetuned(sources, model, task, limits.settings(run), is_scored=False) as (result, _):
        train = next(split for split in sources.glue(task).splits if split.name == "train")
        settings = FineTuneSettings()
        whole_steps = math.ceil(len(train.rows) / settings.batch_size) * int(settings.epochs)
        return Timing(
            task.label, run,
            result.seconds["tokenizing"], result.seconds["counting"], result.seconds["shrinking"],
            result.seconds["training"], result.num_steps, whole_steps,
        )  # fmt: skip


def _timing_record(timing: Timing) -> dict[str, Any]:
    return {
        **{name: getattr(timing, name) for name in timing.__dataclass_fields__},
        "pema_seconds": timing.pema_seconds,
        "finetuning_seconds": timing.finetuning_seconds,
    }


def _by_task(timings: Sequence[Timing]) -> Mapping[str, list[Timing]]:
    found: dict[str, list[Timing]] = {}
    for timing in timings:
        found.setdefault(timing.task, []).append(timing)
    return found


def _time_cells(sources: Sources, timings: Sequence[Timing], model: str) -> list[Cell]:
    """The paper's times are of another machine, so that no cell is decided."""
    measured = _by_task(timings)
    reason = f"the paper's seconds are those of RoBERTa on a V100; here {model} on this machine"
    return [
        make_cell(_TIMES, row, column, number, None, reason=reason if row in measured else "not run here")
        for row, found in sources.paper.numbers(_TIMES).items()
        for column, number in found.items()
    ]


def _time_grid(sources: Sources, timings: Sequence[Timing], title: str) -> Grid:
    published = sources.paper.numbers(_TIMES)
    rows = []
    for task, found in _by_task(timings).items():
        pema = _mean_and_deviation([timing.pema_seconds for timing in found], 3)
        training = _mean_and_deviation([timing.finetuning_seconds for timing in found], 1)
        ratio = sum(timing.pema_seconds for timing in found) / sum(timing.finetuning_seconds for timing in found)
        here = (
            Entry(pema),
            Entry(training),
            Entry(f"{100 * ratio:.2g}"),
            Entry(f"{found[0].num_steps}/{found[0].whole_steps}"),
        )
        paper = (Entry(f"{published[task][name]:.1f}", "undecided") for name in published[task])
        rows.append((task, (*here, *paper)))
    headings = ("Dataset", "PEMA", "Fine-tuning", "%", "steps run", "paper: PEMA", "Fine-tuning", "%")
    return Grid(title, headings, tuple(rows))


def _mean_and_deviation(values: Sequence[float], decimals: int) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):,.{decimals}f} ± {deviation:.{decimals}f}"


# ------------------------------------------------------------------------------------------------------ Table 10


@dataclass(frozen=True)
class Pair:
    """The same fine-tuning with all rows and with the used ones, from one seed. Scores as the paper gives them, × 100."""

    model: str
    task: str
    seed: int
    metric: str
    score_off: float
    score_on: float
    same_scores: bool  # every score of validation, the loss among them, to the last bit
    same_losses: bool  # of every step
    same_weights: bool  # the two saved models are the same file, byte for byte
    num_steps: int
    kept_rows: int
    full_rows: int
    seconds_off: float
    seconds_on: float

    @property
    def is_equal(self) -> bool:
        return self.same_scores and self.same_losses and self.same_weights


def table10(
    sources: Sources,
    models: Sequence[str] | None = None,
    tasks: Sequence[Task] | None = None,
    *,
    seeds: int = NUM_RUNS,
    limits: Limits = Limits(),
    progress: bool | None = None,
) -> Result:
    """Scores with and without a partial vocabulary, for every model, task and seed; they must be equal."""
    names = list(models or _smallest_first(sources) or [model.checkpoint for model in MODELS])
    jobs = [(name, task, seed) for name in names for task in trainable_tasks(sources, tasks) for seed in range(seeds)]
    pairs = [
        _compare(sources, name, task, seed, limits) for name, task, seed in _with_progress(jobs, "table 10", progress)
    ]
    equal = sum(pair.is_equal for pair in pairs)
    notes = (
        f"Pairs of runs: {len(pairs)} (models: {', '.join(name.rpartition('/')[2] for name in names)}; seeds a task: "
        f"{seeds}; {limits.describe()}). Scores, the losses of all steps and the saved models are equal bit for bit in "
        f"{equal} of {len(pairs)}.",
        _published_note(sources),
    )
    cells = _score_cells(sources, pairs, seeds, limits)
    grids = (_mean_grid(pairs), _seed_grid(pairs))
    records = {"table10_seeds": [{**pair.__dict__, "equal": pair.is_equal} for pair in pairs]}
    title = "Table 10: scores on the validation set, without and with a partial vocabulary"
    return Result("table10", title, grids, tuple(cells), notes, records)


def _published_note(sources: Sources) -> str:
    """In how many pairs of the paper's means the two are printed alike."""
    lines = {(line["model"], line["pema"]): line for line in sources.paper.rows(_SCORES)}
    models = dict.fromkeys(model for model, _ in lines)
    same = [lines[model, "off"][task.name] == lines[model, "on"][task.name] for model in models for task in TASKS]
    return (
        f"In the paper's Table 10, {sum(same)} of {len(same)} pairs of means are printed alike; the others fluctuate."
    )


def _compare(sources: Sources, model: str, task: Task, seed: int, limits: Limits) -> Pair:
    def run(full_vocabulary: bool) -> tuple["FineTuneResult", str]:
        settings = limits.settings(seed, full_vocabulary=full_vocabulary)
        with _finetuned(sources, model, task, settings, is_scored=True) as (result, folder):
            return result, _digest(folder)

    (off, weights_off), (on, weights_on) = run(full_vocabulary=True), run(full_vocabulary=False)
    assert on.vocabulary is not None
    return Pair(
        model=model.rpartition("/")[2],
        task=task.name,
        seed=seed,
        metric=task.metric,
        score_off=100 * off.scores[task.metric],
        score_on=100 * on.scores[task.metric],
        same_scores=dict(off.scores) == dict(on.scores),
        same_losses=off.losses == on.losses,
        same_weights=weights_off == weights_on,
        num_steps=on.num_steps,
        kept_rows=len(on.vocabulary),
        full_rows=on.vocabulary.full_size,
        seconds_off=off.seconds["training"],
        seconds_on=on.seconds["training"],
    )


def _digest(folder: Path) -> str:
    """sha256 over the weights that a run saved."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def _score_cells(sources: Sources, pairs: Sequence[Pair], seeds: int, limits: Limits) -> list[Cell]:
    """A cell is decided by the paper's checkpoint, fine-tuned whole over five seeds, and by nothing less."""
    by_cell: dict[tuple[str, str], list[Pair]] = {}
    for pair in pairs:
        by_cell.setdefault((pair.model, pair.task), []).append(pair)
    checkpoints = {model.name: model.checkpoint.rpartition("/")[2] for model in MODELS}
    cells = []
    for line in sources.paper.rows(_SCORES):
        for task in TASKS:
            found = by_cell.get((checkpoints[line["model"]], task.name), [])
            scores = [pair.score_on if line["pema"] == "on" else pair.score_off for pair in found]
            whole = bool(found) and limits.is_whole and limits.epochs == 3 and seeds >= NUM_RUNS
            measured = statistics.mean(scores) if whole else None
            reason = "" if whole else "run in part only" if found else "the paper's checkpoints are not at hand"
            row = f"{line['model']} {line['pema']}"
            cells.append(
                make_cell(_SCORES, row, task.name, float(line[task.name]), measured, tolerance=0.1, reason=reason)
            )
    return cells


def _mean_grid(pairs: Sequence[Pair]) -> Grid:
    """Table as the paper prints it: a line without and a line with, the mean over seeds."""
    tasks = list(dict.fromkeys(pair.task for pair in pairs))
    rows = []
    for model in dict.fromkeys(pair.model for pair in pairs):
        for sign, name in (("×", "score_off"), ("✓", "score_on")):
            entries = []
            for task in tasks:
                found = [pair for pair in pairs if (pair.model, pair.task) == (model, task)]
                look: Look = "same" if all(pair.is_equal for pair in found) else "differs"
                entries.append(Entry(_mean_and_deviation([getattr(pair, name) for pair in found], 1), look))
            rows.append((f"{model} {sign}", tuple(entries)))
    return Grid(
        "Mean ± standard deviation over seeds (×: all rows, ✓: PEMA)", ("Model", *_headings(pairs, tasks)), tuple(rows)
    )


def _headings(pairs: Sequence[Pair], tasks: Sequence[str]) -> list[str]:
    labels = {task.name: f"{task.label} ({_METRIC_LABELS[task.metric]})" for task in TASKS}
    return [labels[task] for task in tasks]


def _seed_grid(pairs: Sequence[Pair]) -> Grid:
    rows = []
    for pair in pairs:
        look: Look = "same" if pair.is_equal else "differs"
        verdict = (
            "equal"
            if pair.is_equal
            else "NOT EQUAL: "
            + ", ".join(
                what
                for what, same in (
                    ("scores", pair.same_scores),
                    ("losses", pair.same_losses),
                    ("weights", pair.same_weights),
                )
                if not same
            )
        )
        entries = (
            Entry(str(pair.seed)),
            Entry(f"{pair.score_off:.2f}", look),
            Entry(f"{pair.score_on:.2f}", look),
            Entry(verdict, look),
            Entry(f"{pair.kept_rows:,} of {pair.full_rows:,}"),
            Entry(str(pair.num_steps)),
            Entry(f"{pair.seconds_off:.1f}"),
            Entry(f"{pair.seconds_on:.1f}"),
        )
        rows.append((f"{pair.model} {pair.task}", entries))
    headings = ("Run", "seed", "×", "✓", "bit for bit", "rows kept", "steps", "× (s)", "✓ (s)")
    return Grid("Every seed (×: all rows, ✓: PEMA; seconds of training)", headings, tuple(rows))


# -------------------------------------------------------------------------------------------------------- helpers


def _smallest_first(sources: Sources) -> list[str]:
    """The models in the folder, by the size of their files."""

    def num_bytes(name: str) -> int:
        return sum(path.stat().st_size for path in Path(sources.model(name)).glob("*.safetensors"))

    return sorted(sources.local_models(), key=num_bytes)


def _with_progress(jobs: Sequence[Any], label: str, progress: bool | None) -> Iterator[Any]:
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    yield from tqdm(jobs, desc=label, unit=" runs", disable=None if progress is None else not progress)
