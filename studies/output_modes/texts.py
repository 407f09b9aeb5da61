"""Texts that are read: some of one domain to train on, held-out text of that domain and of others, and prompts."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import leanvocab as lv
from studies.output_modes.grid import Settings

HUB_NAMES = {"glue": "nyu-mll/glue", "xnli": "facebook/xnli"}
PROMPTS = (
    "The company said on Tuesday that",
    "Once upon a time, in a village by the sea, there lived",
    "Photosynthesis is the process by which",
)


@dataclass(frozen=True)
class Texts:
    """Sentences: those to train on, all of that data set, and the held-out ones of each domain."""

    trained: tuple[str, ...]
    dataset: tuple[str, ...]
    held_out: Mapping[str, tuple[str, ...]]
    prompts: tuple[str, ...] = PROMPTS


@dataclass(frozen=True)
class TokenizedTexts:
    """Token ids: rows [n, length] to train on and held-out rows of each domain; vocabularies by name."""

    trained: torch.Tensor
    held_out: Mapping[str, torch.Tensor]
    vocabularies: Mapping[str, lv.PartialVocabulary]


def real_texts(data: Path | None) -> Texts:
    """News sentences (MRPC) to train on; news, film reviews (SST-2) and German speech and prose (XNLI) held out.

    From a folder that holds `glue/TASK.SPLIT.parquet` and `xnli/xnli.LANGUAGE.SPLIT.parquet`, or from the hub.
    """
    splits = {split: read(data, "glue", "mrpc", split, "sentence1") for split in ("train", "validation", "test")}
    held_out = {
        "news": splits["validation"],
        "reviews": read(data, "glue", "sst2", "validation", "sentence"),
        "german": read(data, "xnli", "de", "validation", "premise"),
    }
    return Texts(splits["train"], tuple(text for split in splits.values() for text in split), held_out)


def read(data: Path | None, collection: str, name: str, split: str, column: str) -> tuple[str, ...]:
    """One column of one split."""
    if data is None:
        from datasets import load_dataset

        return tuple(load_dataset(HUB_NAMES[collection], name, split=split)[column])
    import pyarrow.parquet

    prefix = "xnli." if collection == "xnli" else ""
    path = data / collection / f"{prefix}{name}.{split}.parquet"
    return tuple(pyarrow.parquet.read_table(path, columns=[column]).column(0).to_pylist())


def made_up_texts() -> Texts:
    """Texts that a tiny tokenizer can be trained on: two domains with words of their own."""
    shared = ["the", "a", "of", "and", "is", "was", "said", "in"]
    domains = {
        "news": [*shared, "market", "shares", "company", "profit", "quarter", "rose", "percent", "bank", "trade"],
        "reviews": [*shared, "film", "actor", "charming", "plot", "dull", "scenes", "director", "funny", "cast"],
    }
    chance = random.Random(0)

    def sentences(domain: str, number: int) -> tuple[str, ...]:
        return tuple(" ".join(chance.choices(domains[domain], k=8)) for _ in range(number))

    news, other = sentences("news", 60), sentences("reviews", 30)
    return Texts(news[:40], news, {"news": news[40:], "reviews": other}, ("the company said", "the film is"))


def tokenized(texts: Texts, tokenizer: Any, full_size: int, settings: Settings, seed: int) -> TokenizedTexts:
    """Packed rows, and the vocabularies that a run with this seed may keep.

    The seed chooses which sentences are trained on, and their order. `full_size` is the number of the model's rows.
    """
    chosen = list(texts.trained)
    random.Random(seed).shuffle(chosen)
    trained = packed(chosen, tokenizer, settings.num_rows, settings.length)
    held_out = {
        domain: packed(sentences, tokenizer, settings.num_held_out, settings.length)
        for domain, sentences in texts.held_out.items()
    }
    counts = lv.count_tokens(trained.numpy(), full_size=full_size)
    everything = [tokenizer("\n".join(texts.dataset))["input_ids"]]
    counted = {"trained": counts, "dataset": counts + lv.count_tokens(everything, full_size=full_size)}
    vocabularies = {name: lv.PartialVocabulary.from_counts(each, tokenizer=tokenizer) for name, each in counted.items()}
    return TokenizedTexts(trained, held_out, vocabularies)


def packed(sentences: Sequence[str], tokenizer: Any, num_rows: int, length: int) -> torch.Tensor:
    """Token ids [num_rows, length] of sentences, one a line."""
    ids = tokenizer("\n".join(sentences))["input_ids"]
    if len(ids) < num_rows * length:
        raise ValueError(f"the text has {len(ids):,} tokens, and {num_rows} rows of {length} were asked for")
    return torch.tensor(ids[: num_rows * length]).view(num_rows, length)
