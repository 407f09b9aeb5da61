"""The published numbers: the tables, and which models, tasks and languages stand behind their rows and columns."""

import csv
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from leanvocab.errors import DataError

PUBLISHED = Path(__file__).parent / "published"
MAX_LENGTH = 128
"""Tokens to which a text, or a pair, is cut (Table 8)."""


@dataclass(frozen=True)
class Task:
    """A data set of GLUE. `splits` are the hub's, under the heading that Table 7 gives them."""

    name: str
    label: str
    text_columns: tuple[str, ...]
    num_labels: int = 2  # 1: regression
    metric: str = "accuracy"
    splits: tuple[tuple[str, str], ...] = (("train", "train"), ("validation", "validation"), ("test", "test"))

    @property
    def eval_split(self) -> str:
        """Split on which Table 10 is scored. Of MNLI's two, the matched one."""
        return next(split for split, heading in self.splits if heading == "validation")


_PAIR = ("sentence1", "sentence2")
_MNLI_SPLITS = (
    ("train", "train"), ("validation_matched", "validation"), ("validation_mismatched", "validation"),
    ("test_matched", "test"), ("test_mismatched", "test"),
)  # fmt: skip

TASKS = (
    Task("cola", "CoLA", ("sentence",), metric="matthews"),
    Task("mnli", "MNLI", ("premise", "hypothesis"), num_labels=3, splits=_MNLI_SPLITS),
    Task("mrpc", "MRPC", _PAIR),
    Task("qnli", "QNLI", ("question", "sentence")),
    Task("qqp", "QQP", ("question1", "question2"), metric="f1"),
    Task("rte", "RTE", _PAIR),
    Task("sst2", "SST-2", ("sentence",)),
    Task("stsb", "STS-B", _PAIR, num_labels=1, metric="spearman"),
    Task("wnli", "WNLI", _PAIR),
)


@dataclass(frozen=True)
class Model:
    """A row of the paper's tables: a checkpoint on the hub, and whose tokenizer it uses.

    `size_checkpoint` is what Table 5's numbers say, where they say another one than Table 2's.
    """

    name: str
    checkpoint: str
    tokenizer: str
    size_checkpoint: str = ""
    size_tokenizer: str = ""


MODELS = (
    Model(
        "DistilBERT", "distilbert/distilbert-base-uncased", "google-bert/bert-base-uncased",
        "distilbert/distilbert-base-cased", "google-bert/bert-base-cased",
    ),
    Model("DistilRoBERTa", "distilbert/distilroberta-base", "FacebookAI/roberta-base"),
    Model("DistilmBERT", "distilbert/distilbert-base-multilingual-cased", "google-bert/bert-base-multilingual-cased"),
    Model(
        "BERT", "google-bert/bert-base-uncased", "google-bert/bert-base-uncased",
        "google-bert/bert-base-cased", "google-bert/bert-base-cased",
    ),
    Model("RoBERTa", "FacebookAI/roberta-base", "FacebookAI/roberta-base"),
    Model("DeBERTaV3", "microsoft/deberta-v3-base", "microsoft/deberta-v3-base"),
    Model("mBERT", "google-bert/bert-base-multilingual-cased", "google-bert/bert-base-multilingual-cased"),
    Model("XLM-RoBERTa", "FacebookAI/xlm-roberta-base", "FacebookAI/xlm-roberta-base"),
    Model("XLM-V", "facebook/xlm-v-base", "facebook/xlm-v-base"),
)  # fmt: skip

DEBERTA_SIZES = (
    Model("XSmall", "microsoft/deberta-v3-xsmall", "microsoft/deberta-v3-base"),
    Model("Small", "microsoft/deberta-v3-small", "microsoft/deberta-v3-base"),
    Model("Base", "microsoft/deberta-v3-base", "microsoft/deberta-v3-base"),
    Model("Large", "microsoft/deberta-v3-large", "microsoft/deberta-v3-base"),
)

GPT2 = "openai-community/gpt2"

XNLI_LANGUAGES = ("ar", "bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh")
XNLI_SUBSETS = {"en": ("en",), "en-de": ("en", "de"), "en-zh": ("en", "zh"), "all": XNLI_LANGUAGES}
XNLI_ROWS = {"train": 392_702, "validation": 2_490, "test": 5_010}
"""Rows of each language, by the data set's own card; the paper does not say."""


def find_task(name: str) -> Task:
    """The task of a name, as the hub or as the paper writes it.

    Raises:
        DataError: GLUE has none of this name.
    """
    for task in TASKS:
        if name.lower() in (task.name, task.label.lower()):
            return task
    raise DataError(f"unknown task {name!r}; GLUE has {', '.join(task.name for task in TASKS)}")


@dataclass(frozen=True)
class Paper:
    """The published tables, as CSV files in a folder."""

    folder: Path = PUBLISHED

    def rows(self, table: str) -> list[dict[str, str]]:
        """The lines of a table, by heading.

        Raises:
            DataError: there is no such file.
        """
        path = self.folder / f"{table}.csv"
        if not path.is_file():
            raise DataError(f"the published table {path} does not exist")
        with path.open(newline="") as file:
            return list(csv.DictReader(file))

    def numbers(self, table: str) -> dict[str, dict[str, float]]:
        """The numbers of a table: row → heading → number. The first column names the rows."""
        lines = self.rows(table)
        first = next(iter(lines[0]))
        return {
            line[first]: {name: float(value) for name, value in line.items() if name != first and _is_number(value)}
            for line in lines
        }

    @cached_property
    def num_examples(self) -> dict[str, dict[str, int]]:
        """Table 7: task → heading → rows."""
        labels = {task.label: task.name for task in TASKS}
        table = self.numbers("table7_glue_examples")
        return {labels[row]: {name: int(value) for name, value in found.items()} for row, found in table.items()}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
