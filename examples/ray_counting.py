"""Counting where data do not fit one machine: Ray tokenizes and counts in its workers, and the vocabulary is saved.

python examples/ray_counting.py MODEL DATA.csv OUTPUT        (column text)
"""

import sys
from pathlib import Path

import ray
from transformers import AutoTokenizer

import leanvocab as lv


def main(name: str, data: str, output: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    texts = ray.data.read_csv(data)
    tokenized = texts.map_batches(lambda rows: {"input_ids": tokenizer(list(rows["text"]))["input_ids"]})

    counts = lv.count_tokens(tokenized)
    vocabulary = lv.PartialVocabulary.from_counts(counts, tokenizer=tokenizer, full_size=len(tokenizer))

    Path(output).mkdir(parents=True, exist_ok=True)
    vocabulary.save(Path(output) / "vocabulary.json")  # for shrink_, wherever training runs
    print(f"{counts.num_tokens:,} tokens, {len(vocabulary):,} of {vocabulary.full_size:,} rows")


if __name__ == "__main__":
    main(*sys.argv[1:])
