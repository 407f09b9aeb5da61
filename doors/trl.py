"""TRL: supervised fine-tuning, preferences, rewards, reinforcement."""

import copy
import importlib
from pathlib import Path
from typing import Any

from torch import nn

from doors import models, pairs
from doors.registry import SLOW, Outcome, door
from doors.trainer import APART
from leanvocab.model.status import status

_NEEDS = {"needs": ("trl",), "pip": "'leanvocab[trl]'"}
_NEEDS_PEFT = {"needs": ("trl", "peft"), "pip": "'leanvocab[trl,peft]'"}
_ROUNDING = f"TRL adds up its loss over pieces of the vocabulary, leanvocab's has whole rows of scores; {APART}"
_TEMPLATE = (
    "{% for m in messages %}{{ 'w0 ' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + ' w2 ' }}"
    "{% endgeneration %}{% else %}{{ 'w3 ' + m['content'] + ' w2 ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'w0 ' }}{% endif %}"
)


def tokenizer() -> Any:
    """A word for each id: "w17" is 17. A new one at each call: trainers change theirs."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(WordLevel({f"w{i}": i for i in range(models.FULL_SIZE)}, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="w0", pad_token="w1", eos_token="w2", unk_token="w3", model_max_length=64
    )
    made.chat_template = _TEMPLATE
    return made


def texts() -> list[str]:
    """The words of `models.token_rows`, without special ones."""
    return [" ".join(f"w{i}" for i in row if i > 3) for row in models.token_rows().tolist()]


def data(kind: str) -> Any:
    """Rows as TRL takes them: "text", "completion", "chat", "preference", "labelled", "prompt"."""
    import datasets

    words = [text.split() for text in texts()]
    prompts, replies = [" ".join(each[:4]) for each in words], [" ".join(each[4:]) for each in words]
    others = replies[1:] + replies[:1]
    if kind == "text":
        rows = [{"text": text} for text in texts()]
    elif kind == "completion":
        rows = [{"prompt": p, "completion": r} for p, r in zip(prompts, replies, strict=True)]
    elif kind == "chat":
        rows = [
            {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": r}]}
            for p, r in zip(prompts, replies, strict=True)
        ]
    elif kind == "preference":
        rows = [{"prompt": p, "chosen": r, "rejected": o} for p, r, o in zip(prompts, replies, others, strict=True)]
    elif kind == "labelled":
        rows = [
            {"prompt": p, "completion": r, "label": i % 2 == 0}
            for i, (p, r) in enumerate(zip(prompts, replies, strict=True))
        ]
    else:
        rows = [{"prompt": p} for p in prompts]
    return datasets.Dataset.from_list(rows)


def of_trl(name: str, kind: str) -> Any:
    """A trainer of TRL or its settings; those that it calls experimental have a package each."""
    import trl

    if hasattr(trl, f"{kind}Trainer"):
        return getattr(trl, f"{kind}{name}")
    return getattr(importlib.import_module(f"trl.experimental.{_EXPERIMENTAL[kind]}"), f"{kind}{name}")


_EXPERIMENTAL = {"ORPO": "orpo", "CPO": "cpo", "GKD": "gkd", "OnlineDPO": "online_dpo", "GMPO": "gmpo"}


def settings(kind: str, folder: Path, **options: Any) -> Any:
    """Four steps on a CPU, logged one by one, nothing saved."""
    defaults = {
        "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "report_to": [],
        "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "bf16": False, "gradient_checkpointing": False,
        "lr_scheduler_type": "constant", "seed": 5,
    }  # fmt: skip
    return of_trl("Config", kind)(str(folder), **defaults | options)


def train(
    kind: str, model: nn.Module, folder: Path, rows: str, *, extra: Any = None, masked: bool = False, **options: Any
) -> pairs.Run:
    """One run of a trainer of TRL on a model, shrunk or not; `masked`: rows outside the vocabulary get no gradient."""
    trainer = of_trl("Trainer", kind)(
        model=model, args=settings(kind, folder, **options), train_dataset=data(rows), processing_class=tokenizer(),
        **(extra(model) if extra else {}),
    )  # fmt: skip
    if masked:  # now that TRL has put the adapter on, copies that train are masked too
        models.masked(trainer.model)
    run = pairs.Run(folder=folder)
    with pairs.held_bytes(run, model):
        trainer.train()
    trainer.save_model(str(folder / "final"))
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    run.losses = [entry["loss"] for entry in history]
    names = ("entropy", "mean_token_accuracy", "rewards/margins", "logits/chosen", "kl", "reward", "margin")
    run.others = {f"{name} {i}": float(each[name]) for i, each in enumerate(history) for name in names if name in each}
    run.tensors = pairs.state_of(trainer.model)
    return run


@pairs.one_thread
def pair(
    folder: Path,
    kind: str = "SFT",
    family: str = "llama-tied",
    rows: str = "text",
    *,
    output: str | None = None,
    tables: int = 1,
    lean: Any = None,
    loaded: bool = False,
    **options: Any,
) -> Outcome:
    """The same settings on the full model and on the shrunk one; for frozen rows the reference masks their gradients.

    `loaded`: from a folder, from which TRL then loads its reference model.
    """
    frozen = family == "llama-tied" or output == "frozen"

    def made() -> nn.Module:
        model: Any = models.make_model(family)
        if not loaded:
            return model  # type: ignore[no-any-return]
        model.save_pretrained(folder / "base")
        return type(model).from_pretrained(folder / "base")  # type: ignore[no-any-return]

    full = train(kind, made(), folder / "full", rows, masked=frozen, **options)
    shrunk = models.lean(made(), output=output, **lean or {})
    partial = train(kind, shrunk, folder / "lean", rows, **options)
    return pairs.compare(full, partial, models.left_out(tables))


_CLOSE: Any = {"expects": "close", "within": 1e-3, "why": _ROUNDING, **_NEEDS}
_CLOSE_PEFT = {**_CLOSE, **_NEEDS_PEFT}
_CLOSE_LOGITS = {**_CLOSE, "why": APART}  # TRL asks for the logits too


@door('SFTTrainer, untied, output="full"', **_NEEDS)
def sft_untied(folder: Path) -> Outcome:
    return pair(folder, family="llama-untied")


@door('SFTTrainer, tied, output="frozen"', **_CLOSE)
def sft_tied(folder: Path) -> Outcome:
    return pair(folder)


@door('SFTTrainer, untied, output="frozen"', **_CLOSE, **SLOW)
def sft_untied_frozen(folder: Path) -> Outcome:
    return pair(folder, family="llama-untied", output="frozen", tables=2)


@door('SFTTrainer, tied, output="frozen", packing', **_CLOSE)
def sft_packing(folder: Path) -> Outcome:
    return pair(folder, packing=True, max_length=24)


@door('SFTTrainer, untied, output="full", packing ("wrapped")', **_NEEDS, **SLOW)
def sft_packing_untied(folder: Path) -> Outcome:
    return pair(folder, family="llama-untied", packing=True, packing_strategy="wrapped", max_length=24)


@door('SFTTrainer, tied, output="frozen", prompts with completions, completion-only loss', **_CLOSE)
def sft_completion(folder: Path) -> Outcome:
    return pair(folder, rows="completion")


@door('SFTTrainer, tied, output="frozen", chat template, assistant-only loss', **_CLOSE)
def sft_chat(folder: Path) -> Outcome:
    return pair(folder, rows="chat", assistant_only_loss=True)


@door('SFTTrainer, untied, output="full", chat template, assistant-only loss', **_NEEDS, **SLOW)
def sft_chat_untied(folder: Path) -> Outcome:
    return pair(folder, family="llama-untied", rows="chat", assistant_only_loss=True)


@door('SFTTrainer, tied, output="frozen", DFT loss', **_CLOSE, **SLOW)
def sft_dft(folder: Path) -> Outcome:
    return pair(folder, loss_type="dft")


@door('SFTTrainer, tied, output="frozen", gradient accumulation and checkpointing', **_CLOSE, **SLOW)
def sft_accumulation(folder: Path) -> Outcome:
    return pair(
        folder, gradient_accumulation_steps=2, per_device_train_batch_size=2, gradient_checkpointing=True, max_steps=3
    )


@door('SFTTrainer, tied, output="frozen", label smoothing (which makes the logits)', **_CLOSE_LOGITS, **SLOW)
def sft_smoothing(folder: Path) -> Outcome:
    return pair(folder, label_smoothing_factor=0.1)


@door('SFTTrainer, tied, output="frozen", bf16 autocast', **{**_CLOSE, "within": 2e-2}, **SLOW)
def sft_bf16(folder: Path) -> Outcome:
    return pair(folder, bf16=True, learning_rate=1e-3)


def _lora(model: nn.Module, **options: Any) -> dict[str, Any]:
    from peft import LoraConfig

    targets = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": "gaussian"}
    return {"peft_config": LoraConfig(task_type="CAUSAL_LM", **targets | options)}


def _lora_with_tables(model: nn.Module) -> dict[str, Any]:
    return _lora(model, modules_to_save=["embed_tokens", "lm_head"])


@door('SFTTrainer with peft_config (LoRA), tied, output="frozen"', **_CLOSE_PEFT)
def sft_lora(folder: Path) -> Outcome:
    return pair(folder, extra=_lora)


@door(
    'SFTTrainer with peft_config (LoRA with modules_to_save=[embedding, output layer]), tied, output="frozen"',
    **_CLOSE_PEFT,
    **SLOW,
)
def sft_lora_tables(folder: Path) -> Outcome:
    return pair(folder, extra=_lora_with_tables)


def _reference(model: Any) -> dict[str, Any]:
    reference = copy.deepcopy(model)
    if status(model):  # a second model costs no second copy of the full rows
        store = model.get_input_embeddings().table.store
        assert reference.get_input_embeddings().table.store is store, "the copy has full rows of its own"
    return {"ref_model": reference}


@door('DPOTrainer, tied, output="frozen", reference model a deep copy', **_CLOSE)
def dpo_tied(folder: Path) -> Outcome:
    return pair(folder, "DPO", rows="preference", extra=_reference)


@door('DPOTrainer, untied, output="full", reference model a deep copy', **_NEEDS)
def dpo_untied(folder: Path) -> Outcome:
    return pair(folder, "DPO", "llama-untied", rows="preference", extra=_reference)


@door('DPOTrainer, tied, output="frozen", reference log-probabilities computed before', **_CLOSE, **SLOW)
def dpo_precomputed(folder: Path) -> Outcome:
    return pair(folder, "DPO", rows="preference", extra=_reference, precompute_ref_log_probs=True)


# A margin of the first step lies near zero, where rounding is a larger part of it.
@door('DPOTrainer without ref_model (TRL loads it, whole), tied, output="frozen"', **_CLOSE | {"within": 5e-3})
def dpo_loaded(folder: Path) -> Outcome:
    return pair(folder, "DPO", rows="preference", loaded=True)


@door('DPOTrainer without ref_model (TRL loads it, whole), untied, output="full"', **_NEEDS, **SLOW)
def dpo_loaded_untied(folder: Path) -> Outcome:
    return pair(folder, "DPO", "llama-untied", rows="preference", loaded=True)


@door('DPOTrainer, tied, output="frozen", sync_ref_model, reference model a deep copy', **_CLOSE, **SLOW)
def dpo_synced(folder: Path) -> Outcome:
    syncs = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}
    return pair(folder, "DPO", rows="preference", extra=_reference, **syncs)


@door(
    'DPOTrainer without ref_model, tied, output="frozen", reference log-probabilities computed before',
    **_CLOSE,
    **SLOW,
)
def dpo_precomputed_itself(folder: Path) -> Outcome:
    return pair(folder, "DPO", rows="preference", precompute_ref_log_probs=True)


@door('DPOTrainer with peft_config (LoRA), tied, output="frozen"', **_CLOSE_PEFT, **SLOW)
def dpo_lora(folder: Path) -> Outcome:
    return pair(folder, "DPO", rows="preference", extra=_lora)


# Its logged means of logits lie near zero, where rounding is a larger part of them.
@door('KTOTrainer, tied, output="frozen", reference model a deep copy', **_CLOSE | {"within": 5e-3}, **SLOW)
def kto_tied(folder: Path) -> Outcome:
    return pair(folder, "KTO", rows="labelled", extra=_reference)


@door('ORPOTrainer (trl.experimental), tied, output="frozen"', **_CLOSE_LOGITS, **SLOW)
def orpo(folder: Path) -> Outcome:
    return pair(folder, "ORPO", rows="preference", max_length=32)


@door('CPOTrainer (trl.experimental), tied, output="frozen"', **_CLOSE_LOGITS, **SLOW)
def cpo(folder: Path) -> Outcome:
    return pair(folder, "CPO", rows="preference", max_length=32)


@door('CPOTrainer (trl.experimental), untied, output="full"', **_NEEDS, **SLOW)
def cpo_untied(folder: Path) -> Outcome:
    return pair(folder, "CPO", "llama-untied", rows="preference", max_length=32)


@door("RewardTrainer", **_NEEDS)
def reward(folder: Path) -> Outcome:
    @pairs.one_thread
    def run() -> Outcome:
        changes = {"num_labels": 1}
        full = train("Reward", models.make_model("llama", **changes), folder / "full", "preference")
        shrunk = models.lean(models.make_model("llama", **changes))
        return pairs.compare(full, train("Reward", shrunk, folder / "lean", "preference"), models.left_out())

    return run()


def _rewards(model: nn.Module) -> dict[str, Any]:
    return {"reward_funcs": lambda completions, **_: [float(len(each) % 5) for each in completions]}


def _rewarded_lora(model: nn.Module) -> dict[str, Any]:
    return _rewards(model) | _lora(model)


_GRPO: Any = {
    "num_generations": 2, "max_completion_length": 6, "per_device_train_batch_size": 4, "max_steps": 3, "beta": 0.0,
}  # fmt: skip


@door(
    "GRPOTrainer, tied: roll-outs emit ids that nobody counted",
    expects="refused",
    refuses="outside the partial vocabulary",
    why='an id that was not counted is an error in training mode; shrink_(…, on_missing="base") serves its row',
    **_NEEDS,
)
def grpo_missing(folder: Path) -> Outcome:
    model = models.lean(models.make_model("llama-tied"))
    return pairs.refused(lambda: train("GRPO", model, folder, "prompt", extra=_rewards, **_GRPO))


@door('GRPOTrainer, tied, output="frozen", on_missing="base"', **_CLOSE)
def grpo_served(folder: Path) -> Outcome:
    return pair(folder, "GRPO", rows="prompt", extra=_rewards, lean={"on_missing": "base"}, **_GRPO)


@door(
    'GRPOTrainer, tied, output="frozen", on_missing="base", a reference model (beta), which TRL loads',
    **_CLOSE,
    **SLOW,
)
def grpo_reference(folder: Path) -> Outcome:
    options = _GRPO | {"beta": 0.1}
    return pair(folder, "GRPO", rows="prompt", extra=_rewards, lean={"on_missing": "base"}, loaded=True, **options)


@door('GRPOTrainer with peft_config (LoRA), tied, output="frozen", on_missing="base"', **_CLOSE_PEFT, **SLOW)
def grpo_lora(folder: Path) -> Outcome:
    return pair(folder, "GRPO", rows="prompt", extra=_rewarded_lora, lean={"on_missing": "base"}, **_GRPO)


@door('GRPOTrainer with peft_config (LoRA), tied, output="frozen", on_missing="base", beta', **_CLOSE_PEFT, **SLOW)
def grpo_lora_reference(folder: Path) -> Outcome:
    options = _GRPO | {"beta": 0.1}
    return pair(folder, "GRPO", rows="prompt", extra=_rewarded_lora, lean={"on_missing": "base"}, **options)


@door('GMPOTrainer (trl.experimental), tied, output="frozen", on_missing="base"', **_CLOSE, **SLOW)
def gmpo(folder: Path) -> Outcome:
    options = _GRPO | {"num_iterations": 2}  # where ratios are all one, it is GRPO
    return pair(folder, "GMPO", rows="prompt", extra=_rewards, lean={"on_missing": "base"}, **options)


@door('GRPOTrainer, tied, output="restricted": roll-outs stay within the vocabulary', expects="works", **_NEEDS)
def grpo_restricted(folder: Path) -> Outcome:
    model = models.lean(models.make_model("llama-tied"), output="restricted")
    run = train("GRPO", model, folder, "prompt", extra=_rewards, **_GRPO)
    return Outcome("works", f"{len(run.losses)} steps")


@door('RLOOTrainer, tied, output="frozen", on_missing="base"', **_CLOSE, **SLOW)
def rloo_served(folder: Path) -> Outcome:
    return pair(folder, "RLOO", rows="prompt", extra=_rewards, lean={"on_missing": "base"}, **_GRPO)


@door(
    "DistillationTrainer, student and teacher tied and shrunk",
    expects="refused",
    refuses="around the lookup",
    why="its loss multiplies with both matrices itself, and has no other way",
    **_NEEDS,
)
def distillation(folder: Path) -> Outcome:
    model = models.lean(models.make_model("llama-tied"), on_missing="base")
    options = {"max_completion_length": 6, "max_steps": 2}
    return pairs.refused(
        lambda: train(
            "Distillation",
            model,
            folder,
            "prompt",
            extra=lambda each: {"teacher_model": copy.deepcopy(each)},
            **options,
        )
    )


def _teacher(model: nn.Module) -> dict[str, Any]:
    return {"teacher_model": copy.deepcopy(model)}


@door('GKDTrainer (trl.experimental), student and teacher tied, output="frozen"', **_CLOSE_LOGITS, **SLOW)
def gkd(folder: Path) -> Outcome:
    return pair(folder, "GKD", rows="chat", extra=_teacher, lmbda=0.0, max_length=32, max_new_tokens=6)


@door('GKDTrainer (trl.experimental), on-policy, tied, output="frozen", on_missing="base"', **_CLOSE_LOGITS, **SLOW)
def gkd_on_policy(folder: Path) -> Outcome:
    options = {"lmbda": 1.0, "max_length": 32, "max_new_tokens": 6}
    return pair(folder, "GKD", rows="chat", extra=_teacher, lean={"on_missing": "base"}, **options)


@door('OnlineDPOTrainer (trl.experimental), tied, output="frozen", on_missing="base"', **_CLOSE_LOGITS, **SLOW)
def online_dpo(folder: Path) -> Outcome:
    options = {"max_new_tokens": 6, "max_length": 32}
    return pair(folder, "OnlineDPO", rows="prompt", extra=_rewards, lean={"on_missing": "base"}, **options)
