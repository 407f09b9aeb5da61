"""Runs transformer-smaller-training-vocab in an interpreter of its own, which has transformers < 5 and not leanvocab.

`python _smaller_vocab.py stages FOLDER IDS OUT` prints what each stage of shrinking took, and
`python _smaller_vocab.py tokens TOKENIZER TEXTS ROUNDS SECONDS` what `get_token_stats` took and found, as one line of JSON.
"""

import gc
import importlib
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any


def load_peak() -> Any:
    """leanvocab's room for peaks of memory, by its path: it imports nothing of leanvocab."""
    path = Path(__file__).resolve().parents[1] / "src" / "leanvocab" / "peak.py"
    spec = importlib.util.spec_from_file_location("peak", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["peak"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.record_peak


def stages(folder: str, ids: str, out: str) -> dict[str, float]:
    """Shrinking, merging and saving: nothing can be saved while shrunk, so the save comes after the merge."""
    from transformers import AutoModelForSequenceClassification

    theirs = importlib.import_module("transformer_smaller_training_vocab.modify_model")

    record_peak = load_peak()
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    kept = json.loads(Path(ids).read_text())
    held: dict[str, Any] = {}
    steps = {
        "shrink": lambda: held.update(full=theirs.reduce_embedding(model, kept, empty_cuda_cache=False)),
        "merge": lambda: theirs.recreate_embedding(model, held.pop("full"), kept, empty_cuda_cache=False),
        "save": lambda: model.save_pretrained(out),
    }
    found: dict[str, float] = {}
    begin, top = 0.0, 0.0
    for name, step in steps.items():
        gc.collect()
        with record_peak() as peak:
            start = time.perf_counter()
            step()
            found[name + "_seconds"] = time.perf_counter() - start
        found[name + "_bytes"] = peak.anonymous_growth_bytes
        begin = begin or peak.start_anonymous_bytes
        if name != "save":
            top = max(top, peak.peak_anonymous_bytes)
    found["total_bytes"] = top - begin
    return found


def tokens(tokenizer: str, texts: str, rounds: str, seconds: str) -> dict[str, Any]:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    get_token_stats = importlib.import_module("transformer_smaller_training_vocab.token_stats").get_token_stats

    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer)
    except ValueError:  # its config names a class of transformers 5
        loaded = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    rows = [row[0] if len(row) == 1 else tuple(row) for row in json.loads(Path(texts).read_text())]
    taken: list[float] = []
    begin = time.perf_counter()
    while len(taken) < int(rounds) and (not taken or time.perf_counter() - begin + max(taken) < float(seconds)):
        start = time.perf_counter()
        found = get_token_stats(loaded, rows)
        taken.append(time.perf_counter() - start)
    return {"seconds": taken, "ids": [int(each) for each in found]}


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    print("\n" + json.dumps(stages(*rest) if what == "stages" else tokens(*rest)))
