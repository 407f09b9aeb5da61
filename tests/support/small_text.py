"""Small labelled text, a tokenizer trained on it in memory, and pretrained folders that hold both."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = [f"word{number}" for number in range(300)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
FULL_SIZE = 320  # more rows than the tokenizer has tokens, as many published models have


def small_tokenizer(**special: str | None) -> PreTrainedTokenizerFast:
    """One id a word, special tokens first."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *WORDS])}, unk_token="[UNK]"))
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
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = model or BertModel(BertConfig(vocab_size=FULL_SIZE, max_position_embeddings=128, **sizes))
    model.save_pretrained(folder)
    (tokenizer or small_tokenizer()).save_pretrained(folder)
    return folder


def rows(num_rows: int = 48, seed: int = 0, kind: str = "int", pairs: bool = False) -> list[dict[str, Any]]:
    """Texts of words from the upper half of the vocabulary; the label depends on the first word."""
    chance = np.random.default_rng(seed)
    made = []
    for _ in range(num_rows):
        words = [WORDS[at] for at in chance.integers(150, 250, size=int(chance.integers(3, 9)))]
        value = int(words[0].removeprefix("word")) % 2
        label: Any = {"int": value, "str": ("bad", "good")[value], "float": value + 0.25}[kind]
        texts = {"text": " ".join(words)}
        if pairs:
            texts = {"sentence1": " ".join(words), "sentence2": " ".join(words[::-1])}
        made.append({**texts, "label": label})
    return made


def write(path: Path, table: list[dict[str, Any]]) -> Path:
    """CSV, JSON lines or Parquet, by the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(table[0]))
            writer.writeheader()
            writer.writerows(table)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(table), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table), encoding="utf-8")
    return path


def write_splits(folder: Path, suffix: str = ".csv", **options: Any) -> Path:
    """train and validation files."""
    write(folder / f"train{suffix}", rows(48, seed=0, **options))
    write(folder / f"validation{suffix}", rows(24, seed=1, **options))
    return folder


def listing(folder: Path) -> list[str]:
    """Every file of a folder, sorted."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
