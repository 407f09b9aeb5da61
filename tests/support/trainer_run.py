"""One run of transformers' Trainer, for a process of its own.

In a process of its own, because fused AdamW does not check the shapes of states: a wrong resume would end this process.
With "library": false the run proves that leanvocab is not needed: it cannot be imported.
"""

import sys
import warnings
from typing import Any


class _NotInstalled:
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] == "leanvocab":
            raise ModuleNotFoundError(name)


def trainer_run(options: dict[str, Any]) -> dict[str, Any]:
    """Losses and norms of gradients of a run, or the error that it ended in."""
    if not options.get("library", True):
        sys.meta_path.insert(0, _NotInstalled())  # type: ignore[arg-type]
    import torch
    from transformers import LlamaForCausalLM, RobertaForSequenceClassification, Trainer, TrainingArguments

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(7)
    rows = torch.randint(3, 500, (32, 12), generator=generator)
    labels = torch.randint(0, 3, (32,), generator=generator)
    data = [{"input_ids": ids, "labels": label} for ids, label in zip(rows, labels, strict=True)]
    if options.get("language_model"):
        data = [{"input_ids": ids, "labels": ids} for ids in rows]
    model_class = LlamaForCausalLM if options.get("language_model") else RobertaForSequenceClassification
    model = model_class.from_pretrained(options["base"])
    if options.get("token_ids"):
        from leanvocab.model.shrink import shrink_
        from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

        ids = rows.unique().tolist() if options["token_ids"] == "used" else options["token_ids"]
        decays = options.get("decay", 0) > 0
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message='.*output="restricted" trains')
            shrink_(model, PartialVocabulary(ids, 500), decay_unused_rows=decays, output=options.get("mode"))
    arguments = TrainingArguments(
        output_dir=options["output"],
        max_steps=options.get("max_steps", 8),
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        weight_decay=options.get("decay", 0.0),
        optim=options.get("optim", "adamw_torch_fused"),
        save_steps=2,
        logging_steps=1,
        eval_steps=2,
        eval_strategy="steps" if options.get("best") else "no",
        load_best_model_at_end=bool(options.get("best")),
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    callbacks = []
    if options.get("checkpoints"):
        from leanvocab.trainers.callback import LeanVocabCallback

        callbacks.append(LeanVocabCallback(checkpoints=options["checkpoints"]))
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data[:8], callbacks=callbacks)
    if options.get("interrupt_at"):
        trainer.add_callback(_Interrupt(options["interrupt_at"]))
    try:
        if options.get("resume_delta"):
            from leanvocab.trainers.resuming import resume_from_delta

            resume_from_delta(trainer, options["resume_delta"], widen=options.get("widen", False))
        else:
            trainer.train(resume_from_checkpoint=options.get("resume"))
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}
    trainer.save_model(options["output"] + "/final")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    return {"losses": losses, "norms": norms}


def _Interrupt(step: int) -> Any:  # noqa: N802 (makes an object of a class that needs transformers)
    from transformers import TrainerCallback

    class Interrupt(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step >= step

    return Interrupt()
