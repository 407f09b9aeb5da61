"""Texts of few words, with labels, as pairs and as chats; their tokenizer, files, and folders of pretrained models."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from models import TEXT, make_model
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

WORDS = [f"word{number}" for number in range(300)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '[CLS] ' + ('word298' if message['role'] == 'user' else 'word299') + ' ' "
    "+ message['content'] + ' [SEP] ' }}{% endfor %}{% if add_generation_prompt %}{{ '[CLS] word299 ' }}{% endif %}"
)


def small_tokenizer(**special: str | None) -> PreTrainedTokenizerFast:
    """One id a word, special tokens first."""
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate([*SPECIAL, *WORDS])}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    usual = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    } | special
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=128, **usual)


def save_pretrained(folder: Path, model: Any = None, tokenizer: Any = None) -> Path:
    """A folder as a published model has it: by default a base BERT, whose head is still to be made."""
    (model or make_model("bert", TEXT, num_labels=2).base_model).save_pretrained(folder)
    (tokenizer or small_tokenizer()).save_pretrained(folder)
    return folder


def language_tokenizer(**special: Any) -> Any:
    """The small tokenizer with an end of sequence, [SEP], and a beginning of sequence, [CLS]."""
    return small_tokenizer(**{"eos_token": "[SEP]", "bos_token": "[CLS]"} | special)


def language_model(family: str, *, tied: bool = False, **changes: Any) -> Any:
    """A model with an output layer: "llama", "gpt2", "t5", "bart" or "bert"."""
    return make_model(f"{family}-tied" if tied else f"{family}-untied", TEXT, **changes)


def save_language_model(folder: Path, family: str, tokenizer: Any = None, **options: Any) -> Path:
    """A folder as a published language model has it."""
    return save_pretrained(folder, language_model(family, **options), tokenizer or language_tokenizer())


def rows(num_rows: int = 48, seed: int = 0, kind: str = "int", pairs: bool = False) -> list[dict[str, Any]]:
    """Texts of words from the upper half of the vocabulary; the label depends on the first word."""
    chance = np.random.default_rng(seed)
    made = []
    for _ in range(num_rows):
        words = [WORDS[at] for at in chance.integers(150, 250, size=int(chance.integers(3, 9)))]
        value = int(words[0].removeprefix("word")) % 2
        label: Any = {"int": value, "str": ("bad", "good")[value], "float": value + 0.25}[kind]
        columns = {"text": " ".join(words)}
        if pairs:
            columns = {"sentence1": " ".join(words), "sentence2": " ".join(words[::-1])}
        made.append({**columns, "label": label})
    return made


def texts(num_rows: int = 24, seed: int = 0) -> list[dict[str, Any]]:
    """Rows without their labels."""
    return [{"text": row["text"]} for row in rows(num_rows, seed)]


def pairs(num_rows: int = 24, seed: int = 0, names: tuple[str, str] = ("prompt", "completion")) -> list[dict[str, Any]]:
    """A prompt of words, and its words backwards."""
    prompts = [row["text"] for row in rows(num_rows, seed)]
    return [{names[0]: prompt, names[1]: " ".join(prompt.split()[::-1][:4])} for prompt in prompts]


def chats(num_rows: int = 24, seed: int = 0) -> list[dict[str, Any]]:
    """A question and an answer each: `pairs` as messages."""
    return [
        {"messages": [{"role": "user", "content": p["prompt"]}, {"role": "assistant", "content": p["completion"]}]}
        for p in pairs(num_rows, seed)
    ]


def ids_of(text: str) -> list[int]:
    """Token ids of words, without any special token."""
    return [len(SPECIAL) + WORDS.index(word) for word in text.split()]


def write(path: Path, entries: list[dict[str, Any]]) -> Path:
    """CSV, JSON lines or Parquet, by the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(entries[0]))
            writer.writeheader()
            writer.writerows(entries)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(entries), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in entries), encoding="utf-8")
    return path


def write_splits(folder: Path, suffix: str = ".csv", **options: Any) -> Path:
    """train and validation files."""
    write(folder / f"train{suffix}", rows(48, seed=0, **options))
    write(folder / f"validation{suffix}", rows(24, seed=1, **options))
    return folder


def write_language_splits(folder: Path, make: Any = texts) -> Path:
    """train and validation, as JSON lines."""
    write(folder / "train.jsonl", make(24, seed=0))
    write(folder / "validation.jsonl", make(10, seed=1))
    return folder


def files_in(folder: Path) -> list[str]:
    """Every file of a folder, sorted."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
