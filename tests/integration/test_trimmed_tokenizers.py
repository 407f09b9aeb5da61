"""Real tokenizers with the tokens of real texts alone: each text has the same tokens, renumbered, and decodes to the same."""

from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from leanvocab.trimming.tokenizer_files import TokenizerFiles

pytestmark = pytest.mark.shared_data

NAMES = (
    "bert-base-cased", "bert-base-multilingual-cased", "bert-base-uncased", "deberta-v3-base", "distilbert-base-cased",
    "gpt2", "llama3", "qwen3", "roberta-base", "t5-small", "xlm-roberta-base",
)  # fmt: skip
MODELS = ("e5-small", "minilm")  # downloaded, where they were
ODD = [
    "",
    " ",
    "日本語のテキスト ☃ 🏳️‍🌈",
    "[UNK] <unk> [MASK]<mask></s>",
    "a\tb\r\n\n  c\u00a0d",
    "ﬁ ½ ΣΑΣ İ e\u0301",
    "�\u200b",
]


def texts(shared: Path) -> list[str]:
    read = [
        pyarrow.parquet.read_table(file, columns=["premise", "hypothesis"]).slice(0, 60)
        for file in sorted(shared.glob("data/xnli/*.validation.parquet"))
    ]
    return [text for table in read for column in table.columns for text in column.to_pylist()] + ODD


@pytest.mark.parametrize("name", [*NAMES, *MODELS])
def test_real_text_has_the_same_tokens(name: str, shared: Path, repository: Path, tmp_path: Path) -> None:
    folder = (repository / ".cache/models" if name in MODELS else shared / "data/tokenizers") / name
    if not folder.is_dir():
        pytest.skip(f"no {name} at {folder}")
    before, files, sample = AutoTokenizer.from_pretrained(folder), TokenizerFiles.read(folder), texts(shared)
    tokens = before(sample)["input_ids"]
    counted = np.unique(np.concatenate(tokens).astype(np.int64))
    ids = files.closed(counted)
    for file, content in {**files.written(ids), "config.json": (folder / "config.json").read_bytes()}.items():
        (tmp_path / file).write_bytes(content)
    after = AutoTokenizer.from_pretrained(tmp_path)
    assert type(after) is type(before)
    for text, old, new in zip(sample, tokens, after(sample)["input_ids"], strict=True):
        assert ids[np.asarray(new, int)].tolist() == old, text
        assert after.decode(new) == before.decode(old)
    assert len(after) == len(ids) < len(before) / 2
    if before.backend_tokenizer.model.__class__.__name__ in ("WordPiece", "Unigram"):
        assert len(ids) - len(counted) <= 300  # special tokens, bytes, and one piece
    if (folder / "tokenizer.json").exists():  # which other readers take as it is
        old, new = (Tokenizer.from_file(str(path / "tokenizer.json")) for path in (folder, tmp_path))
        kept = [text for text in sample if set(old.encode(text).ids) <= set(ids.tolist())]
        assert len(kept) > 0.9 * len(sample)
        assert all(ids[new.encode(text).ids].tolist() == old.encode(text).ids for text in kept)
    again = TokenizerFiles.read(tmp_path)
    every = np.arange(len(ids))
    assert again.closed(every).tolist() == every.tolist()
    assert again.written(every) == {name: (tmp_path / name).read_bytes() for name in again.names}
