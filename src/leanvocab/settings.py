"""Every knob of a fine-tuning run, once: name, type, default, and the words that `leanvocab finetune --help` shows.

The defaults are those of the paper's Table 8 for GLUE (for XNLI it trains 2 epochs). Loads nothing heavy: the command
line is built from this class.
"""

from dataclasses import dataclass
from typing import Annotated, NamedTuple

from leanvocab.errors import SettingsError

TASKS = ("classification", "regression")
STRATEGIES = ("no", "steps", "epoch")
# Table 8: "2e-5 (7.5e-6 for XLM models)". XLM-R and XLM-V are both of the model type xlm-roberta.
LEARNING_RATE = 2e-5
LEARNING_RATE_XLM = 7.5e-6


class About(NamedTuple):
    """What a knob does, and under which heading it stands in the help."""

    help: str
    heading: str


@dataclass(frozen=True, kw_only=True)
class FineTuneSettings:
    """How to fine-tune. Every knob has a default; `None` and empty mean: find it out, as the knob's own words say.

    Raises:
        SettingsError: a value is out of its range, or two of them contradict each other.
    """

    full_vocabulary: Annotated[
        bool, About("Train all rows, as ordinary fine-tuning does. Turns leanvocab off, for comparison.", "Vocabulary")
    ] = False
    config_name: Annotated[str | None, About("Configuration of the data set, such as cola in glue.", "Data")] = None
    text_columns: Annotated[
        tuple[str, ...], About("Column with the text; give it twice for pairs. By default the usual names.", "Data")
    ] = ()
    label_column: Annotated[str | None, About("Column with the labels. By default label or labels.", "Data")] = None
    task: Annotated[
        str | None, About("classification or regression. By default float labels mean regression.", "Data")
    ] = None
    train_split: Annotated[str, About("Split to train on.", "Data")] = "train"
    eval_split: Annotated[
        str | None, About("Split to validate on. By default the first that is named validation.", "Data")
    ] = None
    validation_ratio: Annotated[
        float, About("Without a validation split, hold this share of the training split out for it.", "Data")
    ] = 0.0
    max_train_samples: Annotated[int | None, About("Train on so many examples only, drawn by the seed.", "Data")] = None
    max_eval_samples: Annotated[int | None, About("Validate on so many examples only, drawn by the seed.", "Data")] = (
        None
    )
    max_length: Annotated[int, About("Tokens to which a text, or a pair, is cut.", "Data")] = 128

    epochs: Annotated[float, About("Passes over the training split.", "Training")] = 3.0
    max_steps: Annotated[int | None, About("Stop after so many steps, whatever the epochs.", "Training")] = None
    batch_size: Annotated[int, About("Examples in a batch, on each device.", "Training")] = 32
    gradient_accumulation_steps: Annotated[int, About("Batches in an optimizer step.", "Training")] = 1
    learning_rate: Annotated[
        float | None, About("Peak learning rate. By default 2e-5, and 7.5e-6 for XLM models.", "Training")
    ] = None
    scheduler: Annotated[str, About("Learning rate schedule, by transformers' names.", "Training")] = "linear"
    warmup: Annotated[float, About("Warm-up steps; below 1 a ratio of all steps.", "Training")] = 0.0
    weight_decay: Annotated[float, About("Weight decay. Above 0 the unused rows' decay is replayed.", "Training")] = 0.0
    adam_beta1: Annotated[float, About("Adam's first beta.", "Training")] = 0.9
    adam_beta2: Annotated[float, About("Adam's second beta.", "Training")] = 0.999
    adam_epsilon: Annotated[float, About("Adam's epsilon.", "Training")] = 1e-8
    max_grad_norm: Annotated[float, About("Clip gradients to this global norm; 0 does not clip.", "Training")] = 1.0
    dropout: Annotated[
        float, About("Hidden and attention dropout; below 0 keeps the checkpoint's own.", "Training")
    ] = 0.1
    group_by_length: Annotated[bool, About("Batch texts of like length together: less padding.", "Training")] = False
    bf16: Annotated[bool, About("Compute in bfloat16 where it is safe (autocast); weights stay fp32.", "Training")] = (
        False
    )
    gradient_checkpointing: Annotated[bool, About("Recompute activations: less memory, slower.", "Training")] = False
    cpu: Annotated[bool, About("Train on the CPU, even where there is an accelerator.", "Training")] = False
    seed: Annotated[int, About("Seed of the new layers, the order of the data and dropout.", "Training")] = 42

    eval_strategy: Annotated[str, About("Validate: no, steps or epoch.", "Validating and saving")] = "epoch"
    eval_steps: Annotated[int, About("Steps between validations (steps).", "Validating and saving")] = 500
    eval_batch_size: Annotated[
        int | None, About("Examples in a batch of validation. By default the batch size.", "Validating and saving")
    ] = None
    save_strategy: Annotated[str, About("Write checkpoints: no, steps or epoch.", "Validating and saving")] = "epoch"
    save_steps: Annotated[int, About("Steps between checkpoints (steps).", "Validating and saving")] = 500
    save_total_limit: Annotated[int, About("Checkpoints to keep.", "Validating and saving")] = 1
    best: Annotated[
        str | None,
        About("Keep the model of the checkpoint with the best of this score: loss, f1, …", "Validating and saving"),
    ] = None
    logging_steps: Annotated[int, About("Steps between two logged losses.", "Validating and saving")] = 50
    resume: Annotated[
        bool, About("Go on from the last checkpoint in the output directory.", "Validating and saving")
    ] = False
    overwrite: Annotated[bool, About("Write over an earlier run in the output directory.", "Validating and saving")] = (
        False
    )

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise SettingsError(f"{name} must be above 0, got {value}")
        for name in _NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise SettingsError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("eval_strategy", "save_strategy"):
            _one_of(name, getattr(self, name), STRATEGIES)
        if self.task is not None:
            _one_of("task", self.task, TASKS)
        if len(self.text_columns) > 2:
            raise SettingsError(f"text_columns takes one column, or two for pairs; got {list(self.text_columns)}")
        for name in ("dropout", "validation_ratio"):
            if getattr(self, name) >= 1:
                raise SettingsError(f"{name} is a ratio below 1, got {getattr(self, name)}")
        if self.best and (self.save_strategy == "no" or self.save_strategy != self.eval_strategy):
            raise SettingsError(
                "best needs a checkpoint at each validation: set eval_strategy and save_strategy to the same, "
                f"steps or epoch; got {self.eval_strategy!r} and {self.save_strategy!r}"
            )
        if self.resume and self.overwrite:
            raise SettingsError("resume goes on with the earlier run, overwrite discards it; choose one")

    def learning_rate_for(self, model_type: str) -> float:
        """The peak learning rate for a model type; by default the paper's (Table 8)."""
        if self.learning_rate is not None:
            return self.learning_rate
        return LEARNING_RATE_XLM if model_type.startswith("xlm") else LEARNING_RATE


_POSITIVE = (
    "max_train_samples", "max_eval_samples", "max_length", "epochs", "max_steps", "batch_size",
    "gradient_accumulation_steps", "learning_rate", "adam_epsilon", "eval_steps", "eval_batch_size", "save_steps",
    "save_total_limit", "logging_steps",
)  # fmt: skip
_NOT_NEGATIVE = (
    "warmup", "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm", "seed",
    "validation_ratio",
)  # fmt: skip


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SettingsError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
