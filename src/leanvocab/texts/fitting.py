"""Tokenizers that fit neither their model nor the texts: refused before anything is trained or counted with them."""

from typing import Any

import numpy as np

from leanvocab.errors import DataError, ModelError
from leanvocab.vocabulary.special_ids import model_full_size, tokenizer_full_size

ROWS_LOOKED_AT = 1000
_MOST_UNKNOWN = 0.5
_SMALLEST_SHARE = 0.5  # of a model's rows: ByT5 has the smallest of real ones, 259 of 384


def check_sizes(tokenizer: Any, config: Any, name: str) -> None:
    """Raises `ModelError` where a tokenizer knows so few tokens that the model's table cannot have been made for it."""
    rows, tokens = model_full_size(config), tokenizer_full_size(tokenizer)
    if rows and tokens < _SMALLEST_SHARE * rows:
        raise ModelError(
            f"the tokenizer of {name!r} knows {tokens:,} tokens, and the model has {rows:,} rows: they do not belong together. "
            "Are the tokenizer's files there (tokenizer.json, vocab.txt, sentencepiece.bpe.model, …)?"
        )


def check_known(split_name: str, encoded: Any, tokenizer: Any) -> None:
    """Raises `DataError` where a tokenizer knows most of a split's texts not, or nothing but special tokens came of them."""
    first = encoded.with_format(None)[:ROWS_LOOKED_AT]["input_ids"]
    ids = np.asarray([token_id for row in first for token_id in row], np.int64)
    unknown = tokenizer.unk_token_id
    special = [token_id for token_id in tokenizer.all_special_ids if token_id != unknown]
    words = ids[~np.isin(ids, special)]
    looked = f"the first {len(first):,} rows of split {split_name!r}"
    if len(ids) and not len(words):
        raise DataError(f"nothing but special tokens came of {looked}: are their texts empty, or is it another column?")
    share = float(np.mean(words == unknown)) if len(words) and unknown is not None else 0.0
    if share > _MOST_UNKNOWN:
        raise DataError(
            f"{share:.0%} of the tokens in {looked} are {tokenizer.unk_token!r}, which stands for unknown words. "
            f"It knows {tokenizer_full_size(tokenizer):,} tokens: has the model's folder all files of its tokenizer, and is it "
            "one for this language?"
        )
