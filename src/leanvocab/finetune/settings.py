"""Every knob of a fine-tuning run, once: name, type, default, and the words that `leanvocab finetune --help` shows.

For classification and regression the defaults are those of the paper's Table 8 for GLUE (for XNLI it trains 2 epochs); for
language models, of which it has none, those of `DEFAULTS`. Loads nothing heavy: the command line is built from this class.
"""

from dataclasses import dataclass, fields
from typing import Annotated, Any, NamedTuple

from leanvocab.choices import FROZEN_ROWS_ON, OUTPUT_MODES
from leanvocab.errors import SettingsError

CAUSAL_LM, SEQ2SEQ_LM, MASKED_LM = LANGUAGE_TASKS = ("causal-lm", "seq2seq-lm", "masked-lm")
TASKS = ("classification", "regression", *LANGUAGE_TASKS)
STRATEGIES = ("no", "steps", "epoch")


class TaskDefaults(NamedTuple):
    """The defaults that depend on the task. A dropout below 0 is the checkpoint's own."""

    learning_rate: float
    max_length: int
    batch_size: int
    dropout: float


# Classification: Table 8. Language models: what the field's own recipes take for training all weights with AdamW. 2e-5: TRL's
# SFTTrainer, Alpaca, Vicuna. 5e-5: transformers' run_mlm and run_summarization. Batches of 8 as in all of these.
DEFAULTS = {
    "classification": TaskDefaults(2e-5, 128, 32, 0.1),
    "regression": TaskDefaults(2e-5, 128, 32, 0.1),
    CAUSAL_LM: TaskDefaults(2e-5, 512, 8, -1.0),
    SEQ2SEQ_LM: TaskDefaults(5e-5, 512, 8, -1.0),
    MASKED_LM: TaskDefaults(5e-5, 512, 8, -1.0),
}
# Table 8: "2e-5 (7.5e-6 for XLM models)". XLM-R and XLM-V are both of the model type xlm-roberta.
LEARNING_RATE_XLM = 7.5e-6
# What the QLoRA paper takes for models of up to 13B, and PEFT's and TRL's recipes for LoRA.
LEARNING_RATE_LORA = 2e-4
# transformers' page on T5: with AdamW "typically, 1e-4 and 3e-4 work well".
LEARNING_RATE_T5 = 1e-4
_T5_TYPES = ("t5", "mt5", "umt5", "longt5", "switch_transformers")
_BY_TASK: Any = None  # as a default: `__post_init__` puts the task's own in its place


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
    output: Annotated[
        str | None,
        About(
            "What becomes of a language model's output layer: full (stays whole; untied models), frozen (kept rows train, "
            "the others stay in the softmax), restricted (softmax over kept rows alone: another objective). By default "
            "full where it is untied, frozen where it is tied.",
            "Vocabulary",
        ),
    ] = None
    frozen_rows: Annotated[
        str, About("Where the frozen rows lie: device, or host (streamed, for a small device).", "Vocabulary")
    ] = "device"
    config_name: Annotated[str | None, About("Configuration of the data set, such as cola in glue.", "Data")] = None
    text_columns: Annotated[
        tuple[str, ...], About("Column with the text; give it twice for pairs. By default the usual names.", "Data")
    ] = ()
    label_column: Annotated[str | None, About("Column with the labels. By default label or labels.", "Data")] = None
    task: Annotated[
        str | None,
        About(
            "classification, regression, causal-lm, seq2seq-lm or masked-lm. By default regression where labels are floats, "
            "and classification elsewhere.",
            "Data",
        ),
    ] = None
    prompt_column: Annotated[
        str | None, About("Column with prompts, or sources (seq2seq-lm). By default prompt or source.", "Data")
    ] = None
    completion_column: Annotated[
        str | None, About("Column with completions, or targets. By default completion or target.", "Data")
    ] = None
    messages_column: Annotated[
        str | None, About("Column with chats, for the tokenizer's chat template. By default messages.", "Data")
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
    max_length: Annotated[
        int,
        About("Tokens to which a text, or a pair, is cut. By default 128, and 512 for language models.", "Data"),
    ] = _BY_TASK
    max_target_length: Annotated[int, About("Tokens to which a target is cut (seq2seq-lm).", "Data")] = 128
    train_on_prompts: Annotated[bool, About("Learn prompts as well, not completions alone (causal-lm).", "Data")] = (
        False
    )
    packing: Annotated[
        bool,
        About(
            "Fill blocks of max-length tokens (causal-lm). Texts are joined and cut, and see one another within a block; "
            "prompts with completions, and chats, stay whole and do not.",
            "Data",
        ),
    ] = False
    masked_ratio: Annotated[float, About("Share of tokens to mask (masked-lm).", "Data")] = 0.15

    epochs: Annotated[float, About("Passes over the training split.", "Training")] = 3.0
    max_steps: Annotated[int | None, About("Stop after so many steps, whatever the epochs.", "Training")] = None
    batch_size: Annotated[
        int, About("Examples in a batch, on each device. By default 32, and 8 for language models.", "Training")
    ] = _BY_TASK
    gradient_accumulation_steps: Annotated[int, About("Batches in an optimizer step.", "Training")] = 1
    learning_rate: Annotated[
        float | None,
        About(
            "Peak learning rate. By default 2e-5, and 7.5e-6 for XLM models; for seq2seq-lm and masked-lm 5e-5, and 1e-4 "
            "for T5 models; with LoRA 2e-4.",
            "Training",
        ),
    ] = None
    scheduler: Annotated[str, About("Learning rate schedule, by transformers' names.", "Training")] = "linear"
    warmup: Annotated[float, About("Warm-up steps; below 1 a ratio of all steps.", "Training")] = 0.0
    weight_decay: Annotated[float, About("Weight decay. Above 0 the unused rows' decay is replayed.", "Training")] = 0.0
    adam_beta1: Annotated[float, About("Adam's first beta.", "Training")] = 0.9
    adam_beta2: Annotated[float, About("Adam's second beta.", "Training")] = 0.999
    adam_epsilon: Annotated[float, About("Adam's epsilon.", "Training")] = 1e-8
    max_grad_norm: Annotated[float, About("Clip gradients to this global norm; 0 does not clip.", "Training")] = 1.0
    dropout: Annotated[
        float,
        About(
            "Hidden and attention dropout; below 0 keeps the checkpoint's own. By default 0.1, and its own for language "
            "models.",
            "Training",
        ),
    ] = _BY_TASK
    group_by_length: Annotated[bool, About("Batch texts of like length together: less padding.", "Training")] = False
    bf16: Annotated[bool, About("Compute in bfloat16 where it is safe (autocast); weights stay fp32.", "Training")] = (
        False
    )
    lora: Annotated[
        bool, About("Train LoRA adapters on all linear layers, and save the adapter alone (extra: peft).", "Training")
    ] = False
    qlora: Annotated[
        bool, About("LoRA on a model that is loaded in 4 bits (extras: peft, quantization).", "Training")
    ] = False
    lora_rank: Annotated[int, About("Rank of the adapters; their alpha is twice it.", "Training")] = 16
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
        About(
            "Keep the model of the checkpoint with the best of this score: loss, f1, perplexity, …",
            "Validating and saving",
        ),
    ] = None
    logging_steps: Annotated[int, About("Steps between two logged losses.", "Validating and saving")] = 50
    resume: Annotated[
        bool, About("Go on from the last checkpoint in the output directory.", "Validating and saving")
    ] = False
    overwrite: Annotated[bool, About("Write over an earlier run in the output directory.", "Validating and saving")] = (
        False
    )

    def __post_init__(self) -> None:
        if self.task is not None:
            _one_of("task", self.task, TASKS)
        defaults = DEFAULTS[self.task or "classification"]
        for name in ("max_length", "batch_size", "dropout"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(defaults, name))
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise SettingsError(f"{name} must be above 0, got {value}")
        for name in _NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise SettingsError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("eval_strategy", "save_strategy"):
            _one_of(name, getattr(self, name), STRATEGIES)
        if len(self.text_columns) > 2:
            raise SettingsError(f"text_columns takes one column, or two for pairs; got {list(self.text_columns)}")
        for name in ("dropout", "validation_ratio", "masked_ratio"):
            if getattr(self, name) >= 1:
                raise SettingsError(f"{name} is a ratio below 1, got {getattr(self, name)}")
        if self.best and (self.save_strategy == "no" or self.save_strategy != self.eval_strategy):
            raise SettingsError(
                "best needs a checkpoint at each validation: set eval_strategy and save_strategy to the same, "
                f"steps or epoch; got {self.eval_strategy!r} and {self.save_strategy!r}"
            )
        if self.resume and self.overwrite:
            raise SettingsError("resume goes on with the earlier run, overwrite discards it; choose one")
        self._check_what_belongs_to_tasks()
        self._check_output()

    @property
    def is_language_model(self) -> bool:
        """Whether the task has an output layer over the vocabulary."""
        return self.task in LANGUAGE_TASKS

    @property
    def uses_lora(self) -> bool:
        """Whether adapters are trained, in place of the model's own weights."""
        return self.lora or self.qlora

    def learning_rate_for(self, model_type: str) -> float:
        """The peak learning rate for a model type; by default the paper's (Table 8), and that of `DEFAULTS` beyond it."""
        if self.learning_rate is not None:
            return self.learning_rate
        if self.uses_lora:
            return LEARNING_RATE_LORA
        if not self.is_language_model and model_type.startswith("xlm"):
            return LEARNING_RATE_XLM
        if self.task == SEQ2SEQ_LM and model_type in _T5_TYPES:
            return LEARNING_RATE_T5
        return DEFAULTS[self.task or "classification"].learning_rate

    def _check_what_belongs_to_tasks(self) -> None:
        task = self.task or "classification"
        by_default = {field.name: field.default for field in fields(self)}
        for name, tasks in _BELONGS_TO.items():
            if getattr(self, name) != by_default[name] and task not in tasks:
                raise SettingsError(f"{name} is for {' and '.join(tasks)}; the task is {task}")
        if self.is_language_model and len(self.text_columns) > 1:
            raise SettingsError(
                f"{task} reads one text column, got {list(self.text_columns)}; texts in two parts are prompt_column and "
                "completion_column"
            )
        if (self.prompt_column is None) != (self.completion_column is None):
            given, absent = ("prompt_column", "completion_column")[:: 1 if self.prompt_column else -1]
            raise SettingsError(f"{given} was given without {absent}; name both")
        sources = {"text_columns": self.text_columns, "prompt_column": self.prompt_column}
        sources["messages_column"] = self.messages_column
        if len(given_sources := [name for name, value in sources.items() if value]) > 1:
            raise SettingsError(f"{' and '.join(given_sources)} were given; examples come from one of them")

    def _check_output(self) -> None:
        if self.output is not None:
            _one_of("output", self.output, OUTPUT_MODES)
        _one_of("frozen_rows", self.frozen_rows, FROZEN_ROWS_ON)
        given = {"output": self.output, "frozen_rows": None if self.frozen_rows == "device" else self.frozen_rows}
        for name, value in given.items():
            if self.full_vocabulary and value is not None:
                raise SettingsError(
                    f"full_vocabulary trains every row, so that {name}={value!r} has no meaning; leave one of them out"
                )
        if self.frozen_rows != "device" and self.output in ("full", "restricted"):
            raise SettingsError(f"frozen_rows says where the rows of output='frozen' lie; output is {self.output!r}")


_POSITIVE = (
    "max_train_samples", "max_eval_samples", "max_length", "epochs", "max_steps", "batch_size",
    "gradient_accumulation_steps", "learning_rate", "adam_epsilon", "eval_steps", "eval_batch_size", "save_steps",
    "save_total_limit", "logging_steps", "lora_rank", "max_target_length", "masked_ratio",
)  # fmt: skip
_NOT_NEGATIVE = (
    "warmup", "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm", "seed",
    "validation_ratio",
)  # fmt: skip
# What would be silently ignored in other tasks.
_BELONGS_TO = {
    "label_column": ("classification", "regression"),
    "text_columns": ("classification", "regression", CAUSAL_LM, MASKED_LM),
    "output": LANGUAGE_TASKS,
    "frozen_rows": LANGUAGE_TASKS,
    "prompt_column": (CAUSAL_LM, SEQ2SEQ_LM),
    "completion_column": (CAUSAL_LM, SEQ2SEQ_LM),
    "messages_column": (CAUSAL_LM,),
    "train_on_prompts": (CAUSAL_LM,),
    "packing": (CAUSAL_LM,),
    "max_target_length": (SEQ2SEQ_LM,),
    "masked_ratio": (MASKED_LM,),
}


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SettingsError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
