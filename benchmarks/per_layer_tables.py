"""Tables for each layer (Gemma 4, Gemma 3n): what a partial vocabulary saves of them, and what watching the forward costs.

Of published sizes, what `estimate_memory` says for 5,000 rows, AdamW in bf16. Of a model of the same structure with few layers,
the bytes of weights, gradients and states after a step, beside the estimate. Of a composite, whose forward reads its table itself
and is watched for that: a training step of 8 × 64 tokens under the watch and without it, in turns.
"""

import argparse
import statistics
from collections.abc import Iterator
from typing import Any

from benchmarks._command import About, finish, parser, read_options
from benchmarks._models import SHAPES, make_model
from benchmarks._results import OURS, Figure, Result, Series
from benchmarks._rounds import Budget, take_turns

ABOUT = About(
    name="per_layer_tables",
    measures="Tables for each layer: bytes that are saved of them, and the time of the watch over a forward that reads one.",
    beside="the full vocabulary",
    limit="the measured bytes",
    budget_seconds=300,
)
MODELS = {"full": ["gemma-4-e2b", "gemma-4-e4b", "gemma-3n-e2b"], "small": ["gemma-4-few-layers"]}
KEPT = 5_000
FEW, FEW_KEPT = "gemma-4-few-layers", 600
BARS = {"gemma-4-e2b": 0.45}  # of the whole: what is left


def estimated(name: str) -> Result:
    """The estimate of a published size. Rows that stay in the softmax, frozen, are of the output layer and counted apart."""
    import leanvocab as lv

    budget = Budget(60)
    kept = KEPT if name != FEW else FEW_KEPT
    estimate = lv.estimate_memory(
        make_model(name, "bfloat16", "meta", filled=False), kept, optimizer="adamw", precision="bf16"
    )
    full, partial = estimate.full, estimate.partial
    tables = (partial.vocabulary_bytes - partial.frozen_bytes) / full.vocabulary_bytes
    series = [
        Series(f"{what} in training", name, who, (number / 1e9,), "GB")
        for who, footprint in (("full vocabulary", full), (OURS, partial))
        for what, number in (
            ("whole", footprint.total_bytes),
            ("vocabulary, frozen rows included", footprint.vocabulary_bytes),
        )
    ]
    figures = (
        Figure("input tables in training: what is left", tables, "", bar=0.05 if name != FEW else None),
        Figure(
            "input tables with the frozen rows of the output layer: left",
            partial.vocabulary_bytes / full.vocabulary_bytes,
            "",
        ),
        Figure("the whole: what is left", 1 - estimate.saved_ratio, "", bar=BARS.get(name)),
    )
    return Result(
        ABOUT.name,
        "Tables for each layer",
        f"{name}, {kept:,} rows, bf16 AdamW",
        "cpu",
        tuple(series),
        figures,
        (),
        budget.spent,
        60,
    )


def held() -> Result:
    """Bytes after a step of the same structure with few layers, over what the estimate says."""
    import torch

    import leanvocab as lv
    from leanvocab.reports.state_bytes import held_bytes

    budget, series, figures = Budget(120), [], []
    for who in ("full vocabulary", OURS):
        model = make_model(FEW, "bfloat16")
        estimate = lv.estimate_memory(model, FEW_KEPT, optimizer="adamw")
        footprint = estimate.full if who != OURS else estimate.partial
        if who == OURS:
            lv.shrink_(model, lv.PartialVocabulary(range(FEW_KEPT), SHAPES[FEW].rows))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
        ids = torch.randint(0, FEW_KEPT, (2, 16), generator=torch.Generator().manual_seed(0))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        measured = sum(held_bytes(model.parameters(), optimizer.state).values())
        said = footprint.weights_bytes + footprint.gradients_bytes + footprint.optimizer_bytes
        figures.append(Figure(f"{who}: estimate off by", abs(said / measured - 1), "", bar=0.02))
        series += [
            Series("held in training", FEW, f"{who}: {what}", (number / 1e6,), "MB")
            for what, number in (("held", measured), ("estimated", said))
        ]
    return Result(
        ABOUT.name, "Estimate beside what is held", f"{FEW}, bf16 AdamW", "cpu", tuple(series), tuple(figures), (),
        budget.spent, 120,
    )  # fmt: skip


def watched(seconds: float) -> Result:
    """Steps of a Gemma 4 composite under the watch and without it; full, so that both can run."""
    import torch

    from leanvocab.model.guard import Watch

    model = composite()
    ids = torch.randint(5, 3_900, (8, 64), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()

    def step_under_the_watch() -> None:
        with Watch([]):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        model.zero_grad()

    programs = {"without the watch": step, OURS: step_under_the_watch}
    for program in programs.values():
        program()
    budget = Budget(seconds)
    taken = take_turns(programs, 40, budget)
    ratios = [ours / without for without, ours in zip(taken["without the watch"], taken[OURS], strict=True)]
    series = tuple(
        Series("a step of 8 × 64 tokens", "Gemma 4 composite", who, tuple(times), "s") for who, times in taken.items()
    )
    figures = (Figure("a step under the watch over one without it", statistics.median(ratios), "×", bar=1.03),)
    return Result(
        ABOUT.name, "The watch", "Gemma 4 composite, 4 layers of 256", "cpu", series, figures, (), budget.spent, seconds
    )


def composite() -> Any:
    """A Gemma 4 with its towers, whose forward reads the row of the pad token."""
    import torch
    import transformers

    text = dict(
        SHAPES[FEW].settings,
        vocab_size=4_000,
        vocab_size_per_layer_input=4_000,
        num_hidden_layers=4,
        num_kv_shared_layers=0,
    )
    vision = {
        "hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 64, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 32,
    }  # fmt: skip
    placeholders = {"image_token_id": 3_990, "video_token_id": 3_991, "audio_token_id": 3_992}
    torch.manual_seed(0)
    return transformers.Gemma4ForConditionalGeneration(
        transformers.Gemma4Config(text_config=text, vision_config=vision, **placeholders)
    ).train()


def measure(options: argparse.Namespace) -> Iterator[Result]:
    for name in options.models or MODELS[options.size]:
        yield estimated(name)
    yield held()
    yield watched(10 if options.size == "small" else min(120, options.seconds / 2))


def main(arguments: list[str] | None = None) -> list[Result]:
    command = parser(ABOUT)
    command.add_argument("--models", nargs="+", choices=sorted({*MODELS["full"], FEW}), help="shapes to estimate")
    options = read_options(command, arguments)
    return finish(measure(options), options)


if __name__ == "__main__":
    main()
