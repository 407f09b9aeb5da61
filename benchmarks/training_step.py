"""One training step with a partial and with the full vocabulary, interleaved on CPU, as ratios pair by pair.

    python -m benchmarks.training_step [--case xlm-r-base | bert-qqp] [--pairs 60] [--json]

xlm-r-base  250,002 rows, 6,000 kept, batch 8 × 64: much is saved
bert-qqp    30,522 rows, 27,012 kept (11.5 % less, the paper's Table 2): little is saved, so nothing may be lost
Both models take the same steps, which must give the same losses. Limit: the step without any vocabulary matrix.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks._results import Figure, median_interval, show

CASES: dict[str, dict[str, Any]] = {
    "xlm-r-base": {"rows": 250_002, "kept": 6_000, "hidden": 768, "layers": 12, "bar": 0.5, "pairs": 12},
    "bert-qqp": {"rows": 30_522, "kept": 27_012, "hidden": 768, "layers": 12, "bar": None, "pairs": 60},
    "tiny": {"rows": 900, "kept": 300, "hidden": 48, "layers": 1, "bar": None, "pairs": 4},
}


def build(case: dict[str, Any]) -> tuple[Any, Any, Any]:
    """(full model, shrunk model, vocabulary): the same weights."""
    import numpy as np
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    import leanvocab as lv

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=case["rows"],
        hidden_size=case["hidden"],
        num_hidden_layers=case["layers"],
        num_attention_heads=12,
        intermediate_size=4 * case["hidden"],
    )
    full = BertForSequenceClassification(config)
    shrunk = copy.deepcopy(full)
    kept = np.sort(np.random.default_rng(0).choice(case["rows"], case["kept"], replace=False))
    vocabulary = lv.PartialVocabulary(kept, case["rows"])
    lv.shrink_(shrunk, vocabulary)
    return full, shrunk, vocabulary


def stepper(model: Any, vocabulary: Any, batch_size: int, length: int) -> Callable[[], float]:
    """A function that takes one step (AdamW, the Trainer's clipping) and returns the loss; its data are the same for all."""
    import torch

    generator = torch.Generator().manual_seed(0)
    token_ids = torch.tensor(vocabulary.token_ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0)
    model.train()

    def step() -> float:
        ids = token_ids[torch.randint(0, len(token_ids), (batch_size, length), generator=generator)]
        labels = torch.randint(0, 2, (batch_size,), generator=generator)
        torch.manual_seed(0)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.item())

    return step


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    value = function()
    return time.perf_counter() - start, value


def remapping_seconds(shrunk: Any, vocabulary: Any, batch_size: int, length: int, rounds: int = 200) -> float:
    """What the lookup takes beyond looking the same partial ids up directly: the median difference."""
    import torch
    import torch.nn.functional as F

    table = shrunk.bert.embeddings.word_embeddings
    ids = torch.tensor(vocabulary.token_ids)[torch.randint(0, len(vocabulary), (batch_size, length))]
    partial_ids = vocabulary.to_partial(ids)
    differences = []
    for _ in range(rounds):
        remapped, _ = timed(lambda: table(ids))
        direct, _ = timed(lambda: F.embedding(partial_ids, table.weight, table._partial_padding_idx))
        differences.append(remapped - direct)
    return statistics.median(differences)


def main(arguments: list[str] | None = None) -> list[Figure]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="xlm-r-base")
    parser.add_argument("--pairs", type=int, help="interleaved pairs of steps")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    case = CASES[options.case]
    full, shrunk, vocabulary = build(case)
    steps = [stepper(model, vocabulary, options.batch_size, options.length) for model in (full, shrunk)]
    seconds: list[tuple[float, float]] = []
    for pair in range(-2, options.pairs or case["pairs"]):  # two to warm up
        order = (0, 1) if pair % 2 else (1, 0)
        found: dict[int, tuple[float, float]] = {each: timed(steps[each]) for each in order}
        assert found[0][1] == found[1][1], f"losses differ: {found}"
        if pair >= 0:
            seconds.append((found[0][0], found[1][0]))
    ratios = [partial / whole for whole, partial in seconds]
    low, high = median_interval(ratios)
    step_seconds = statistics.median(partial for _, partial in seconds)
    share = remapping_seconds(shrunk, vocabulary, options.batch_size, options.length) / step_seconds
    figures = [
        Figure("partial / full, median of the pairs' ratios", statistics.median(ratios), "", case["bar"]),
        Figure("the ratio's 95 % interval reaches down to", low, "", None if case["bar"] else 1.02),
        Figure("the ratio's 95 % interval reaches up to", high, ""),
        Figure("remapping alone, share of a step", 100 * share, "%", 0.5),
        Figure("a step with the full vocabulary, median", statistics.median(whole for whole, _ in seconds), "s"),
        Figure("a step with the partial vocabulary, median", step_seconds, "s"),
        Figure("pairs, all of equal losses", len(seconds), ""),
    ]
    show(
        f"A training step: {options.case}, {case['kept']:,} of {case['rows']:,} rows",
        figures,
        options.json,
        seconds=seconds,
    )
    return figures


if __name__ == "__main__":
    main()
