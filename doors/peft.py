"""Adapters of peft, put on before and after shrinking; what is saved loads on the full base."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from doors import models, pairs
from doors.registry import Outcome, door
from doors.trainer import APART, FROZEN, train
from leanvocab.model import merge_, status

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
    folder: Path, adapt: Adapt, order: str = "before", family: str = "llama", output: str | None = None, **options: Any
) -> Outcome:
    """Trains, saves the adapter, loads it on the full base, merges the table, merges the adapter: each is compared."""
    options = {"task": "classification" if family == "llama" else "causal-lm"} | options
    runs = []
    for name, each in (("full", None), ("lean", order)):
        model = adapted(each, adapt, family, output)
        if output == "frozen" and each is None:
            models.mask_gradients(model)
        run = train(model, folder / name, **options)
        run.tensors |= _on_the_full_base(folder / name / "final", family)
        run.tensors |= _merged(model)
        runs.append(run)
    return pairs.compare(*runs, models.left_out())


def _on_the_full_base(saved: Path, family: str) -> dict[str, torch.Tensor]:
    """Logits of the full base with the adapter that was saved."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(models.make_model(family), saved).eval()
    with torch.no_grad():
        return {"logits of the full base": model(models.token_rows(4)).logits}


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
    how = {each: rest.pop(each) for each in ("family", "output", "train") if each in rest}
    options = how.pop("train", {})
    for order in ("before", "after"):

        def run(folder: Path, order: str = order) -> Outcome:
            return pair(folder, make(), order, **how, **options)

        run.__module__ = __name__
        door(f"{combined}, shrunk {order} it", name=f"{name}_{order}", **NEEDS | rest)(run)


_CLOSE: dict[str, Any] = {"expects": "close", "within": FROZEN, "why": APART}


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
    train={"bf16": True, "gradient_checkpointing": True},
)
_both_orders('peft LoRA, causal language model, untied (output="full")', "causal", lora, family="llama-untied")
_both_orders(
    'peft LoRA, causal language model, tied (output="frozen")',
    "causal_tied",
    lora,
    family="llama-tied",
    output="frozen",
    **_CLOSE,
)
_both_orders(
    'peft LoRA with modules_to_save=[embedding, output layer], untied (output="frozen")',
    "causal_modules_to_save",
    lambda: lora(modules_to_save=["embed_tokens", "lm_head"]),
    family="llama-untied",
    output="frozen",
    **_CLOSE,
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
    **_CLOSE,
)


# --- trainable tokens -------------------------------------------------------------------------------------------------

_AROUND = "trainable tokens look ids up in the weight itself; leanvocab trains chosen rows without them"


@door("peft trainable tokens, shrunk after them", expects="refused", refuses="BypassError", why=_AROUND, **NEEDS)
def trainable_tokens_after(folder: Path) -> Outcome:
    return _refused("after", lambda: adapter(_peft().TrainableTokensConfig, **_TOKENS), folder)


@door("peft trainable tokens, shrunk before them", expects="refused", refuses="BypassError", why=_AROUND, **NEEDS)
def trainable_tokens_before(folder: Path) -> Outcome:
    return _refused("before", lambda: adapter(_peft().TrainableTokensConfig, **_TOKENS), folder)


@door(
    "peft LoRA with trainable_token_indices, shrunk before it",
    expects="refused",
    refuses="BypassError",
    why=_AROUND,
    **NEEDS,
)
def lora_with_tokens(folder: Path) -> Outcome:
    return _refused("before", lambda: lora(trainable_token_indices={"embed_tokens": [5, 9]}), folder)


_TOKENS: dict[str, Any] = {"token_indices": [5, 9], "target_modules": ["embed_tokens"]}


def _refused(order: str, make: Callable[[], Adapt], folder: Path) -> Outcome:
    return pairs.refused(lambda: train(adapted(order, make(), "llama"), folder))


@door("the kept rows as an adapter of peft's trainable tokens (export_trainable_tokens)", **NEEDS)
@pairs.one_thread
def exported_tokens(folder: Path) -> Outcome:
    """Ordinary training of the table alone, beside the full base with the adapter that the shrunk run exported."""
    from peft import PeftModel

    from leanvocab.adapters import export_trainable_tokens

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
