"""Adapters of peft, put on before and after shrinking; what is saved loads on the full base."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from doors import models, pairs
from doors.registry import Outcome, door
from doors.trainer import CLOSE, FROZEN, train
from leanvocab.model.shrink import merge_
from leanvocab.model.status import status

NEEDS: dict[str, Any] = {"needs": "peft", "pip": "'leanvocab[peft]'"}
Adapt = Callable[[nn.Module], nn.Module]


def lora(**options: Any) -> Adapt:
    """Puts LoRA on, the same at each call."""
    import peft

    options = {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1, "init_lora_weights": "gaussian"} | options
    return adapter(peft.LoraConfig, **options)


def adapter(config: Any, **options: Any) -> Adapt:
    """Puts an adapter on, the same at each call."""
    import peft

    def adapt(model: nn.Module) -> nn.Module:
        torch.manual_seed(3)
        task = "CAUSAL_LM" if hasattr(model, "lm_head") else "SEQ_CLS"
        wrapped: nn.Module = peft.get_peft_model(model, config(task_type=task, **copy.deepcopy(options)))  # type: ignore[arg-type]
        return wrapped

    return adapt


def adapted(order: str | None, adapt: Adapt, family: str, output: str | None = None) -> nn.Module:
    """A model with an adapter, shrunk "before" or "after" it is put on, or not at all."""
    model = models.make_model(family)
    if order == "before":
        models.lean(model, output=output)
    model = adapt(model)
    if order == "after":
        models.lean(model, output=output)
    return model


@pairs.one_thread
def pair(
    folder: Path,
    adapt: Adapt,
    order: str = "before",
    family: str = "llama",
    output: str | None = None,
    *,
    tables: int = 1,
    reloaded: float = 0.0,
    **options: Any,
) -> Outcome:
    """Trains, saves the adapter, loads it on the full base, merges the table, merges the adapter: each is compared."""
    options = {"task": task_of(family)} | options
    within = FROZEN if output == "frozen" else reloaded
    runs = []
    for name, each in (("full", None), ("lean", order)):
        model = adapted(each, adapt, family, output)
        if output == "frozen" and each is None:
            models.masked(model)
        run = train(model, folder / name, **options)
        run.tensors |= on_the_full_base(model, models.make_model(family), folder / name / "final", within)
        run.tensors |= _merged(model)
        runs.append(run)
    return pairs.compare(*runs, models.left_out(tables))


def task_of(family: str) -> str:
    return "classification" if family == "llama" else "causal-lm"


def on_the_full_base(trained: nn.Module, base: nn.Module, saved: Path, within: float = 0.0) -> dict[str, torch.Tensor]:
    """Logits of the trained model, and of the full base with the adapter that it saved: the same, or something is lost.

    An adapter that lacks tensors loads with a warning alone, and two runs that both lack them would compare equal.
    """
    from peft import PeftModel

    own, loaded = logits_of(trained), logits_of(PeftModel.from_pretrained(base, saved))
    own = own.where(own != -torch.inf, loaded)  # restricted: the columns that there are
    apart = pairs.relative_difference(own, loaded)
    assert apart <= within, f"the full base with the adapter is {apart:.1e} apart from the trained model"
    return {"logits of the trained model": own, "logits of the full base": loaded}


def logits_of(model: Any) -> torch.Tensor:
    """In evaluation mode, and without the autocast that the Trainer has left around the forward."""
    from accelerate.utils import extract_model_from_parallel

    with torch.no_grad():
        logits = extract_model_from_parallel(model, keep_fp32_wrapper=False).eval()(models.token_rows(4)).logits
        return logits.clone()  # type: ignore[no-any-return]


def _merged(model: Any) -> dict[str, torch.Tensor]:
    """Tensors after merging table and adapter, where the adapter can be merged: in the order that is right for it."""
    if not hasattr(model, "merge_and_unload") or model.active_peft_config.is_prompt_learning:
        return {}
    if status(model) and _is_on_a_table(model):
        merge_(model)
    merged = model.merge_and_unload()
    if status(merged):
        merge_(merged)
    return {f"merged {name}": tensor for name, tensor in pairs.state_of(merged).items()}


def _is_on_a_table(model: nn.Module) -> bool:
    return any(hasattr(each, "base_layer") and hasattr(each.base_layer, "table") for each in model.modules())


def _both_orders(combined: str, name: str, make: Callable[[], Adapt], **rest: Any) -> None:
    """Registers a door for shrinking before the adapter is put on, and one for shrinking after it."""
    for order in ("before", "after"):
        _one_order(combined, name, make, order, **rest)


def _one_order(combined: str, name: str, make: Callable[[], Adapt], order: str, **rest: Any) -> None:
    how = {each: rest.pop(each) for each in ("family", "output", "tables", "reloaded", "train") if each in rest}
    options = how.pop("train", dict)

    def run(folder: Path) -> Outcome:
        return pair(folder, make(), order, **how, **options())

    run.__module__ = __name__
    door(f"{combined}, shrunk {order} it", name=f"{name}_{order}", **NEEDS | rest)(run)


def _peft() -> Any:
    import peft

    return peft


_both_orders("peft LoRA", "lora", lora)
_both_orders("peft DoRA", "dora", lambda: lora(use_dora=True))
_both_orders("peft LoRA on all linear layers", "all_linear", lambda: lora(target_modules="all-linear"))
_both_orders(
    "peft LoRA with modules_to_save=[embedding]", "modules_to_save", lambda: lora(modules_to_save=["embed_tokens"])
)
_both_orders(
    "peft LoRA on the embedding itself", "lora_on_embedding", lambda: lora(target_modules=["q_proj", "embed_tokens"])
)
_both_orders(
    "peft IA³",
    "ia3",
    lambda: adapter(_peft().IA3Config, target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
)
_both_orders("peft prompt tuning", "prompt", lambda: adapter(_peft().PromptTuningConfig, num_virtual_tokens=4))
_both_orders("peft prefix tuning", "prefix", lambda: adapter(_peft().PrefixTuningConfig, num_virtual_tokens=4))
_both_orders("peft P-tuning", "p_tuning", lambda: adapter(_peft().PromptEncoderConfig, num_virtual_tokens=4))
_both_orders(
    "peft LoRA, bf16 autocast and gradient checkpointing",
    "lora_bf16",
    lora,
    train=lambda: {"bf16": True, "gradient_checkpointing": True},
)
_both_orders('peft LoRA, causal language model, untied (output="full")', "causal", lora, family="llama-untied")
_both_orders(
    'peft LoRA, causal language model, tied (output="frozen")',
    "causal_tied",
    lora,
    family="llama-tied",
    output="frozen",
    **CLOSE,
)
_both_orders(
    'peft LoRA with modules_to_save=[embedding, output layer], untied (output="frozen")',
    "causal_modules_to_save",
    lambda: lora(modules_to_save=["embed_tokens", "lm_head"]),
    family="llama-untied",
    output="frozen",
    tables=2,
    **CLOSE,
)
_both_orders(
    'peft LoRA on the output layer, untied (output="full")',
    "lora_on_output",
    lambda: lora(target_modules=["q_proj", "lm_head"]),
    family="llama-untied",
)
_both_orders(
    'peft LoRA on the output layer, untied (output="frozen")',
    "lora_on_frozen_output",
    lambda: lora(target_modules=["q_proj", "lm_head"]),
    family="llama-untied",
    output="frozen",
    tables=2,
    **CLOSE,
)


# --- tied weights, and adapters on the table itself -------------------------------------------------------------------

_TIED: dict[str, Any] = {"family": "llama-tied", "output": "frozen", **CLOSE}
_both_orders(
    'peft LoRA with modules_to_save=[embedding], tied (output="frozen")',
    "tied_modules_to_save",
    lambda: lora(modules_to_save=["embed_tokens"]),
    **_TIED,
)
_both_orders(
    'peft LoRA with modules_to_save=[embedding, output layer], tied (output="frozen")',
    "tied_modules_to_save_both",
    lambda: lora(modules_to_save=["embed_tokens", "lm_head"]),
    **_TIED,
)
_both_orders(
    'peft LoRA with modules_to_save=[output layer], tied (output="frozen")',
    "tied_modules_to_save_output",
    lambda: lora(modules_to_save=["lm_head"]),
    fast=False,
    **_TIED,
)
_both_orders(
    'peft LoRA on the embedding itself, tied (output="frozen")',
    "tied_lora_on_embedding",
    lambda: lora(target_modules=["q_proj", "embed_tokens"]),
    fast=False,
    **_TIED,
)
_both_orders(
    'peft LoRA on the embedding itself, tied (output="frozen"), ensure_weight_tying',
    "tied_lora_on_both",
    lambda: lora(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
    fast=False,
    **_TIED,
)


# --- further adapters -------------------------------------------------------------------------------------------------


def _allocates() -> dict[str, Any]:
    """AdaLoRA gives its ranks away after each step, which the training loop has to ask for."""
    import transformers as hf

    class Allocate(hf.TrainerCallback):  # type: ignore[misc]
        def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
            model.base_model.update_and_allocate(state.global_step + 1)

    return {"callbacks": [Allocate()]}


_TARGETS: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
_SCHEDULE: dict[str, Any] = {"init_r": 8, "target_r": 4, "tinit": 1, "tfinal": 1, "deltaT": 1, "total_step": 6}
_one_order(
    "peft AdaLoRA",
    "adalora",
    lambda: adapter(_peft().AdaLoraConfig, **_TARGETS | _SCHEDULE),
    "before",
    train=_allocates,
    reloaded=1e-6,  # what is saved lacks the pruned ranks, so that its sums are shorter: without leanvocab too
)
_one_order("peft LoHa", "loha", lambda: adapter(_peft().LoHaConfig, **_TARGETS), "before")
for _name, _config, _options in (
    ("LoKr", "LoKrConfig", _TARGETS),
    ("VeRA", "VeraConfig", {"target_modules": ["q_proj", "o_proj"], "r": 8}),  # takes layers of one shape alone
    ("OFT", "OFTConfig", _TARGETS),
    ("BOFT", "BOFTConfig", _TARGETS),
):

    def _make(config: str = _config, options: dict[str, Any] = _options) -> Adapt:
        return adapter(getattr(_peft(), config), **options)

    _one_order(f"peft {_name}", _name.lower(), _make, "before", fast=False)


# --- several adapters, and going on with one --------------------------------------------------------------------------


@door("two adapters of peft on one model, trained in turn (add_adapter, set_adapter), each saved", fast=False, **NEEDS)
def two_adapters(folder: Path) -> Outcome:
    return _two_adapters(folder, "llama")


@door(
    'two adapters of peft on one model, each with modules_to_save=[embedding], tied (output="frozen")',
    fast=False,
    **NEEDS,
    **CLOSE,
)
def two_adapters_tied(folder: Path) -> Outcome:
    return _two_adapters(folder, "llama-tied", "frozen", modules_to_save=["embed_tokens"])


@pairs.one_thread
def _two_adapters(folder: Path, family: str, output: str | None = None, **options: Any) -> Outcome:
    """The first trains, then the second, then the first again; what is saved holds both."""
    import peft

    runs = []
    for name, order in (("full", None), ("lean", "before")):
        model: Any = adapted(order, lora(**options), family, output)
        torch.manual_seed(4)
        second = {"r": 4, "target_modules": ["k_proj"], "init_lora_weights": "gaussian"} | options
        model.add_adapter("second", peft.LoraConfig(task_type=model.peft_config["default"].task_type, **second))
        run = pairs.Run()
        for turn, each in enumerate(("default", "second", "default")):
            model.set_adapter(each)
            if order is None and output == "frozen":
                models.masked(model)  # what trains now
            trained = train(model, folder / name / str(turn), task=task_of(family), max_steps=3)
            run.losses += trained.losses
            run.held_bytes = max(run.held_bytes, trained.held_bytes)
        run.folder, run.tensors = folder / name / "2" / "final", trained.tensors
        for each, saved in (("default", run.folder), ("second", run.folder / "second")):
            model.set_adapter(each)
            found = on_the_full_base(model, models.make_model(family), saved, FROZEN if output else 0.0)
            run.tensors |= {f"{each}: {what}": logits for what, logits in found.items()}
        runs.append(run)
    return pairs.compare(*runs, models.left_out())


@door("peft LoRA, saved and loaded in the middle of a run (from_pretrained, is_trainable=True), shrunk before", **NEEDS)
def continued_before(folder: Path) -> Outcome:
    return _continued(folder, "before", lora())


@door(
    "peft LoRA, saved and loaded in the middle of a run (from_pretrained, is_trainable=True), shrunk after",
    fast=False,
    **NEEDS,
)
def continued_after(folder: Path) -> Outcome:
    return _continued(folder, "after", lora())


@door(
    'peft LoRA with modules_to_save=[embedding], saved and loaded in the middle of a run, tied (output="frozen")',
    **NEEDS,
    **CLOSE,
)
def continued_tied(folder: Path) -> Outcome:
    return _continued(folder, "before", lora(modules_to_save=["embed_tokens"]), "llama-tied", "frozen")


@pairs.one_thread
def _continued(folder: Path, order: str, adapt: Adapt, family: str = "llama", output: str | None = None) -> Outcome:
    """Three steps, and three with what the ordinary run had saved by then, on a new base, shrunk or not."""
    from peft import PeftModel

    def load(model: nn.Module) -> nn.Module:
        return PeftModel.from_pretrained(model, folder / "full" / "first" / "final", is_trainable=True)  # type: ignore[arg-type]

    runs = []
    for name, each in (("full", None), ("lean", order)):
        parts = []
        for part, put_on in (("first", adapt), ("second", load)):
            model = adapted(each, put_on, family, output)
            if output == "frozen" and each is None:
                models.masked(model)
            parts.append(train(model, folder / name / part, task=task_of(family), max_steps=3))
        first, run = parts
        run.losses, run.folder = first.losses + run.losses, folder / name
        saved = folder / name / "second" / "final"
        run.tensors |= on_the_full_base(model, models.make_model(family), saved, FROZEN if output else 0.0)
        runs.append(run)
    return pairs.compare(*runs, models.left_out())


_both_orders(
    "peft LoRA, tables for each layer (Gemma 4)",
    "lora_per_layer",
    lora,
    family="gemma4-untied",
    output="full",
    tables=3,
)


# --- trainable tokens -------------------------------------------------------------------------------------------------

_SINCE = "their first rows were taken of the partial table by full ids; put them on before shrinking"
_OUTPUT = "they write rows over a matrix that the output layer holds, all rows of which are scored"


def _tokens() -> Adapt:
    return adapter(_peft().TrainableTokensConfig, **_TOKENS)


def _lora_with_tokens() -> Adapt:
    return lora(trainable_token_indices={"embed_tokens": [5, 9]})


for _combined, _name, _make in (
    ("peft trainable tokens", "trainable_tokens", _tokens),
    ("peft LoRA with trainable_token_indices", "lora_with_tokens", _lora_with_tokens),
):
    _one_order(_combined, _name, _make, "after")

    def put_on_since(folder: Path, make: Callable[[], Adapt] = _make) -> Outcome:
        return _refused("before", make, folder)

    put_on_since.__module__ = __name__
    door(
        f"{_combined}, shrunk before it",
        name="_".join((_name, "before")),
        expects="refused",
        refuses="BypassError",
        why=_SINCE,
        **NEEDS,
    )(put_on_since)


@door(
    "peft trainable tokens on a tied language model, shrunk after it",
    expects="refused",
    refuses="BypassError",
    why=_OUTPUT,
    **NEEDS,
)
def trainable_tokens_tied(folder: Path) -> Outcome:
    return _refused("after", _tokens, folder, "llama-tied")


_TOKENS: dict[str, Any] = {"token_indices": [5, 9], "target_modules": ["embed_tokens"]}


def _refused(order: str, make: Callable[[], Adapt], folder: Path, family: str = "llama") -> Outcome:
    return pairs.refused(lambda: train(adapted(order, make(), family), folder, task=task_of(family)))


@door(
    "peft LoRA with modules_to_save=[embedding] and ensure_weight_tying, tied, shrunk before it",
    expects="refused",
    refuses="a Linear was given the partial weight of model.embed_tokens",
    why="peft makes an output layer of its own of the partial rows; both matrices named in modules_to_save train as ever",
    **NEEDS,
)
def tied_by_peft(folder: Path) -> Outcome:
    tying = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    return _refused("before", lambda: lora(**tying), folder, "llama-tied")


@door(
    "peft DoRA on the embedding itself, shrunk after it",
    expects="refused",
    refuses="BypassError",
    why="DoRA's norms are of the weight itself with an update of all rows",
    **NEEDS,
)
def dora_on_embedding_after(folder: Path) -> Outcome:
    return _refused("after", lambda: lora(use_dora=True, target_modules=["q_proj", "embed_tokens"]), folder)


@door("the kept rows as an adapter of peft's trainable tokens (export_trainable_tokens)", **NEEDS)
@pairs.one_thread
def exported_tokens(folder: Path) -> Outcome:
    """Ordinary training of the table alone, beside the full base with the adapter that the shrunk run exported."""
    from peft import PeftModel

    from leanvocab.adapters.exporting import export_trainable_tokens

    models.make_model("llama").save_pretrained(folder / "base")
    runs = []
    for name in ("full", "lean"):
        model: Any = type(models.make_model("llama")).from_pretrained(folder / "base")
        model.requires_grad_(False).get_input_embeddings().requires_grad_(True)
        if name == "lean":
            models.lean(model)
        run = train(model, folder / name)
        run.folder, run.tensors = None, {}
        if name == "lean":
            export_trainable_tokens(model, folder / "adapter", base=folder / "base")
            model = PeftModel.from_pretrained(type(model).from_pretrained(folder / "base"), folder / "adapter")
        with torch.no_grad():
            run.tensors["logits"] = model.eval()(models.token_rows(4)).logits
        runs.append(run)
    return pairs.compare(*runs, models.left_out())


@door(
    "merging peft LoRA on the embedding while the table is shrunk",
    expects="refused",
    refuses="call leanvocab.merge_(model) first",
    why="the adapter's update has all rows, the table has not",
    **NEEDS,
)
def merging_too_early(folder: Path) -> Outcome:
    model: Any = adapted("before", lora(target_modules=["q_proj", "embed_tokens"]), "llama")
    train(model, folder)
    return pairs.refused(model.merge_and_unload)
