"""Merging on disk beside a plain copy of the same bytes, its memory, and what a delta costs.

`python -m benchmarks.merge` (1 GB; `--large` adds 4 GB for memory; `--json` for machines; `--pairs` for more pairs).
Copy: `cp --reflink=never` of the base's files, then `sync` of them. Merge: `merge_checkpoint`, which syncs too, and checks
the sha256 of all that it reads. Both into new folders on one disk, in turn, each after a sync of everything.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._results import Figure, show
from leanvocab.bytestreams import sha256_of_range
from leanvocab.compare import rest_sha256
from leanvocab.headers import make_header, opened, read_file, read_weights
from leanvocab.layout import BaseTensor, DeltaTable, DeltaTensor, Description, digest_of, write_signs
from leanvocab.merge import merge_checkpoint
from leanvocab.vocabulary import PartialVocabulary

ROWS, DIM, KEPT = 250_002, 768, 6_000
OTHER = (768, 30_000)  # what stands for the rest of a model, as often as it takes
MEMORY = """
import os, sys, threading, time
from leanvocab.merge import merge_checkpoint
peak, running = 0, True
def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
def watch():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.002)
watcher = threading.Thread(target=watch); watcher.start()
merge_checkpoint(base=sys.argv[1], partial=sys.argv[2], output=sys.argv[3], verify=True)
running = False; watcher.join()
print(peak)
"""


def make_base(folder: Path, num_bytes: int) -> None:
    """Random weights: a table of XLM-R's size and as many others as it takes, in shards of up to 2 GB."""
    folder.mkdir()
    table = ("model.embed_tokens.weight", "F32", (ROWS, DIM))
    count = max(1, round((num_bytes - ROWS * DIM * 4) / (OTHER[0] * OTHER[1] * 4)))
    tensors = [table, *((f"model.layers.{i}.weight", "F32", OTHER) for i in range(count))]
    shards = [tensors[i : i + 16] for i in range(0, len(tensors), 16)]
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= {tensor[0]: name for tensor in shard}
        write(folder / name, shard)
    if len(shards) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "tokenizer.json").write_text("{}")


def write(path: Path, tensors: list[tuple[str, str, tuple[int, ...]]]) -> None:
    header, _ = make_header({"format": "pt"}, tensors)
    generator = np.random.default_rng(len(tensors))
    with path.open("wb") as file:
        file.write(header)
        for _, _, shape in tensors:
            left = int(np.prod(shape))
            while left:
                values = generator.random(min(left, 1 << 22), dtype=np.float32)
                file.write(values)
                left -= len(values)


def make_delta(folder: Path, base: Path) -> None:
    """A delta of the table's rows alone, to which the base's digests belong."""
    folder.mkdir()
    weights = read_weights(base)
    vocabulary = PartialVocabulary(np.sort(np.random.default_rng(1).choice(ROWS, KEPT, replace=False)), ROWS)
    name = "model.embed_tokens.weight"
    write(folder / "delta.safetensors", [(name, "F32", (KEPT, DIM))])
    base_tensors = {}
    rest = ""
    for each, (file, entry) in weights.tensors.items():
        with opened(file.path.parent, file.path.name) as source:
            base_tensors[each] = BaseTensor(entry.dtype, entry.shape, sha256_of_range(source, entry.start, entry.end))
            rest = rest_sha256(source, entry, vocabulary.token_ids) if each == name else rest
    file = read_file(folder, "delta.safetensors")
    entry = file.tensors[name]
    digest = digest_of((folder / "delta.safetensors").read_bytes()[entry.start : entry.end])
    tables, tensors = {name: DeltaTable(vocabulary, rest)}, {name: DeltaTensor((name,), digest)}
    Description(str(base), None, base_tensors, tables, tensors).write(folder)
    write_signs(folder, str(base))


def copy_seconds(base: Path, target: Path) -> float:
    target.mkdir()
    files = sorted(str(path) for path in base.iterdir())
    started = time.perf_counter()
    subprocess.run(["cp", "--reflink=never", *files, str(target)], check=True)
    subprocess.run(["sync", *(str(path) for path in target.iterdir())], check=True)
    return time.perf_counter() - started


def merge_seconds(base: Path, delta: Path, target: Path) -> float:
    started = time.perf_counter()
    merge_checkpoint(base=base, partial=delta, output=target, progress=False)
    return time.perf_counter() - started


def speed(folder: Path, base: Path, delta: Path, num_pairs: int) -> tuple[list[float], list[float]]:
    """Seconds of copies and of merges, in turn; the base is in the page cache for both."""
    copies, merges = [], []
    for pair in range(num_pairs + 1):
        for kind in ("copy", "merge") if pair % 2 else ("merge", "copy"):
            subprocess.run(["sync"], check=True)
            target = folder / kind
            seconds = copy_seconds(base, target) if kind == "copy" else merge_seconds(base, delta, target)
            shutil.rmtree(target)
            if pair:  # the first pair warms up
                (copies if kind == "copy" else merges).append(seconds)
    return copies, merges


def peak_anonymous_bytes(folder: Path, base: Path, delta: Path) -> int:
    """Of a merge with verification, in a process of its own."""
    command = [sys.executable, "-c", MEMORY, str(base), str(delta), str(folder / "measured")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    shutil.rmtree(folder / "measured")
    return int(done.stdout)


def delta_ratios(folder: Path) -> dict[str, float]:
    """Bytes of a delta's folder over those of its tensors, of a model with XLM-R's table."""
    import torch
    from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

    import leanvocab as lv

    torch.manual_seed(0)
    config = XLMRobertaConfig(vocab_size=ROWS, num_hidden_layers=2, max_position_embeddings=514)
    XLMRobertaForSequenceClassification(config).save_pretrained(folder / "xlmr")
    model = XLMRobertaForSequenceClassification.from_pretrained(folder / "xlmr")
    ids = np.sort(np.random.default_rng(1).choice(ROWS, KEPT, replace=False))
    lv.shrink_(model, PartialVocabulary(ids, ROWS))
    ratios: dict[str, float] = {}
    with torch.no_grad():
        model.roberta.embeddings.word_embeddings.weight.add_(1)
        lv.save_delta(model, folder / "rows", base=folder / "xlmr")
        for parameter in model.parameters():
            parameter.add_(1)
        lv.save_delta(model, folder / "everything", base=folder / "xlmr")
    for name in ("rows", "everything"):
        size = sum(path.stat().st_size for path in (folder / name).iterdir())
        ratios[name] = size / sum(e.num_bytes for e in read_file(folder / name, "delta.safetensors").tensors.values())
    return ratios


def main(arguments: list[str] | None = None) -> list[Figure]:
    """Measures, prints and returns the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--large", action="store_true", help="measure memory at 4 GB too (needs 8 GB of disk)")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, default=None, help="on the disk to measure; the temporary folder by default"
    )
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    figures: list[Figure] = []
    details: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as made:
        folder = Path(made)
        for size in (1, 4) if options.large else (1,):
            base, delta = folder / f"base-{size}", folder / f"delta-{size}"
            make_base(base, size * 1_000_000_000)
            make_delta(delta, base)
            os.sync()
            if size == 1:
                copies, merges = speed(folder, base, delta, options.pairs)
                ratios = [merge / copy for copy, merge in zip(copies, merges, strict=True)]
                details |= {"copy_seconds": copies, "merge_seconds": merges}
                figures.append(Figure("copy and sync, 1 GB, median", statistics.median(copies), "s"))
                figures.append(Figure("merge, 1 GB, median", statistics.median(merges), "s"))
                figures.append(Figure("merge / copy, median of pairs", statistics.median(ratios), "×", 1.3))
            peak = peak_anonymous_bytes(folder, base, delta) / 1e6
            figures.append(Figure(f"merge with --verify: anonymous memory at {size} GB", peak, "MB", 100))
            shutil.rmtree(base)
        for name, ratio in delta_ratios(folder).items():
            figures.append(Figure(f"delta folder / its tensors, {name} trained", ratio, "×", 1.02))
    show("Merging on disk", figures, options.json, **details)
    return figures


if __name__ == "__main__":
    main()
