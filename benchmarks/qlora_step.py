"""QLoRA: the peak memory of a training step with a model in 4 bits, full vocabulary and partial, beside what arithmetic says.

A checkpoint of random weights and a published size is made once, in bf16. Each program is a process that loads it in 4 bits
(nf4, double quantization), shrinks it or not, calls `prepare_model_for_kbit_training`, puts LoRA on all linear layers, and
takes steps with fused AdamW. What falls is to be what `estimate_memory` says of the same model: matrix, map, frozen rows, loss.
On a CPU frozen rows are a mapped file, which anonymous memory does not count, and batches are smaller. `--device paper` counts
the bytes of the same programs on a GPU.
"""

import argparse
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

from benchmarks._command import About, finish, parser, read_options
from benchmarks._models import SHAPES, kept_ids, make_model
from benchmarks._paper import PAPER, in_four_bits, peak_of
from benchmarks._peers import installed
from benchmarks._results import OURS, Figure, Result, Series, versions
from benchmarks._rounds import Budget, run_child, run_module

ABOUT = About(
    name="qlora_step",
    measures="QLoRA: the peak memory of a step with the full and a partial vocabulary, and what arithmetic says of it.",
    beside="QLoRA without leanvocab",
    limit="estimate_memory's bytes",
    budget_seconds=1200,
)
MODULE = "benchmarks.qlora_step"
FULL = "QLoRA"
FROZEN, HOST, RESTRICTED = (
    f"{OURS}, frozen",
    f"{OURS}, frozen rows on the host",
    f"{OURS}, restricted",
)
PROGRAMS = {FULL: None, FROZEN: ("frozen", "device"), HOST: ("frozen", "host"), RESTRICTED: ("restricted", "device")}
MODELS = {"full": ["gemma-3-1b", "qwen3-0.6b", "llama-3.2-1b"], "small": ["tiny-lm-64"]}
WITHIN = 0.05  # of the drop that arithmetic says
BATCH = {"cpu": (1, 64), "cuda": (4, 128), PAPER: (4, 128)}  # rows, tokens each
# What is freed goes back to the system: glibc would keep it, more of it the longer a process runs.
NOTHING_KEPT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def load(folder: str, ids: Any, who: str, device: str) -> Any:
    """A model in 4 bits with LoRA, ready to train."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=bits, dtype=torch.bfloat16, device_map={"": device}
    )
    return with_lora(model, ids, who)


def with_lora(model: Any, ids: Any, who: str) -> Any:
    """A model in 4 bits, shrunk or not, prepared, and LoRA on all its linear layers."""
    import peft

    import leanvocab as lv

    if PROGRAMS[who] is not None:
        output, frozen_rows = PROGRAMS[who]  # type: ignore[misc]
        vocabulary = lv.PartialVocabulary(ids, model.get_input_embeddings().num_embeddings)
        lv.shrink_(model, vocabulary, output=output, frozen_rows=frozen_rows)
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))


def child(name: str, folder: str, who: str, batch: str, length: str, device: str) -> dict[str, int]:
    """The peak of two steps, and what arithmetic says that the partial vocabulary saves of it."""
    import torch

    import leanvocab as lv
    from leanvocab.reports.peak import record_peak

    warnings.simplefilter("ignore")  # it says that restricted is another objective
    ids = kept_ids(name)
    model = load(folder, ids, who, device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    kept, generator = torch.from_numpy(ids), torch.Generator().manual_seed(0)
    saved = 0
    if PROGRAMS[who] is not None:
        estimate = lv.estimate_memory(model, num_tokens=int(batch) * (int(length) - 1))
        dim = model.get_input_embeddings().weight.shape[1]
        saved = estimate.saved_bytes + (_mapped_bytes(estimate, who, dim) if device == "cpu" else 0)
    if device == "cuda":
        torch.cuda.empty_cache()
    with record_peak() as peak:
        for _ in range(2):
            drawn = kept[torch.randint(len(ids), (int(batch), int(length)), generator=generator)].to(device)
            model(input_ids=drawn, labels=drawn).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    measured = peak.peak_cuda_allocated_bytes if device == "cuda" else peak.peak_anonymous_bytes
    return {"peak": int(measured or 0), "saved": int(saved)}


def _mapped_bytes(estimate: Any, who: str, dim: int) -> int:
    """Bytes that a card would hold and a CPU has mapped: frozen rows with what finds them; of streamed ones the second block."""
    import torch

    from leanvocab.output.frozen_rows import FrozenSizes

    if who != HOST:
        return int(estimate.partial.frozen_bytes)
    (table,) = estimate.tables
    sizes = FrozenSizes(table.full_rows, table.partial_rows, dim, torch.bfloat16, torch.float32, on_host=True)
    return sizes.block_rows * dim * sizes.held_dtype.itemsize


def counted(name: str, who: str, shape: tuple[int, int]) -> dict[str, int]:
    """The same on paper."""
    import torch

    import leanvocab as lv

    warnings.simplefilter("ignore")  # it says that restricted is another objective
    ids = kept_ids(name)

    def prepare(device: str) -> Any:
        model = with_lora(in_four_bits(make_model(name, "bfloat16", device, filled=False)), ids, who)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
        tokens = shape[0] * (shape[1] - 1)
        saved = 0 if PROGRAMS[who] is None else lv.estimate_memory(model, num_tokens=tokens).saved_bytes
        drawn = torch.from_numpy(ids)[torch.randint(len(ids), shape)].to(device)

        def step() -> int:
            model(input_ids=drawn, labels=drawn).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return int(saved)

        return step

    return dict(zip(("peak", "saved"), peak_of(prepare), strict=True))


def bars(found: dict[str, dict[str, int]], at_size: bool) -> Iterator[Figure]:
    """Each mode's drop of the peak, and how far it is from what arithmetic says."""
    for who in (each for each in found if each != FULL):
        drop, said = found[FULL]["peak"] - found[who]["peak"], found[who]["saved"]
        yield Figure(f"{who}: the peak falls by", float(drop), "bytes")
        yield Figure(f"{who}: what arithmetic says", float(said), "bytes")
        if at_size:  # of a small model the memory of the interpreter is the larger part
            yield Figure(f"{who}: the drop, off the arithmetic", abs(drop / said - 1), "", WITHIN)


def measure(options: argparse.Namespace) -> Iterator[Result]:
    budget = Budget(options.seconds)
    batch_size, length = options.batch_size or BATCH[options.device][0], options.length or BATCH[options.device][1]
    absent = [package for package in ("bitsandbytes", "peft") if not installed(package)]
    if absent:
        yield Result(ABOUT.name, "QLoRA", "all models", options.device, open=(f"needs {' and '.join(absent)}",))
        return
    is_counted = options.device == PAPER
    for name in options.models or MODELS[options.size]:
        start = budget.spent
        words = (batch_size, length, options.device)
        found = {who: counted(name, who, words[:2]) for who in PROGRAMS} if is_counted else measured(name, words)
        how = ("counted: ", ", counted", {"machine": versions()}) if is_counted else ("", "", {})
        series = tuple(
            Series(f"{how[0]}peak", "bytes", who, (float(its["peak"]),), "bytes") for who, its in found.items()
        )
        kept, rows = len(kept_ids(name)), SHAPES[name].rows
        title = f"QLoRA, {name}{how[1]}: {kept:,} of {rows:,} rows, {batch_size} × {length} tokens"
        figures = tuple(bars(found, options.size == "full"))
        seconds = budget.spent - start
        yield Result(ABOUT.name, title, name, options.device, series, figures, (), seconds, options.seconds, **how[2])


def measured(name: str, words: tuple[Any, ...]) -> dict[str, dict[str, int]]:
    """Peaks of programs that are processes of their own, by program."""
    with tempfile.TemporaryDirectory() as folder:
        make_model(name, "bfloat16").save_pretrained(folder)
        return {who: run_child(MODULE, name, folder, who, *words, environment=NOTHING_KEPT) for who in PROGRAMS}


def main(arguments: list[str] | None = None) -> list[Result]:
    made = parser(ABOUT, counts=True)
    made.add_argument("--models", nargs="+", choices=SHAPES)
    made.add_argument("--batch-size", type=int, help="1 on a CPU, 4 on a GPU")
    made.add_argument("--length", type=int, help="64 on a CPU, 128 on a GPU")
    options = read_options(made, arguments)
    return finish(measure(options), options)


if __name__ == "__main__":
    run_module(child, main)
