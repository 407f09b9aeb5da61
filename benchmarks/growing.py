"""A vocabulary that grows while the model trains, beside one that was counted first.

Steps after which no rows come any more: the same model with the same rows, grown and counted, in turns. The first steps of real
text (SST-2, and e5-small as `shared/tools/fetch_models.py` builds it), one model from the ids that are inserted alone, the other
from the counts of the whole data set: they take turns on the same batches, and must have the same losses.
"""

import argparse
import copy
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks._command import About, finish, parser, read_options
from benchmarks._models import make_model
from benchmarks._results import OURS, Figure, Result, Series, median_interval
from benchmarks._rounds import Budget, take_turns

ABOUT = About(
    name="growing",
    measures="A vocabulary that grows: time of steps in which no rows come, and of the first 500 steps from nothing.",
    beside="a vocabulary that was counted first",
    limit="the counted run",
    budget_seconds=1800,
)
COUNTED, GROWN = "counted first", f"{OURS}, growing"
ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data" / "glue" / "sst2.train.parquet"
MODEL = ROOT / ".cache" / "models" / "e5-small"
PAIRS = {"full": 200, "small": 4}
PARTS = ("steps", "from-nothing")


def adamw(model: Any) -> Any:
    import torch

    return torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0)


def stepper(model: Any, batch: Callable[[], dict[str, Any]], losses: list[float]) -> Callable[[], None]:
    optimizer = adamw(model)
    model.train()

    def step() -> None:
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    return step


def steps_without_growth(options: argparse.Namespace, seconds: float) -> Result:
    """Pairs of steps of one model, with the rows that have come and with the same ones counted."""
    import torch

    import leanvocab as lv

    model = make_model("bert-base" if options.size == "full" else "tiny", "float32")
    size = model.get_input_embeddings().num_embeddings
    ids = torch.randint(3, size, (8, 32), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": torch.arange(8) % 2}
    grown, counted = model, copy.deepcopy(model)
    lv.shrink_(grown, on_missing="extend")
    grown.train()(**batch)
    lv.shrink_(counted, grown.get_input_embeddings().table.vocabulary)
    losses: dict[str, list[float]] = {COUNTED: [], GROWN: []}
    programs = {name: stepper(its, lambda: batch, losses[name]) for name, its in ((COUNTED, counted), (GROWN, grown))}
    for program in programs.values():
        program()
    budget = Budget(seconds)
    torch.manual_seed(0)
    taken = take_turns(programs, PAIRS[options.size], budget)
    low, high = median_interval([ours / theirs for theirs, ours in zip(taken[COUNTED], taken[GROWN], strict=True)])
    series = tuple(
        Series("a step in which no rows come", "8 × 32 tokens", who, tuple(its), "s") for who, its in taken.items()
    )
    figures = (
        Figure("the ratio's 95 % interval reaches down to", low, "×", bar=1.01),
        Figure("the ratio's 95 % interval reaches up to", high, "×"),
        Figure("pairs", len(taken[GROWN]), ""),
    )
    subject = "BERT base" if options.size == "full" else "tiny"
    return Result(ABOUT.name, "Steps without growth", subject, "cpu", series, figures, (), budget.spent, seconds)


def rows_of_text(number: int | None) -> Any:
    """Tokenized rows, in the order of the file."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    data = datasets.load_dataset("parquet", data_files=str(DATA), split="train")
    data = data.select(range(min(len(data), number or len(data))))
    return tokenizer, data.map(
        lambda rows: tokenizer(rows["sentence"]), batched=True, remove_columns=["sentence", "idx"]
    )


def from_nothing(options: argparse.Namespace, seconds: float) -> Result:
    """The first steps of a run, counting included, two models in turns on the same batches."""
    import torch
    from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

    import leanvocab as lv

    budget = Budget(seconds)
    tokenizer, data = rows_of_text(None if options.size == "full" else 200)
    collate = DataCollatorWithPadding(tokenizer)
    torch.manual_seed(0)
    grown = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=2)
    counted = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=2)
    counted.load_state_dict(grown.state_dict())
    models, spent, losses = {COUNTED: counted, GROWN: grown}, {COUNTED: 0.0, GROWN: 0.0}, {COUNTED: [], GROWN: []}
    start = time.perf_counter()
    counts = lv.count_tokens(data, "input_ids", progress=False)
    lv.shrink_(counted, lv.PartialVocabulary.from_counts(counts, tokenizer=tokenizer, model=counted))
    spent[COUNTED] += time.perf_counter() - start
    start = time.perf_counter()
    lv.shrink_(grown, on_missing="extend", tokenizer=tokenizer)
    spent[GROWN] += time.perf_counter() - start
    size, batches, pieces = options.batch_size, [], {COUNTED: [], GROWN: []}
    number = options.steps if options.size == "full" else 3
    for first in range(0, number * size, size):
        rows = data.select(range(first, first + size))
        batches.append(collate([{"input_ids": row["input_ids"], "labels": row["label"]} for row in rows]))
    steps = {name: stepper(its, iter(batches).__next__, losses[name]) for name, its in models.items()}
    for turn in range(number):
        for name in (COUNTED, GROWN)[:: 1 if turn % 2 == 0 else -1]:
            torch.manual_seed(turn)
            start = time.perf_counter()
            steps[name]()
            pieces[name].append(time.perf_counter() - start)
    assert losses[COUNTED] == losses[GROWN], "the losses differ"
    for name in spent:
        spent[name] += sum(pieces[name])
    rows_grown, rows_counted = (its.get_input_embeddings().table.num_rows for its in (grown, counted))
    series = tuple(
        Series("the first steps, counting included", f"{number} of {size} rows", who, (its,), "s")
        for who, its in spent.items()
    )
    figures = (
        Figure("growing / counted first, the whole", spent[GROWN] / spent[COUNTED], "×", bar=1.05),
        Figure("rows at the end, growing", rows_grown, ""),
        Figure("rows of the whole data set", rows_counted, ""),
    )
    return Result(ABOUT.name, "From nothing", "e5-small, SST-2", "cpu", series, figures, (), budget.spent, seconds)


def measure(options: argparse.Namespace) -> Iterator[Result]:
    warnings.simplefilter("ignore")
    budget = Budget(options.seconds)
    if "steps" in options.parts:
        yield steps_without_growth(options, 0.4 * options.seconds)
    if "from-nothing" in options.parts and MODEL.is_dir() and DATA.is_file():
        yield from_nothing(options, budget.left)


def main(arguments: list[str] | None = None) -> list[Result]:
    made = parser(ABOUT)
    made.add_argument("--batch-size", type=int, default=16)
    made.add_argument("--steps", type=int, default=500)
    made.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options = read_options(made, arguments)
    return finish(measure(options), options)


if __name__ == "__main__":
    main()
