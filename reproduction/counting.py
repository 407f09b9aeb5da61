"""Texts → token counts, tokenized as the paper does: all splits together, pairs as pairs, cut at 128 tokens.

Texts are not padded, so that the pad token counts only where the tokenizer itself produces it (never, with these).
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from tqdm.auto import tqdm  # type: ignore[import-untyped]

from leanvocab.texts.text_columns import check_texts, values_of
from leanvocab.vocabulary.counts import TokenCounts, count_tokens
from reproduction.paper import MAX_LENGTH
from reproduction.sources import Sources, TextData

_ROWS_A_BATCH = 1000


@dataclass
class Counter:
    """Counts texts with tokenizers, each pair of the two once; `seconds` it took by tokenizer and by texts."""

    sources: Sources
    progress: bool | None = None
    """True shows a bar for each tokenizer, False does not. None: on a terminal."""
    seconds: dict[tuple[str, str], float] = field(default_factory=dict)
    _counts: dict[tuple[str, str], TokenCounts] = field(default_factory=dict)

    def count(self, tokenizer_name: str, data: TextData) -> TokenCounts:
        """Counts of each token in all splits at hand, be they whole or partial."""
        return self.count_all(tokenizer_name, [data])[0]

    def count_all(self, tokenizer_name: str, texts: list[TextData]) -> list[TokenCounts]:
        """The same for several texts, with one bar."""
        missing = [data for data in texts if (tokenizer_name, data.name) not in self._counts]
        if missing:
            tokenizer = self.sources.tokenizer(tokenizer_name)
            total = sum(data.num_rows for data in missing)
            disable = None if self.progress is None else not self.progress
            with tqdm(total=total, unit=" rows", unit_scale=True, disable=disable) as bar:
                for data in missing:
                    bar.set_description(f"{tokenizer_name.rpartition('/')[2]}: {data.name}")
                    start = time.perf_counter()
                    self._counts[tokenizer_name, data.name] = count_text(data, tokenizer, bar)
                    self.seconds[tokenizer_name, data.name] = time.perf_counter() - start
        return [self._counts[tokenizer_name, data.name] for data in texts]


def count_text(data: TextData, tokenizer: Any, bar: Any = None) -> TokenCounts:
    """Tokenize batch by batch and count; only the texts are held, never their tokens."""
    rows = chain.from_iterable(token_ids(data, tokenizer, bar))
    return count_tokens(rows, progress=False)


def token_ids(
    data: TextData, tokenizer: Any, bar: Any = None, rows_a_batch: int = _ROWS_A_BATCH
) -> Iterator[list[list[int]]]:
    """The token ids of each row, in batches."""
    for split in data.splits:
        check_texts(f"{data.name}.{split.name}", split.rows, data.text_columns)
        columns = [values_of(split.rows, column) for column in data.text_columns]
        for start in range(0, len(split.rows), rows_a_batch):
            texts = [column[start : start + rows_a_batch] for column in columns]
            encoded = tokenizer(
                *texts,
                truncation=True,
                max_length=MAX_LENGTH,
                return_attention_mask=False,
                return_token_type_ids=False,
            )
            yield encoded["input_ids"]
            if bar is not None:
                bar.update(len(texts[0]))
