"""Runs transformer-smaller-training-vocab in an interpreter of its own, which has transformers < 5 and not leanvocab.

`python _smaller_vocab.py stages FOLDER IDS OUT` prints what each stage of shrinking took, and
`python _smaller_vocab.py tokens TOKENIZER TEXTS ROUNDS SECONDS` what `get_token_stats` took and found, as one line of JSON.
"""

import gc
import importlib.util
import json
import sys
import time
from pathlib import Path


def load_peak():
    """leanvocab's room for peaks of memory, by its path: it imports nothing of leanvocab."""
    path = Path(__file__).resolve().parents[1] / "src" / "leanvocab" / "peak.py"
    spec = importlib.util.spec_from_file_location("peak", path)
    module = sys.modules["peak"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.record_peak


def stages(folder, ids, out):
    """Shrinking, merging and saving: nothing can be saved while shrunk, so the save comes after the merge."""
    from transformer_smaller_training_vocab.modify_model import recreate_embedding, reduce_embedding
    from transformers import AutoModelForSequenceClassification

    record_peak = load_peak()
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    kept = json.loads(Path(ids).read_text())
    held = {}
    steps = {
        "shrink": lambda: held.update(full=reduce_embedding(model, kept, empty_cuda_cache=False)),
        "merge": lambda: recreate_embedding(model, held.pop("full"), kept, empty_cuda_cache=False),
        "save": lambda: model.save_pretrained(out),
    }
    found = {}
    begin = top = None
    for name, step in steps.items():
        gc.collect()
        with record_peak() as peak:
            start = time.perf_counter()
            step()
            found[name + "_seconds"] = time.perf_counter() - start
        found[name + "_bytes"] = peak.anonymous_growth_bytes
        begin = peak.start_anonymous_bytes if begin is None else begin
        if name != "save":
            top = max(top or 0, peak.peak_anonymous_bytes)
    found["total_bytes"] = top - begin
    return found


def tokens(tokenizer, texts, rounds, seconds):
    from transformer_smaller_training_vocab.token_stats import get_token_stats
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    rows = [row[0] if len(row) == 1 else tuple(row) for row in json.loads(Path(texts).read_text())]
    taken = []
    begin = time.perf_counter()
    while len(taken) < int(rounds) and (not taken or time.perf_counter() - begin + max(taken) < float(seconds)):
        start = time.perf_counter()
        found = get_token_stats(loaded, rows)
        taken.append(time.perf_counter() - start)
    return {"seconds": taken, "ids": [int(each) for each in found]}


if __name__ == "__main__":
    print("\n" + json.dumps({"stages": stages, "tokens": tokens}[sys.argv[1]](*sys.argv[2:])))
