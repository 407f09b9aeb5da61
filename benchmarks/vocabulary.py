"""From text to vocabulary: which rows do these texts use?

GLUE tasks and XNLI, read from Parquet files beside the project (`LEANVOCAB_SHARED` says where) or loaded from the hub, with a
real tokenizer; the small size makes both. leanvocab goes the way of `leanvocab count`. `datasets.map` tokenizes in batches, after
which numpy finds the unique ids. transformer-smaller-training-vocab's `get_token_stats` takes one text at a time, in its own
interpreter, so it takes no turns. All must find the same ids (leanvocab's and datasets.map's without the special ids that do
not occur). The limit is the tokenizer itself: a batch on all cores, its result thrown away.
"""

import argparse
import functools
import json
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks._command import About, finish, parser, read_options
from benchmarks._peers import NO_SMALLER_VOCAB, SMALLER_VOCAB
from benchmarks._results import OURS, Figure, Result, Series, beside_ours
from benchmarks._rounds import Budget, last_line, run_child, run_module, take_turns

ABOUT = About(
    name="vocabulary",
    measures="From text to vocabulary on GLUE tasks and XNLI: time.",
    beside="tokenizing with datasets.map, transformer-smaller-training-vocab's get_token_stats",
    limit="the tokenizer's own speed on all cores",
    budget_seconds=110,
)
MODULE = "benchmarks.vocabulary"
MAP, MAP_TUNED = "datasets.map + np.unique", "datasets.map + np.unique, no digest of the tokenizer"
LIMIT = "limit: the tokenizer alone"
SHARED = Path(os.environ.get("LEANVOCAB_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"
TOKENIZER = ("xlm-roberta-base", "FacebookAI/xlm-roberta-base")  # beside the project, on the hub
TASKS = {  # files beside the project; data set, configuration and split on the hub; columns
    "WNLI": (["glue/wnli.train.parquet"], ("nyu-mll/glue", "wnli", "train"), ("sentence1", "sentence2")),
    "CoLA": (["glue/cola.train.parquet"], ("nyu-mll/glue", "cola", "train"), ("sentence",)),
    "MRPC": (["glue/mrpc.train.parquet"], ("nyu-mll/glue", "mrpc", "train"), ("sentence1", "sentence2")),
    "SST-2": (["glue/sst2.train.parquet"], ("nyu-mll/glue", "sst2", "train"), ("sentence",)),
    "XNLI test, de": (["xnli/xnli.de.test.parquet"], ("facebook/xnli", "de", "test"), ("premise", "hypothesis")),
    "XNLI test, zh": (["xnli/xnli.zh.test.parquet"], ("facebook/xnli", "zh", "test"), ("premise", "hypothesis")),
    "made": ([], ("", "", ""), ("text",)),
}
SIZES = {"full": [name for name in TASKS if name != "made"], "small": ["made"]}


def load_task(name: str) -> Any:
    """A data set of texts."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet

    files, (hub, config, split), columns = TASKS[name]
    if name == "made":
        return datasets.Dataset.from_dict({"text": [f"word{i % 97} word{i * i % 89} word3" for i in range(400)]})
    paths = [SHARED / file for file in files]
    if all(path.exists() for path in paths):
        parts = [pyarrow.parquet.read_table(path, columns=list(columns)) for path in paths]
        return datasets.Dataset(pa.concat_tables(parts))
    return datasets.load_dataset(hub, config, split=split).select_columns(list(columns))


def find_tokenizer(folder: Path, size: str) -> str:
    """Path or name of a tokenizer: beside the project, on the hub, or made in the folder."""
    if size == "full":
        beside = SHARED / "tokenizers" / TOKENIZER[0]
        return str(beside) if beside.is_dir() else TOKENIZER[1]
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *(f"word{number}" for number in range(100))]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return str(folder)


def programs(task: str, where: str) -> dict[str, Callable[[], Any]]:
    """Each program as a function that gives the sorted ids that occur."""
    import numpy as np
    from transformers import AutoTokenizer

    from leanvocab import count_tokens

    tokenizer, data, columns = AutoTokenizer.from_pretrained(where), load_task(task), TASKS[task][2]
    texts = [list(data[column][:]) for column in columns]
    batch = texts[0] if len(texts) == 1 else list(zip(*texts, strict=True))

    def with_map(**settings: Any) -> Any:
        encoded = data.map(
            lambda rows: tokenizer(*(rows[column] for column in columns), return_attention_mask=False),
            batched=True,
            remove_columns=data.column_names,
            keep_in_memory=True,
            load_from_cache_file=False,
            **settings,
        )
        return np.unique(encoded.with_format("arrow")[:]["input_ids"].combine_chunks().flatten().to_numpy())

    counted = [columns] if len(columns) == 2 else columns
    return {
        OURS: lambda: count_tokens(data, counted, tokenizer=tokenizer, progress=False).token_ids,
        MAP: with_map,
        MAP_TUNED: lambda: with_map(new_fingerprint=uuid.uuid4().hex[:16]),
        LIMIT: functools.partial(tokenizer.backend_tokenizer.encode_batch_fast, batch),
    }


def child(task: str, where: str, rounds: str, seconds: str) -> dict[str, Any]:
    """Seconds of each program, in turn, and the ids that were found."""
    import datasets
    import numpy as np

    datasets.disable_progress_bars()
    ready = programs(task, where)
    found = ready[OURS]()
    assert np.array_equal(found, ready[MAP]()), "the two found other ids"
    ready[LIMIT]()
    return {"seconds": take_turns(ready, int(rounds), Budget(float(seconds))), "ids": found.tolist()}


def texts_of(task: str, path: Path) -> None:
    """The rows as JSON, for an interpreter that has not this project's packages."""
    columns = TASKS[task][2]
    data = load_task(task)
    path.write_text(json.dumps([list(row) for row in zip(*(data[column][:] for column in columns), strict=True)]))


def run_task(options: argparse.Namespace, task: str, where: str, budget: Budget, folder: Path) -> list[Series]:
    found = run_child(MODULE, task, where, options.rounds or 5, budget.seconds / 2)
    series = beside_ours("time", task, "s", found["seconds"])
    if options.smaller_vocab_python:
        texts_of(task, folder / "texts.json")
        script = Path(__file__).with_name("_smaller_vocab.py")
        words = [options.smaller_vocab_python, script, "tokens", where, folder / "texts.json", 3, budget.left]
        theirs = last_line([str(word) for word in words])
        missing = set(found["ids"]) - set(theirs["ids"])
        assert not missing, f"{SMALLER_VOCAB} found fewer ids: {sorted(missing)[:5]}"
        ours = tuple(found["seconds"][OURS][: len(theirs["seconds"])])
        series.append(Series("time", task, SMALLER_VOCAB, tuple(theirs["seconds"]), "s", ours))
    return series


def measure(options: argparse.Namespace) -> Iterator[Result]:
    budget = Budget(options.seconds)
    tasks = options.tasks or SIZES[options.size]
    series: list[Series] = []
    with tempfile.TemporaryDirectory() as made:
        where = find_tokenizer(Path(made), options.size)
        for number, task in enumerate(tasks):
            share = Budget(budget.left / (len(tasks) - number))
            series += run_task(options, task, where, share, Path(made))
    name = TOKENIZER[0] if options.size == "full" else "a tokenizer of a hundred words"
    ratios = [
        Figure(f"time / the tokenizer alone, {each.case}", 1 / each.ratio, "×")
        for each in series
        if each.is_limit and each.ratio
    ]
    missing = () if options.smaller_vocab_python else (NO_SMALLER_VOCAB,)
    title = f"From text to vocabulary: {name}"
    yield Result(ABOUT.name, title, name, "cpu", tuple(series), tuple(ratios), missing, budget.spent, options.seconds)


def main(arguments: list[str] | None = None) -> list[Result]:
    made = parser(ABOUT)
    made.add_argument("--tasks", nargs="+", choices=[name for name in TASKS if name != "made"])
    options = read_options(made, arguments)
    return finish(measure(options), options)


if __name__ == "__main__":
    run_module(child, main)
