"""Counts the calls that cross from one room to another in the four main flows: `python studies/crossings.py`.

It runs beside any version of the package that lies on the path (PYTHONPATH), and uses public names alone, so that two
versions are compared by running it twice. A call crosses where a function of one module calls one of another.
"""

import contextlib
import inspect
import io
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import leanvocab as lv
from leanvocab.cli import main as command

PACKAGE = Path(lv.__file__).parent
SIZE, WORDS = 500, 120


def room_of(frame: FrameType | None) -> str | None:
    """The module of the package whose code a frame runs; None for code of others."""
    path = frame.f_code.co_filename if frame is not None else ""
    return str(Path(path).relative_to(PACKAGE).with_suffix("")) if path.startswith(f"{PACKAGE}/") else None


@contextlib.contextmanager
def counting() -> Iterator[Counter[tuple[str, str]]]:
    """Counts calls from a module to another within the block; what others call back in between is the caller's."""
    calls: Counter[tuple[str, str]] = Counter()

    def look(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and (callee := room_of(frame)) is not None:
            above = frame.f_back
            while above is not None and room_of(above) is None:
                above = above.f_back
            if above is not None and (caller := room_of(above)) != callee:
                calls[caller, callee] += 1  # type: ignore[index]

    sys.setprofile(look)
    try:
        yield calls
    finally:
        sys.setprofile(None)


def make_inputs(folder: Path) -> tuple[Any, Any]:
    """A tiny BERT with its tokenizer, saved in `folder/base`, and a tokenized data set of few of its words."""
    words = ["[PAD]", "[UNK]", *(f"word{number}" for number in range(SIZE - 2))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    )
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=SIZE, pad_token_id=0, **sizes)
    )
    for each in (model, tokenizer):
        each.save_pretrained(folder / "base")
    numbers = np.random.default_rng(0).integers(0, WORDS, (64, 5))
    texts = [" ".join(f"word{number}" for number in row) for row in numbers]
    lines = [json.dumps({"text": text, "label": "ab"[i % 2]}) for i, text in enumerate(texts)]
    (folder / "train.jsonl").write_text("\n".join(lines))
    (folder / "validation.jsonl").write_text("\n".join(lines[:8]))
    data = datasets.Dataset.from_dict({**tokenizer(texts), "labels": [i % 2 for i in range(len(texts))]})
    return tokenizer, datasets.DatasetDict(train=data, validation=data.select(range(0, 8, 3)))


def flows(folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The main flows by name, each ready to run."""
    tokenizer, data = make_inputs(folder)
    yield "count_tokens(data)", lambda: lv.count_tokens(data)
    counts = lv.count_tokens(data)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "base")
    vocabulary = lv.PartialVocabulary.from_counts(counts, tokenizer=tokenizer, model=model)
    yield "shrink_(model, vocabulary)", lambda: lv.shrink_(model, vocabulary)
    lv.save_delta(model, folder / "delta", base=folder / "base")
    yield "merge_(model)", lambda: lv.merge_(model)
    name = "delta" if "delta" in inspect.signature(lv.merge_checkpoint).parameters else "partial"
    where = {"base": folder / "base", name: folder / "delta", "output": folder / "merged"}
    yield "merge_checkpoint(base, delta)", lambda: lv.merge_checkpoint(**where)
    words = [
        "finetune",
        folder / "base",
        folder,
        "--output-dir",
        folder / "out",
        "--epochs",
        "1",
        "--max-length",
        "16",
        "--json",
    ]
    yield "leanvocab finetune", lambda: run_command([str(word) for word in words])


def run_command(words: list[str]) -> None:
    """The command line within this process, what it prints kept away; raises where it fails."""
    before, sys.argv = sys.argv, ["leanvocab", *words]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            command()
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"leanvocab {' '.join(words)}: exit {end.code}\n{printed.getvalue()}") from None
    finally:
        sys.argv = before


def main() -> None:
    """Prints, for each flow, how many calls cross between rooms and between wings, and the pairs that call most."""
    with tempfile.TemporaryDirectory() as folder:
        for name, run in flows(Path(folder)):
            with counting() as calls:
                run()
            wings = sum(number for pair, number in calls.items() if len({room.partition("/")[0] for room in pair}) == 2)
            print(f"{name}: {calls.total()} calls cross between rooms ({len(calls)} pairs), {wings} between wings")
            for (caller, callee), number in calls.most_common(5):
                print(f"    {caller} → {callee}: {number}")


if __name__ == "__main__":
    main()
