"""Optimizers that save memory, or that are no Adam: row-separable or not, as it is measured."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from doors import models, pairs
from doors.registry import Outcome, Verdict, door
from doors.trainer import GPU_SUMS, train
from leanvocab.errors import LeanVocabWarning

_BITS: dict[str, Any] = {"needs": "bitsandbytes", "pip": "'leanvocab[quantization]'"}
# torchao compiles its step, which takes long where nothing is cached yet.
_AO: dict[str, Any] = {"needs": "torchao", "pip": "'leanvocab[quantization]'", "fast": False}
_GPU: dict[str, Any] = {"gpu": True, "within": 1e-2}
_UNPAGED = "bitsandbytes, paged; on a CPU it does not page"
_SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
_BLOCKS = "blocks of states share a scale, and leaving rows out moves the blocks' borders"
_FACTORED = "its second moment is factored over rows and columns, and its step is clipped by the whole matrix's"


@pairs.one_thread
def pair(
    folder: Path,
    make: Callable[[nn.Module], Any] | None,
    width: int = models.DIM,
    one_each: bool = False,
    **options: Any,
) -> Outcome:
    """A classifier trained by an optimizer, with leanvocab and without; whether leanvocab announces it is said, too.

    `one_each`: each parameter has an optimizer of its own, so that no step sees all states, and none can say what is held.
    """
    import warnings

    runs, on_gpu = [], not options.get("use_cpu", True)
    for name in ("full", "lean"):
        model = models.make_model("roberta", hidden_size=width)
        if name == "lean":
            models.lean(model)
        given = {} if make is None else {"optimizers": (make(model), None)}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run = train(model, folder / name, **given, **{"learning_rate": 1e-2} | options)
        runs.append(run)
    announced = any(issubclass(each.category, LeanVocabWarning) for each in caught)
    outcome = pairs.compare(*runs, None if one_each else models.left_out() * width // models.DIM)
    said = "announced before the first step" if announced else "nothing is announced"
    if announced == (outcome.verdict == "identical" or on_gpu):  # whose sums differ, whatever the optimizer
        raise AssertionError(f"{outcome.verdict}, and {said}")  # an announcement that is wrong, or one that lacks
    return Outcome(outcome.verdict, f"{outcome.detail}; {said}", outcome.difference, outcome.saved_per_element)


def named(
    combined: str,
    optim: str,
    expects: Verdict = "identical",
    why: str = "",
    name: str = "",
    needs: Any = None,
    **options: Any,
) -> None:
    """Registers a door for a name that TrainingArguments(optim=…) knows."""
    run = functools.partial(pair, make=None, optim=optim, **options)
    run.__module__ = __name__  # type: ignore[attr-defined]
    door(combined, expects=expects, why=why, name=name or optim, **needs or {})(run)


def _paged(trainer: Any) -> dict[str, bool]:
    """bitsandbytes pages states of 100,000 elements and more, the partial table's among them."""
    optimizer, table = trainer.optimizer.optimizer, trainer.model.get_input_embeddings().weight
    large = [each for each in optimizer.state if each.numel() >= 1e5]
    assert any(each is table for each in large), f"a table of {table.numel():,} elements"
    assert all(getattr(optimizer.state[each]["state1"], "is_paged", False) for each in large)
    return {"paged": True}


named("SGD", "sgd", learning_rate=1e-1)
named("AdamW, not fused", "adamw_torch")
named("Adagrad", "adagrad")
named("RMSprop", "rmsprop")
named("Adafactor (transformers)", "adafactor", "different", _FACTORED)
for optim, combined in {
    "adamw_8bit": "AdamW in 8 bits (bitsandbytes; the Trainer keeps embedding states in 32)",
    "paged_adamw_8bit": f"AdamW in 8 bits ({_UNPAGED})",
    "paged_adamw_32bit": f"AdamW ({_UNPAGED})",
    "lion_8bit": "Lion in 8 bits (bitsandbytes)",
    "lion_32bit": "Lion (bitsandbytes)",
    "paged_lion_8bit": f"Lion in 8 bits ({_UNPAGED})",
    "paged_lion_32bit": f"Lion ({_UNPAGED})",
    "rmsprop_bnb": "RMSprop (bitsandbytes)",
    "rmsprop_bnb_8bit": "RMSprop in 8 bits (bitsandbytes)",
    "rmsprop_bnb_32bit": "RMSprop in 32 bits (bitsandbytes)",
}.items():
    named(combined, optim, needs=_BITS | {"fast": optim in ("adamw_8bit", "lion_8bit", "rmsprop_bnb")}, **_SAVING)
named("AdamW in 8 bits (torchao)", "adamw_torch_8bit", "different", _BLOCKS, needs=_AO, **_SAVING)
named("AdamW in 4 bits (torchao)", "adamw_torch_4bit", "different", _BLOCKS, needs=_AO, **_SAVING)
for bits in (8, 4):  # the Trainer asks for blocks of 256 elements: a row of as many is one
    named(
        f"AdamW in {bits} bits (torchao), a width of 256, of which blocks are whole rows",
        f"adamw_torch_{bits}bit", name=f"adamw_torch_{bits}bit_wide", needs=_AO, width=256,
    )  # fmt: skip
for bits in (32, 8):
    named(
        f"paged AdamW in {bits} bits (bitsandbytes), on a GPU", f"paged_adamw_{bits}bit", "close", GPU_SUMS,
        name=f"paged_adamw_{bits}bit_gpu", needs=_BITS | _GPU, use_cpu=False, width=2048, learning_rate=1e-3,
        after=_paged, **_SAVING,
    )  # fmt: skip


def by_hand(
    combined: str,
    name: str,
    expects: Verdict = "identical",
    why: str = "",
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Registers a function that makes an optimizer for a model; `settings` are `pair`'s."""

    def register(make: Callable[[nn.Module], Any]) -> Callable[[nn.Module], Any]:
        run = functools.partial(pair, make=make, **settings or {})
        run.__module__ = __name__  # type: ignore[attr-defined]
        door(combined, expects=expects, why=why, name=name, **options)(run)
        return make

    return register


@by_hand("AdamW with states in fp8 (torchao)", "torchao_fp8", "different", _BLOCKS, **_AO)
def _(model: nn.Module) -> Any:
    import torchao

    return torchao.optim.AdamWFp8(model.parameters(), lr=1e-2, weight_decay=0.0)


@by_hand(
    "AdamW in 4 bits (torchao), its own blocks of 128, a width of 128",
    "torchao_4bit_wide",
    settings={"width": 128},
    **_AO,
)
def _(model: nn.Module) -> Any:
    import torchao

    return torchao.optim.AdamW4bit(model.parameters(), lr=1e-2, weight_decay=0.0)


@by_hand(
    "AdamW on the host (torchao's CPUOffloadOptimizer)",
    "torchao_cpu_offload",
    "close",
    GPU_SUMS,
    settings={"use_cpu": False, "one_each": True},
    **_AO | _GPU,
)
def _(model: nn.Module) -> Any:
    import torch
    import torchao

    on_device = model.cuda().parameters()  # as the Trainer would: its hooks are hooks of these
    return torchao.optim.CPUOffloadOptimizer(on_device, torch.optim.AdamW, lr=1e-2, weight_decay=0.0)


@by_hand("Adafactor (torch)", "torch_adafactor", "different", _FACTORED)
def _(model: nn.Module) -> Any:
    import torch

    return torch.optim.Adafactor(model.parameters(), lr=1e-2, weight_decay=0.0)


@by_hand("Muon (torch) on matrices, AdamW on the rest", "muon", "different", "it orthogonalizes whole matrices")
def _(model: nn.Module) -> Any:
    import torch

    return torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=1e-2, weight_decay=0.0)


@by_hand("Muon (torch) on the layers' matrices alone", "muon_without_embeddings")
def _(model: nn.Module) -> Any:
    import torch

    table = model.get_input_embeddings().weight  # type: ignore[operator]
    return torch.optim.Muon(
        [p for p in model.parameters() if p.ndim == 2 and p is not table], lr=1e-2, weight_decay=0.0
    )


@by_hand(
    "GaLore AdamW, the embedding projected too",
    "galore",
    "different",
    "it projects on the matrix's own singular vectors",
    needs="galore-torch",
)
def _(model: nn.Module) -> Any:
    import galore_torch

    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    low_rank = {"params": matrices, "rank": 4, "update_proj_gap": 2, "scale": 0.25, "proj_type": "std"}
    return galore_torch.GaLoreAdamW(
        [{"params": others}, low_rank], lr=1e-2, weight_decay=0.0, no_deprecation_warning=True
    )


_GALORE = {"needs": "galore-torch"}
named(
    "GaLore AdamW on attention and MLP (transformers' way)",
    "galore_adamw",
    needs=_GALORE,
    optim_target_modules=["query", "dense"],
)
named(
    "GaLore Adafactor on attention and MLP",
    "galore_adafactor",
    "different",
    _FACTORED,
    needs=_GALORE,
    optim_target_modules=["query", "dense"],
)
named(
    "GaLore AdamW on attention and MLP, layer by layer (an optimizer a parameter)",
    "galore_adamw_layerwise",
    needs=_GALORE,
    optim_target_modules=["query", "dense"],
    one_each=True,
)
for optim, combined in {
    "schedule_free_adamw": "schedule-free AdamW",
    "schedule_free_radam": "schedule-free RAdam",
    "schedule_free_sgd": "schedule-free SGD",
}.items():
    fast = optim == "schedule_free_adamw"
    named(combined, optim, needs={"needs": "schedulefree", "fast": fast}, lr_scheduler_type="constant", **_SAVING)


def stacked(combined: str, optim: str) -> None:
    """Registers a door for an optimizer that keeps two momenta in one tensor."""

    def run(folder: Path) -> Outcome:
        return pairs.refused(lambda: pair(folder, None, optim=optim))

    why = "two momenta are stacked in one tensor, which has no rows to take"
    fast = optim == "ademamix_8bit"
    door(combined, expects="refused", refuses="keeps 2 matrices in one state", why=why, name=optim, fast=fast, **_BITS)(
        run
    )


stacked("AdEMAMix (bitsandbytes)", "ademamix")
stacked("AdEMAMix in 8 bits (bitsandbytes)", "ademamix_8bit")
stacked(f"AdEMAMix ({_UNPAGED})", "paged_ademamix_32bit")
stacked(f"AdEMAMix in 8 bits ({_UNPAGED})", "paged_ademamix_8bit")


@door(
    "AdamW in 8 bits, embedding states too (bitsandbytes without the Trainer's override)",
    expects="refused",
    refuses="Keep them in 32 bits, as the Trainer does",
    why="its scales go by blocks, not by rows, so that states cannot be saved in full",
    **_BITS,
)
def bnb_8bit_everywhere(folder: Path) -> Outcome:
    def make(model: nn.Module) -> Any:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(model.parameters(), lr=1e-2, weight_decay=0.0)

    return pairs.refused(lambda: pair(folder, make))


@door("AdamW in 8 bits, embedding states in 32 by an override (bitsandbytes)", **_BITS)
def bnb_override(folder: Path) -> Outcome:
    def make(model: Any) -> Any:
        import bitsandbytes

        manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
        manager.register_module_override(model.get_input_embeddings(), "weight", {"optim_bits": 32})
        return bitsandbytes.optim.AdamW8bit(model.parameters(), lr=1e-2, weight_decay=0.0)

    return pair(folder, make)
