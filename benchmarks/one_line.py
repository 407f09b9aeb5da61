"""`shrink_trainer_`: the seconds of the call beside those of counting the same data set, which is what it does first.

The checkpoint (random weights, a published size) is loaded from disk for each round, and a Trainer made of it and of rows of 128
token ids. What the call takes beside counting is to stay under half a second.
"""

import argparse
import statistics
import tempfile
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks._command import About, finish, parser, read_options
from benchmarks._models import kept_ids, save_model
from benchmarks._results import OURS, Figure, Result, Series
from benchmarks._rounds import Budget, seconds_of, turns
from benchmarks._token_data import load_rows, write_ids, write_rows

ABOUT = About(
    name="one_line",
    measures="shrink_trainer_: counting a trainer's data and shrinking its model, in one call.",
    beside="count_tokens, and shrink_ by hand, on the same data",
    limit="counting",
    budget_seconds=60,
)
MODELS = {"full": "xlm-r-base", "small": "tiny"}
TOKENS = {"full": 20_000_000, "small": 100_000}
COUNTING, BY_HAND = "limit: count_tokens alone", "counted and shrunk by hand"


def measured(name: str, num_tokens: int, rounds: int, seconds: float) -> Result:
    """Rounds of counting alone, of counting and shrinking by hand, and of the one call, each on a model of its own."""
    import leanvocab as lv

    def by_hand(trainer: Any) -> None:
        counts = lv.count_tokens(trainer.train_dataset)
        lv.shrink_(trainer.model, lv.PartialVocabulary.from_counts(counts, model=trainer.model))

    programs = {
        COUNTING: lambda trainer: lv.count_tokens(trainer.train_dataset),
        BY_HAND: by_hand,
        OURS: lv.shrink_trainer_,
    }
    budget = Budget(seconds)
    taken: dict[str, list[float]] = {program: [] for program in programs}
    with tempfile.TemporaryDirectory() as work:
        rows = _write(Path(work), name, num_tokens)
        for program in turns(programs, rounds, budget, spare=2):
            run, trainer = programs[program], _trainer(Path(work), rows)
            taken[program].append(seconds_of(partial(run, trainer)))
    counting, hand, ours = (statistics.median(taken[program]) for program in programs)
    case = f"{num_tokens / 1e6:,.1f} M tokens"
    series = tuple(Series("the call", case, who, tuple(times), "s") for who, times in taken.items())
    figures = (
        Figure("the call beside counting", ours - counting, "s", bar=0.5),
        Figure("the call beside counting and shrinking by hand", ours - hand, "s"),
    )
    return Result(ABOUT.name, "One line", name, "cpu", series, figures, (), budget.spent, seconds)


def _write(folder: Path, name: str, num_tokens: int) -> Any:
    """The model on disk, and rows of as many of its ids as a data set uses."""
    import numpy as np

    kept = kept_ids(name)
    save_model(name, folder / "model")
    write_ids(folder / "ranks.npy", num_tokens, len(kept))
    np.save(folder / "ids.npy", kept[np.load(folder / "ranks.npy")])
    write_rows(folder / "rows", folder / "ids.npy", "equal")
    return load_rows(folder / "rows")


def _trainer(folder: Path, rows: Any) -> Any:
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "model")
        args = transformers.TrainingArguments(str(folder / "out"), report_to=[], use_cpu=True)
        return transformers.Trainer(model, args, train_dataset=rows)


def measure(options: argparse.Namespace) -> Iterator[Result]:
    yield measured(MODELS[options.size], TOKENS[options.size], options.rounds or 7, options.seconds)


def main(arguments: list[str] | None = None) -> list[Result]:
    options = read_options(parser(ABOUT), arguments)
    return finish(measure(options), options)


if __name__ == "__main__":
    main()
