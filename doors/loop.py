"""A plain loop of torch in one process."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from doors import models, pairs
from doors.registry import Outcome, Verdict, door
from doors.trainer import APART, FROZEN

_APART_HALF = f"{APART}; logits are rounded to 16 bits in other places"


def train(
    model: nn.Module,
    folder: Path,
    *,
    task: str = "classification",
    autocast: torch.dtype | None = None,
    clip: bool = False,
    average: bool = False,
    learning_rate: float = 1e-2,
) -> pairs.Run:
    """Six steps of AdamW; losses, norms and scales, all tensors, and what `save_pretrained` writes."""
    rows, run = models.examples(task), pairs.Run(folder=folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    scaler = torch.amp.GradScaler("cpu", enabled=autocast is torch.float16, growth_factor=16.0, growth_interval=2)
    mean = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)) if average else None
    norms, scales = [], []
    model.train()
    torch.manual_seed(0)  # dropout
    with pairs.held_bytes(run, model):
        for step in range(6):
            chosen = [rows[(4 * step + offset) % len(rows)] for offset in range(4)]
            batch = {name: torch.stack([row[name] for row in chosen]) for name in chosen[0]}
            with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                loss = model(**batch).loss
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            if clip:
                norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.1)))
            scaler.step(optimizer)
            scaler.update()
            run.losses.append(loss.item())
            scales.append(scaler.get_scale())
            if mean is not None:
                mean.update_parameters(model)
    run.others |= {"norms": norms, "scales": scales}
    assert not scaler.is_enabled() or sorted(scales) != scales, "a step that overflows, and is left out"
    run.tensors = pairs.state_of(model)
    model.save_pretrained(folder / "final")  # type: ignore[operator]
    if mean is not None:
        run.tensors |= {f"mean.{name}": each for name, each in pairs.state_of(mean).items()}
        mean.module.save_pretrained(folder / "mean")  # type: ignore[operator]
    return run


@pairs.one_thread
def pair(folder: Path, family: str, output: str | None, **options: Any) -> Outcome:
    """The same loop on the full model and on the shrunk one; for frozen rows the reference masks their gradients."""
    reference = models.make_model(family)
    if output == "frozen":
        models.masked(reference)
    full = train(reference, folder / "full", **options)
    lean = train(models.lean(models.make_model(family), output=output), folder / "lean", **options)
    return pairs.compare(full, lean, models.left_out())


_WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32": ("AdamW", {}),
    "fp16": ("fp16 autocast and a gradient scaler", {"autocast": torch.float16}),
    "bf16": ("bf16 autocast", {"autocast": torch.bfloat16}),
    "clipped": ("gradients clipped by their norm", {"clip": True}),
    "averaged": ("AveragedModel, an exponential mean", {"average": True}),
}


def rows(family: str, called: str, output: str | None = None, task: str = "classification") -> None:
    """Registers a door for each way to train a model of a family."""
    for way, (combined, options) in _WAYS.items():
        half, tied = "autocast" in options, output == "frozen"
        own = options | {"task": task} | ({"learning_rate": 1e-3} if half and tied else {})
        expects: Verdict = "close" if tied else "identical"
        why = (_APART_HALF if half else APART) if tied else ""

        def run(folder: Path, own: dict[str, Any] = own) -> Outcome:
            return pair(folder, family, output, **own)  # type: ignore[no-any-return]

        door(
            f"a plain loop, one process: {called}, {combined}", expects=expects, within=5e-2 if half else FROZEN, why=why,
            name=f"{family.replace('-', '_')}_{way}",
        )(run)  # fmt: skip


rows("roberta", "an encoder that classifies")
rows("llama", "a decoder that classifies")
rows("llama-tied", 'a tied causal language model (output="frozen")', "frozen", "causal-lm")
