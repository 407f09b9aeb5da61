"""Merging a delta on disk beside copying the same bytes, and what else makes a full checkpoint of an adapter.

A checkpoint of XLM-R base's size (1.1 GB, random weights) of which 6,000 rows were trained. leanvocab's `merge_checkpoint`
checks the sha256 of all that it reads; `cp --reflink=never` copies; safetensors loads all, puts the rows in and saves; PEFT loads
model and adapter, merges and saves. All sync what they wrote, into new folders on one disk, in turn, each after a sync of
everything. Memory is the growth of anonymous bytes in a process of its own.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks._command import About, finish, parser, read_options
from benchmarks._models import kept_ids, save_model
from benchmarks._results import OURS, Figure, Result, Series, beside_ours
from benchmarks._rounds import Budget, run_child, run_module, seconds_on_disk, take_turns
from leanvocab.checkpoints.delta_format import BaseTensor, DeltaTable, DeltaTensor, Description, write_signs
from leanvocab.checkpoints.merge import merge_checkpoint
from leanvocab.checkpoints.verify import rest_sha256
from leanvocab.files.copying import sha256_of_range
from leanvocab.files.headers import make_header, read_header, read_weights
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

ABOUT = About(
    name="merge",
    measures="Merging trained rows into a full checkpoint on disk: time, memory, and the size of a delta.",
    beside="cp, safetensors load and save, PEFT merge and unload",
    limit="copying the bytes",
    budget_seconds=90,
)
MODULE = "benchmarks.merge"
COPY, SAFETENSORS, PEFT = "limit: cp --reflink=never", "safetensors load and save", "PEFT merge and unload"
ROWS, DIM, KEPT = 250_002, 768, 6_000  # of the large synthetic checkpoint
OTHER = (768, 30_000)  # what stands for the rest of it, as often as it takes


def make_base(folder: Path, num_bytes: int) -> None:
    """Random weights: a table of XLM-R's size and as many others as it takes, in shards of up to 2 GB."""
    folder.mkdir()
    table = ("model.embed_tokens.weight", "F32", (ROWS, DIM))
    count = max(1, round((num_bytes - ROWS * DIM * 4) / (OTHER[0] * OTHER[1] * 4)))
    tensors = [table, *((f"model.layers.{i}.weight", "F32", OTHER) for i in range(count))]
    shards = [tensors[i : i + 16] for i in range(0, len(tensors), 16)]
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= {tensor[0]: name for tensor in shard}
        write(folder / name, shard)
    if len(shards) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "tokenizer.json").write_text("{}")


def write(path: Path, tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> None:
    header, _ = make_header({"format": "pt"}, tensors)
    generator = np.random.default_rng(len(tensors))
    with path.open("wb") as file:
        file.write(header)
        for _, _, shape in tensors:
            left = int(np.prod(shape))
            while left:
                values = generator.random(min(left, 1 << 22), dtype=np.float32)
                file.write(values.tobytes())
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
        with file.opened() as source:
            base_tensors[each] = BaseTensor(entry.dtype, entry.shape, sha256_of_range(source, entry.start, entry.end))
            rest = rest_sha256(source, entry, vocabulary.token_ids) if each == name else rest
    file = read_header(folder, "delta.safetensors")
    with file.opened() as source:
        digest = sha256_of_range(source, file.tensors[name].start, file.tensors[name].end)
    tables, tensors = {name: DeltaTable(vocabulary, rest)}, {name: DeltaTensor((name,), digest)}
    Description(str(base), None, base_tensors, tables, tensors).write(folder)
    write_signs(folder, str(base))


def make_folder(folder: Path, size: str) -> None:
    """A base, a delta of its rows, the same as an adapter of PEFT's, and as a file of rows."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForSequenceClassification

    import leanvocab as lv
    from leanvocab.adapters.exporting import export_trainable_tokens

    save_model(size, folder / "base")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "base")
    ids = kept_ids(size)
    lv.shrink_(model, PartialVocabulary(ids, model.get_input_embeddings().num_embeddings))
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight.add_(1)
    lv.save_delta(model, folder / "delta", base=folder / "base")
    export_trainable_tokens(model, folder / "adapter", base=folder / "base")
    save_file({"rows": weight.detach().contiguous(), "ids": torch.from_numpy(ids)}, folder / "rows.safetensors")


def with_copy(folder: Path, target: Path) -> None:
    target.mkdir()
    files = sorted(str(path) for path in (folder / "base").iterdir())
    subprocess.run(["cp", "--reflink=never", *files, str(target)], check=True)


def with_leanvocab(folder: Path, target: Path) -> None:
    merge_checkpoint(base=folder / "base", delta=folder / "delta", output=target, progress=False)


def with_safetensors(folder: Path, target: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors, rows = load_file(folder / "base" / "model.safetensors"), load_file(folder / "rows.safetensors")
    name = next(name for name in tensors if name.endswith("word_embeddings.weight"))
    tensors[name][rows["ids"]] = rows["rows"]
    target.mkdir()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(folder / "base" / "config.json", target)


def with_peft(folder: Path, target: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder / "base")
    PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload().save_pretrained(target)


PROGRAMS: dict[str, Callable[[Path, Path], None]] = {
    OURS: with_leanvocab,
    SAFETENSORS: with_safetensors,
    PEFT: with_peft,
    COPY: with_copy,
}


def synced(folder: Path, who: str) -> Callable[[], None]:
    """A program and a sync of what it wrote."""

    def run() -> None:
        PROGRAMS[who](folder, folder / "merged")
        subprocess.run(["sync", *(str(path) for path in (folder / "merged").iterdir())], check=True)

    return run


def time_all(folder: Path, rounds: int, budget: Budget) -> dict[str, list[float]]:
    """Seconds of each program, in turn; the base is in the page cache for all."""

    def measured(work: Callable[[], None]) -> float:
        return seconds_on_disk(work, folder / "merged")

    for who in PROGRAMS:  # warms up; all but the copy must write the same weights
        measured(lambda who=who: check(folder, who))  # type: ignore[misc]
    return take_turns({who: synced(folder, who) for who in PROGRAMS}, rounds, budget, measured)


def check(folder: Path, who: str) -> None:
    from safetensors import safe_open

    PROGRAMS[who](folder, folder / "merged")
    with (
        safe_open(folder / "merged" / "model.safetensors", "pt") as merged,
        safe_open(folder / "base" / "model.safetensors", "pt") as base,
        safe_open(folder / "rows.safetensors", "pt") as rows,
    ):
        name = next(name for name in base.keys() if name.endswith("word_embeddings.weight"))  # noqa: SIM118
        expected = (
            base.get_tensor(name)
            if who == COPY
            else base.get_tensor(name).index_copy(0, rows.get_tensor("ids"), rows.get_tensor("rows"))
        )
        assert merged.get_tensor(name).equal(expected), f"{who} merged other rows"


def child(who: str, folder: str) -> int:
    """Growth of this process's anonymous bytes while it merges; for leanvocab while it verifies, too."""
    from leanvocab.reports.peak import record_peak

    path = Path(folder)
    if who == OURS:
        import leanvocab.checkpoints.merge  # noqa: F401
    elif who == PEFT:
        import peft  # noqa: F401
        from transformers import AutoModelForSequenceClassification, XLMRobertaForSequenceClassification  # noqa: F401
    else:
        import safetensors.torch  # noqa: F401
    with record_peak() as peak:
        if who == OURS:
            merge_checkpoint(base=path / "base", delta=path / "delta", output=path / "merged", verify=True)
        else:
            PROGRAMS[who](path, path / "merged")
    shutil.rmtree(path / "merged")
    return peak.anonymous_growth_bytes


def delta_ratios(folder: Path, size: str) -> Iterator[Figure]:
    """Bytes of a delta's folder over those of its tensors, of a model with XLM-R's table."""
    import torch
    from transformers import AutoModelForSequenceClassification

    import leanvocab as lv

    model = AutoModelForSequenceClassification.from_pretrained(folder / "base")
    lv.shrink_(model, PartialVocabulary(kept_ids(size), model.get_input_embeddings().num_embeddings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    lv.save_delta(model, folder / "everything", base=folder / "base")
    for name in ("delta", "everything"):
        num_bytes = sum(path.stat().st_size for path in (folder / name).iterdir())
        tensors = read_header(folder / name, "delta.safetensors").tensors.values()
        trained = "rows" if name == "delta" else name
        yield Figure(
            f"delta folder / its tensors, {trained} trained", num_bytes / sum(e.num_bytes for e in tensors), "×", 1.02
        )


def large_memory(folder: Path) -> Figure:
    """Memory of a merge of 4 GB, in shards."""
    folder.mkdir()
    make_base(folder / "base", 4_000_000_000)
    make_delta(folder / "delta", folder / "base")
    grown = run_child(MODULE, OURS, folder)
    shutil.rmtree(folder)
    return Figure("merge with --verify: anonymous memory at 4 GB", grown, "bytes", 100e6)


def measure(options: argparse.Namespace) -> Iterator[Result]:
    warnings.simplefilter("ignore")
    size, budget = "tiny" if options.size == "small" else "xlm-r-base", Budget(options.seconds)
    with tempfile.TemporaryDirectory(dir=options.folder) as made:
        folder = Path(made)
        make_folder(folder, size)
        os.sync()
        times = time_all(folder, options.rounds or 5, Budget(budget.left * 0.7))
        series = beside_ours("time", "merging, synced", "s", times)
        ours = (float(run_child(MODULE, OURS, folder)),)
        series.append(Series("anonymous memory, growth", "merging", OURS, ours, "bytes"))
        for who in (SAFETENSORS, PEFT):
            grown = (float(run_child(MODULE, who, folder)),)
            series.append(Series("anonymous memory, growth", "merging", who, grown, "bytes", ours))
        ratio = statistics.median(a / b for a, b in zip(times[OURS], times[COPY], strict=True))
        figures = [
            Figure("merge / cp, median of pairs", ratio, "×", 1.3),
            Figure("merge with --verify: anonymous memory", ours[0], "bytes", 100e6),
            *(delta_ratios(folder, size) if options.size == "full" else ()),
            *([large_memory(folder / "large")] if options.large else ()),
        ]
    large = () if options.large else ("a checkpoint of 4 GB in shards: open: not asked for (--large; 8 GB of disk)",)
    title = f"Merging on disk: {size}"
    yield Result(ABOUT.name, title, size, "cpu", tuple(series), tuple(figures), large, budget.spent, options.seconds)


def main(arguments: list[str] | None = None) -> list[Result]:
    made = parser(ABOUT)
    made.add_argument("--large", action="store_true", help="measure memory at 4 GB too (needs 8 GB of disk)")
    made.add_argument("--folder", type=Path, help="on the disk to measure; the temporary folder by default")
    options = read_options(made, arguments)
    return finish(measure(options), options)


if __name__ == "__main__":
    run_module(child, main)
