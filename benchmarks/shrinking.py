"""Shrinking, a full save while shrunk, and merging: seconds and anonymous memory at the size of XLM-R base.

    python -m benchmarks.shrinking [--kept 6000] [--json]

A checkpoint of random weights (250,002 × 768, 1.1 GB) is made once in a temporary folder. Each round is a fresh process.
Limits: the kept rows (shrinking); two pages for each kept row (a full save), given back afterwards.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks._results import Figure, show

MEBIBYTE = 2**20
SIZES = {"xlm-r-base": {"vocab_size": 250_002, "hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072}}
SIZES["tiny"] = {"vocab_size": 4_000, "hidden_size": 96, "num_hidden_layers": 1, "intermediate_size": 64}


def make_checkpoint(folder: Path, size: str) -> None:
    """A sequence classifier of random weights, as `from_pretrained` finds one."""
    from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

    XLMRobertaForSequenceClassification(XLMRobertaConfig(num_attention_heads=12, **SIZES[size])).save_pretrained(folder)


def measure(folder: str, num_kept: int) -> dict[str, float]:
    """One round, in this process: seconds and growth of anonymous memory of each stage."""
    import numpy as np
    from transformers import XLMRobertaForSequenceClassification

    import leanvocab as lv
    from leanvocab.peak import record_peak

    model = XLMRobertaForSequenceClassification.from_pretrained(f"{folder}/base")
    size = model.config.vocab_size
    kept = np.random.default_rng(0).choice(size, num_kept, replace=False)
    vocabulary = lv.PartialVocabulary(np.sort(kept), size)
    result: dict[str, float] = {}
    stages = {
        "shrink": lambda: lv.shrink_(model, vocabulary),
        "save": lambda: model.save_pretrained(f"{folder}/saved"),
        "merge": lambda: lv.merge_(model),
    }
    for name, stage in stages.items():
        gc.collect()
        with record_peak() as peak:
            start = time.perf_counter()
            stage()
            result[f"{name}_seconds"] = time.perf_counter() - start
            gc.collect()
        result[f"{name}_peak_bytes"] = peak.anonymous_growth_bytes
        result[f"{name}_kept_bytes"] = peak.end_anonymous_bytes - peak.start_anonymous_bytes
    same = Path(folder, "base/model.safetensors").read_bytes() == Path(folder, "saved/model.safetensors").read_bytes()
    assert same, "a model that was not trained must be saved as it was loaded"
    return result


def figures(rounds: list[dict[str, float]], num_kept: int, row_bytes: int) -> list[Figure]:
    worst = {key: max(each[key] for each in rounds) for key in rounds[0]}
    kept = num_kept * row_bytes / MEBIBYTE
    pages = num_kept * 2 * 4096 / MEBIBYTE
    return [
        Figure("shrinking, time (slowest round)", worst["shrink_seconds"], "s", 1.0),
        Figure(
            "shrinking, anonymous memory: 1.5 × kept rows + 32",
            worst["shrink_peak_bytes"] / MEBIBYTE,
            "MiB",
            1.5 * kept + 32,
        ),
        Figure(
            "full save while shrunk: two pages a kept row + 32", worst["save_peak_bytes"] / MEBIBYTE, "MiB", pages + 32
        ),
        Figure("held after the save (given back: about nothing)", worst["save_kept_bytes"] / MEBIBYTE, "MiB", 4.0),
        Figure("full save, time", worst["save_seconds"], "s"),
        Figure("merging, time", worst["merge_seconds"], "s"),
        Figure("merging, anonymous memory", worst["merge_peak_bytes"] / MEBIBYTE, "MiB"),
        Figure("(the kept rows)", kept, "MiB"),
    ]


def main(arguments: list[str] | None = None) -> list[Figure]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kept", type=int, default=6000, help="rows to keep")
    parser.add_argument("--size", choices=SIZES, default="xlm-r-base")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one-round-in", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one_round_in:
        print(json.dumps(measure(options.one_round_in, options.kept)))
        return []
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder, "base"), options.size)
        command = [sys.executable, "-m", "benchmarks.shrinking", "--one-round-in", folder, "--kept", str(options.kept)]
        rounds: list[dict[str, Any]] = []
        for _ in range(options.rounds):
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rounds.append(json.loads(done.stdout.strip().splitlines()[-1]))
    found = figures(rounds, options.kept, 4 * int(SIZES[options.size]["hidden_size"]))
    show(
        f"Shrinking, saving and merging: {options.size}, {options.kept:,} rows kept", found, options.json, rounds=rounds
    )
    return found


if __name__ == "__main__":
    main()
