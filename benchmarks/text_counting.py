"""From text to counts: distinct pieces, beside tokenizing every text in batches on all cores.

The texts are all of GLUE and XNLI that lies beside the project (`LEANVOCAB_SHARED` says where), each once, and the source files
of the packages datasets, trl, accelerate and peft, a text each. Both give the same counts, which is checked. They take turns in
one process, with the tokenizer's own threads; transformer-smaller-training-vocab's `get_token_stats`, which takes one text at a
time, has one turn over the same texts, between two of ours. Memory is that of a fresh process which has
loaded the tokenizer and the texts, and imported what counting imports.
"""

import argparse
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks._command import PEERS, About, finish, parser, read_options
from benchmarks._peers import SMALLER_VOCAB
from benchmarks._results import OURS, Figure, Result, Series, beside_ours
from benchmarks._rounds import Budget, run_child, run_module, seconds_of, take_turns

ABOUT = About(
    name="text_counting",
    measures="From text to counts over GLUE, XNLI and the source of four packages: time and memory.",
    beside="tokenizing in batches on all cores and np.bincount, transformer-smaller-training-vocab's get_token_stats",
    limit="a fifth of the time of tokenizing (XLM-R, BERT), 150 MB",
    budget_seconds=900,
)
MODULE = "benchmarks.text_counting"
BATCHES = "encode_batch_fast on all cores + np.bincount"
SHARED = Path(os.environ.get("LEANVOCAB_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"
PACKAGES = ("datasets", "trl", "accelerate", "peft")
WITH_BAR = ("xlm-roberta-base", "bert-base-uncased")
TOKENIZERS = (*WITH_BAR, "bert-base-multilingual-cased", "llama3", "qwen3")
_MB = 1e6


def load_texts(size: str) -> Any:
    """An Arrow array of texts."""
    import pyarrow as pa
    import pyarrow.parquet

    if size == "small":
        return pa.array([f"word{i % 97} word{i * i % 89} word3" for i in range(4000)])
    columns = []
    for path in sorted(SHARED.glob("*/*.parquet")):
        table = pyarrow.parquet.read_table(path)
        strings = [name for name in table.column_names if pa.types.is_string(table.schema.field(name).type)]
        columns += [table.column(name).combine_chunks() for name in strings]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        columns.append(pa.array([file.read_text("utf-8") for file in sorted(Path(spec.origin).parent.rglob("*.py"))]))
    return pa.concat_arrays(columns).drop_null()


def load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if name != "made":
        return AutoTokenizer.from_pretrained(SHARED / "tokenizers" / name)
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[UNK]", *(f"word{number}" for number in range(100))]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


def in_batches(tokenizer: Any, texts: Any, size: int) -> Any:
    """Counts by tokenizing everything, a thousand texts at a time."""
    import numpy as np

    backend, counts = tokenizer.backend_tokenizer, np.zeros(size, np.int64)
    for start in range(0, len(texts), 1000):
        encodings = backend.encode_batch_fast(texts[start : start + 1000].to_pylist())
        ids = np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), np.int64)
        counts += np.bincount(ids, minlength=size)
    return counts


def ours(tokenizer: Any, texts: Any, size: int) -> Any:
    from leanvocab import count_tokens

    return count_tokens(texts, tokenizer=tokenizer, full_size=size, progress=False).counts


def token_stats(file: str) -> Callable[..., Any]:
    """The peer's function, from its file: its package needs transformers < 5, this part of it does not."""
    spec = importlib.util.spec_from_file_location("token_stats", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_token_stats  # type: ignore[no-any-return]


def child(what: str, name: str, size: str, rounds: str, seconds: str, peer: str = "") -> dict[str, Any]:
    """Times, or the memory, of counting with one tokenizer."""
    import numpy as np

    tokenizer = load_tokenizer(name)
    num_rows = len(tokenizer)
    ours(tokenizer, load_texts("small"), num_rows)  # imports
    if what == "peer":
        texts = load_texts(size)
        plain, found = texts.to_pylist(), []

        def count() -> None:
            found.append(np.flatnonzero(ours(tokenizer, texts, num_rows)).tolist())

        before = seconds_of(count)
        theirs = seconds_of(lambda: found.append(token_stats(peer)(tokenizer, plain)))
        after = seconds_of(count)
        assert set(found[0]) <= set(found[1]), "the two found other ids"
        return {"seconds": {OURS: [before, after], SMALLER_VOCAB: [theirs]}}
    texts = load_texts(size)
    if what == "memory":
        from leanvocab.reports.peak import record_peak

        with record_peak(0.001) as peak:
            ours(tokenizer, texts, num_rows)
        return {"bytes": peak.anonymous_growth_bytes, "text_bytes": int(texts.nbytes), "num_texts": len(texts)}
    programs = {
        OURS: functools.partial(ours, tokenizer, texts, num_rows),
        BATCHES: functools.partial(in_batches, tokenizer, texts, num_rows),
    }
    counted: dict[str, Any] = {}

    def measured(program: Any) -> float:
        return seconds_of(lambda: counted.__setitem__(program.func.__name__, program()))

    taken = take_turns(programs, int(rounds), Budget(float(seconds)), measured)
    assert np.array_equal(counted["ours"], counted["in_batches"]), "the two counted otherwise"
    return {"seconds": taken, "num_tokens": int(counted["ours"].sum())}


def measure(options: argparse.Namespace) -> Iterator[Result]:
    budget = Budget(options.seconds)
    names = ("made",) if options.size == "small" else options.tokenizers
    installed = PEERS.glob("smaller-vocab/lib/*/site-packages/transformer_smaller_training_vocab/token_stats.py")
    peer = options.token_stats or next(installed, None)
    series: list[Series] = []
    figures: list[Figure] = []
    about: dict[str, Any] = {}
    for number, name in enumerate(names):
        share = budget.left / (len(names) - number)
        taken = run_child(MODULE, "time", name, options.size, options.rounds or 3, share / 2)
        series += beside_ours("time", name, "s", taken["seconds"])
        figures.append(_ratio(name, BATCHES, taken["seconds"], 1 / 5 if name in WITH_BAR else None))
        memory = run_child(MODULE, "memory", name, options.size, 1, share)
        figures.append(Figure(f"anonymous memory while counting, {name}", memory["bytes"] / _MB, "MB", bar=150.0))
        about |= {"bytes of text": memory["text_bytes"], "texts": memory["num_texts"]}
        if peer is not None:
            beside = run_child(MODULE, "peer", name, options.size, 1, share, peer)
            series += beside_ours("time beside a peer", name, "s", beside["seconds"])
            figures.append(_ratio(name, SMALLER_VOCAB, beside["seconds"], 1 / 10))
    missing = () if peer is not None else (f"{SMALLER_VOCAB}: open: not here; make peers fetches it",)
    title, subject = "From text to counts", "the texts at hand" if options.size == "full" else "made texts"
    yield Result(
        ABOUT.name, title, subject, "cpu", tuple(series), tuple(figures), missing, budget.spent, options.seconds, about
    )


def _ratio(case: str, who: str, seconds: dict[str, list[float]], bar: float | None) -> Figure:
    """The smallest times of both: what else the machine does makes times longer, and never shorter."""
    return Figure(f"time / {who}, {case}", min(seconds[OURS]) / min(seconds[who]), "×", bar=bar)


def main(arguments: list[str] | None = None) -> list[Result]:
    made = parser(ABOUT)
    made.add_argument("--tokenizers", nargs="+", choices=TOKENIZERS, default=TOKENIZERS)
    made.add_argument("--token-stats", type=Path, help="token_stats.py of transformer-smaller-training-vocab")
    options = read_options(made, arguments)
    return finish(measure(options), options)


if __name__ == "__main__":
    run_module(child, main)
