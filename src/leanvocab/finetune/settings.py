"""Every knob of a fine-tuning run, once: name, type, default, bounds, and the words that `leanvocab finetune --help` shows.

For classification and regression the defaults are those of the paper's Table 8 for GLUE (for XNLI it trains 2 epochs); for
language models, of which it has none, those of `TASKS`. Loads nothing heavy: the command line is built from these classes.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from leanvocab.choices import FROZEN_ROWS_ON, OUTPUT_MODES, FilterEps
from leanvocab.errors import SettingsError

CLASSIFICATION, REGRESSION = LABEL_TASKS = ("classification", "regression")
CAUSAL_LM, SEQ2SEQ_LM, MASKED_LM = LANGUAGE_TASKS = ("causal-lm", "seq2seq-lm", "masked-lm")
STRATEGIES = ("no", "steps", "epoch")


class TaskKind(NamedTuple):
    """A task's class in transformers, the words for its head, its name in peft, and defaults that depend on it.

    A dropout below 0 is the checkpoint's own.
    """

    auto_class: str
    head: str
    adapter_type: str
    learning_rate: float
    max_length: int
    batch_size: int
    dropout: float
    pipeline: str | None = "text-generation"  # of transformers; None where it has none for it


# Classification: Table 8. Language models: what the field's own recipes take for training all weights with AdamW. 2e-5: TRL's
# SFTTrainer, Alpaca, Vicuna. 5e-5: transformers' run_mlm and run_summarization. Batches of 8 as in all of these.
_CLASSIFIER = TaskKind(
    "AutoModelForSequenceClassification",
    "sequence classification",
    "SEQ_CLS",
    2e-5,
    128,
    32,
    0.1,
    "text-classification",
)
TASKS = {
    CLASSIFICATION: _CLASSIFIER,
    REGRESSION: _CLASSIFIER,
    CAUSAL_LM: TaskKind("AutoModelForCausalLM", "causal language model", "CAUSAL_LM", 2e-5, 512, 8, -1.0),
    SEQ2SEQ_LM: TaskKind(
        "AutoModelForSeq2SeqLM", "sequence-to-sequence language model", "SEQ_2_SEQ_LM", 5e-5, 512, 8, -1.0, None
    ),
    MASKED_LM: TaskKind(
        "AutoModelForMaskedLM", "masked language model", "FEATURE_EXTRACTION", 5e-5, 512, 8, -1.0, "fill-mask"
    ),
}
# Table 8: "2e-5 (7.5e-6 for XLM models)". XLM-R and XLM-V are both of the model type xlm-roberta.
LEARNING_RATE_XLM = 7.5e-6
# What the QLoRA paper takes for models of up to 13B, and PEFT's and TRL's recipes for LoRA.
LEARNING_RATE_LORA = 2e-4
# transformers' page on T5: with AdamW "typically, 1e-4 and 3e-4 work well".
LEARNING_RATE_T5 = 1e-4
MAX_TARGET_LENGTH = 128
_T5_TYPES = ("t5", "mt5", "umt5", "longt5", "switch_transformers")


class About(NamedTuple):
    """The words of a knob in the help, the values that it may have, and the tasks that it is for (none: all).

    `argument` is the one of transformers' `TrainingArguments` that takes the value as it is.
    """

    help: str
    above: float | None = None
    at_least: float | None = None
    is_ratio: bool = False
    one_of: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    argument: str | None = None

    def check(self, name: str, value: Any, task: str) -> None:
        """Raises SettingsError where a knob that was turned has no meaning for the task, or its value is out of range."""
        if self.tasks and task not in self.tasks:
            raise SettingsError(f"{name} is for {' and '.join(self.tasks)}; the task is {task}")
        if isinstance(value, float) and not math.isfinite(value):
            raise SettingsError(f"{name} must be a finite number, got {value}")
        if self.above is not None and value <= self.above:
            raise SettingsError(f"{name} must be above {self.above}, got {value}")
        if self.at_least is not None and value < self.at_least:
            raise SettingsError(f"{name} must be {self.at_least} or more, got {value}")
        if self.is_ratio and value >= 1:
            raise SettingsError(f"{name} is a ratio below 1, got {value}")
        if self.one_of and value not in self.one_of:
            raise SettingsError(f"{name} must be one of {', '.join(self.one_of)}; got {value!r}")


def knob(default: Any, help: str, **limits: Any) -> Any:
    """A field of the settings: its default, and what `About` says of it."""
    return field(default=default, metadata={"about": About(help, **limits)})


@dataclass(frozen=True, kw_only=True)
class VocabularySettings:
    """Fate of the vocabulary matrices."""

    full_vocabulary: bool = knob(
        False, "Train all rows, as ordinary fine-tuning does. Turns leanvocab off, for comparison."
    )
    vocabulary: str | None = knob(
        None, "Partial vocabulary that `leanvocab count` wrote; checked against the data. By default they are counted."
    )
    output: str | None = knob(
        None,
        "What becomes of a language model's output layer: full (stays whole; untied models), frozen (kept rows train, "
        "the others stay in the softmax), restricted (softmax over kept rows alone: another objective). By default "
        "full where it is untied, frozen where it is tied.",
        one_of=OUTPUT_MODES,
        tasks=LANGUAGE_TASKS,
    )
    frozen_rows: str = knob(
        "device",
        "Where the frozen rows lie: device, or host (streamed, for a small device).",
        one_of=FROZEN_ROWS_ON,
        tasks=LANGUAGE_TASKS,
    )
    filter_eps: str | None = knob(
        None,
        "Not exact: leave frozen rows out of the hidden states' gradient where that of their scores is smaller for all tokens "
        "of a chunk: a number, or auto (below the dtype's precision). By default none is left out.",
        tasks=LANGUAGE_TASKS,
    )

    @property
    def filter_threshold(self) -> FilterEps | None:
        """`filter_eps` as `shrink_` takes it."""
        return "auto" if self.filter_eps == "auto" else None if self.filter_eps is None else float(self.filter_eps)


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The task, and what is read for it."""

    config_name: str | None = knob(None, "Configuration of the data set, such as cola in glue.")
    text_columns: tuple[str, ...] = knob(
        (),
        "Column with the text; give it twice for pairs. By default the usual names.",
        tasks=(*LABEL_TASKS, CAUSAL_LM, MASKED_LM),
    )
    label_column: str | None = knob(None, "Column with the labels. By default label or labels.", tasks=LABEL_TASKS)
    task: str | None = knob(
        None,
        "classification, regression, causal-lm, seq2seq-lm or masked-lm. By default regression where labels are floats, "
        "and classification elsewhere.",
    )
    prompt_column: str | None = knob(
        None,
        "Column with prompts, or sources (seq2seq-lm). By default prompt or source.",
        tasks=(CAUSAL_LM, SEQ2SEQ_LM),
    )
    completion_column: str | None = knob(
        None, "Column with completions, or targets. By default completion or target.", tasks=(CAUSAL_LM, SEQ2SEQ_LM)
    )
    messages_column: str | None = knob(
        None, "Column with chats, for the tokenizer's chat template. By default messages.", tasks=(CAUSAL_LM,)
    )
    chat_template_kwargs: str | None = knob(
        None,
        "Values for the chat template, as JSON: '{\"enable_thinking\": false}'. A column of this name has them for each chat.",
        tasks=(CAUSAL_LM,),
    )
    train_split: str = knob("train", "Split to train on.")
    eval_split: str | None = knob(None, "Split to validate on. By default the first that is named validation.")
    validation_ratio: float = knob(
        0.0, "Without a validation split, hold this share of the training split out for it.", at_least=0, is_ratio=True
    )
    max_train_samples: int | None = knob(None, "Train on so many examples only, drawn by the seed.", above=0)
    max_eval_samples: int | None = knob(None, "Validate on so many examples only, drawn by the seed.", above=0)
    max_length: int = knob(
        None,
        "Tokens to which a text, or a pair, is cut. By default 128, and 512 for language models, or what the model takes.",
        above=0,
    )
    max_target_length: int = knob(
        MAX_TARGET_LENGTH, "Tokens to which a target is cut (seq2seq-lm).", above=0, tasks=(SEQ2SEQ_LM,)
    )
    train_on_prompts: bool = knob(
        False, "Learn prompts as well, not completions alone (causal-lm).", tasks=(CAUSAL_LM,)
    )
    packing: bool = knob(
        False,
        "Fill blocks of max-length tokens (causal-lm). Texts are joined and cut, and see one another within a block; "
        "prompts with completions, and chats, stay whole and do not.",
        tasks=(CAUSAL_LM,),
    )
    masked_ratio: float = knob(0.15, "Share of tokens to mask (masked-lm).", above=0, is_ratio=True, tasks=(MASKED_LM,))

    @property
    def is_language_model(self) -> bool:
        """True where the task has an output layer over the vocabulary."""
        return self.task in LANGUAGE_TASKS

    @property
    def texts(self) -> tuple[str, ...]:
        """Columns that hold texts, where they are there, beside those that are called so in any file."""
        usual = ("prompt", "completion", "source", "target", "instruction", "input", "output")
        named = (*self.text_columns, self.prompt_column, self.completion_column)
        return tuple(name for name in (*named, *(usual if self.is_language_model else ())) if name)

    @property
    def kind(self) -> TaskKind:
        """Everything that depends on the task alone."""
        return TASKS[self.task or CLASSIFICATION]


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Passes, batches, the optimizer, and what of the model is trained."""

    epochs: float = knob(3.0, "Passes over the training split.", above=0, argument="num_train_epochs")
    max_steps: int | None = knob(None, "Stop after so many steps, whatever the epochs.", above=0)
    batch_size: int = knob(
        None,
        "Examples in a batch, on each device. By default 32, and 8 for language models.",
        above=0,
        argument="per_device_train_batch_size",
    )
    gradient_accumulation_steps: int = knob(
        1, "Batches in an optimizer step.", above=0, argument="gradient_accumulation_steps"
    )
    learning_rate: float | None = knob(
        None,
        "Peak learning rate. By default 2e-5, and 7.5e-6 for XLM models; for seq2seq-lm and masked-lm 5e-5, and 1e-4 "
        "for T5 models; with LoRA 2e-4.",
        above=0,
    )
    scheduler: str = knob("linear", "Learning rate schedule, by transformers' names.", argument="lr_scheduler_type")
    warmup: float = knob(0.0, "Warm-up steps; below 1 a ratio of all steps.", at_least=0, argument="warmup_steps")
    weight_decay: float = knob(
        0.0, "Weight decay. Above 0 the unused rows' decay is replayed.", at_least=0, argument="weight_decay"
    )
    adam_beta1: float = knob(0.9, "Adam's first beta.", at_least=0, is_ratio=True, argument="adam_beta1")
    adam_beta2: float = knob(0.999, "Adam's second beta.", at_least=0, is_ratio=True, argument="adam_beta2")
    adam_epsilon: float = knob(1e-8, "Adam's epsilon.", above=0, argument="adam_epsilon")
    max_grad_norm: float = knob(
        1.0, "Clip gradients to this global norm; 0 does not clip.", at_least=0, argument="max_grad_norm"
    )
    dropout: float = knob(
        None,
        "Hidden and attention dropout; below 0 keeps the checkpoint's own. By default 0.1, and its own for language "
        "models.",
        is_ratio=True,
    )
    group_by_length: bool = knob(False, "Batch texts of like length together: less padding.")
    bf16: bool = knob(False, "Compute in bfloat16 where it is safe (autocast); weights stay fp32.", argument="bf16")
    lora: bool = knob(False, "Train LoRA adapters on all linear layers, and save the adapter alone (extra: peft).")
    qlora: bool = knob(False, "LoRA on a model that is loaded in 4 bits (extras: peft, quantization).")
    lora_rank: int = knob(16, "Rank of the adapters; their alpha is twice it.", above=0)
    gradient_checkpointing: bool = knob(False, "Recompute activations: less memory, slower.")
    cpu: bool = knob(False, "Train on the CPU, even where there is an accelerator.", argument="use_cpu")
    seed: int = knob(42, "Seed of the new layers, the order of the data and dropout.", at_least=0, argument="seed")

    @property
    def uses_lora(self) -> bool:
        """True where adapters are trained, in place of the model's own weights."""
        return self.lora or self.qlora


@dataclass(frozen=True, kw_only=True)
class SavingSettings:
    """Steps at which a run validates and logs, and the checkpoints that it keeps."""

    eval_strategy: str = knob("epoch", "Validate: no, steps or epoch.", one_of=STRATEGIES)
    eval_steps: int = knob(500, "Steps between validations (steps).", above=0, argument="eval_steps")
    eval_batch_size: int | None = knob(None, "Examples in a batch of validation. By default the batch size.", above=0)
    save_strategy: str = knob(
        "epoch", "Write checkpoints: no, steps or epoch.", one_of=STRATEGIES, argument="save_strategy"
    )
    save_steps: int = knob(500, "Steps between checkpoints (steps).", above=0, argument="save_steps")
    checkpoints: str = knob(
        "full",
        "What checkpoints hold: full (any trainer resumes from them), delta (trained rows and states alone; resume here), "
        "or none.",
        one_of=("full", "delta", "none"),
    )
    save: str = knob(
        "full",
        "What the run leaves: full (a model that loads anywhere), or delta (what was trained; `leanvocab merge` makes it "
        "full).",
        one_of=("full", "delta"),
    )
    save_total_limit: int = knob(1, "Checkpoints to keep.", above=0, argument="save_total_limit")
    best: str | None = knob(
        None, "Keep the model of the checkpoint with the best of this score: loss, f1, perplexity, …"
    )
    logging_steps: int = knob(50, "Steps between two logged losses.", above=0, argument="logging_steps")
    report: str | None = knob(
        None,
        "Write a report here at the end, a page for a browser (.html): the data's tokens, memory, losses and scores. It holds "
        "words of the data, so that none lies beside the model unless it is named there.",
    )
    resume: bool = knob(False, "Go on from the last checkpoint in the output directory.")
    overwrite: bool = knob(False, "Write over an earlier run in the output directory.")


GROUPS: dict[str, type] = {
    "Vocabulary": VocabularySettings,
    "Data": DataSettings,
    "Training": TrainingSettings,
    "Validating and saving": SavingSettings,
}
"""The settings by the headings of the help; each part of the job takes the group that it reads."""


@dataclass(frozen=True, kw_only=True)
class FineTuneSettings(SavingSettings, TrainingSettings, DataSettings, VocabularySettings):
    """The knobs of a fine-tuning. Every one has a default; `None` and empty mean: find it out, as its own words say.

    Raises:
        SettingsError: a value is out of its range, or two of them contradict each other.
    """

    def __post_init__(self) -> None:
        if self.task is not None:
            About("", one_of=tuple(TASKS)).check("task", self.task, self.task)
        object.__setattr__(self, "text_columns", tuple(self.text_columns))  # a command line gives a list
        for name in ("max_length", "batch_size", "dropout"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(self.kind, name))
        for turned in fields(self):
            if (value := getattr(self, turned.name)) != turned.default:
                turned.metadata["about"].check(turned.name, value, self.task or CLASSIFICATION)
        if self.checkpoints == "none":
            object.__setattr__(self, "save_strategy", "no")
        self._check_checkpoints()
        self._check_columns()
        self._check_output()

    def learning_rate_for(self, model_type: str) -> float:
        """The peak learning rate for a model type; by default the paper's (Table 8), and that of `TASKS` beyond it."""
        if self.learning_rate is not None:
            return self.learning_rate
        if self.uses_lora:
            return LEARNING_RATE_LORA
        if not self.is_language_model and model_type.startswith("xlm"):
            return LEARNING_RATE_XLM
        if self.task == SEQ2SEQ_LM and model_type in _T5_TYPES:
            return LEARNING_RATE_T5
        return self.kind.learning_rate

    def trainer_arguments(self) -> dict[str, Any]:
        """The knobs that `TrainingArguments` takes as they are, by its names."""
        arguments = {known.name: known.metadata["about"].argument for known in fields(self)}
        return {argument: getattr(self, name) for name, argument in arguments.items() if argument}

    def _check_checkpoints(self) -> None:
        if self.best and (self.save_strategy == "no" or self.save_strategy != self.eval_strategy):
            raise SettingsError(
                "best needs a checkpoint at each validation: set eval_strategy and save_strategy to the same, "
                f"steps or epoch; got {self.eval_strategy!r} and {self.save_strategy!r} (checkpoints={self.checkpoints!r})"
            )
        for name in ("checkpoints", "save"):
            if getattr(self, name) == "delta" and (self.full_vocabulary or self.uses_lora):
                what = "LoRA saves adapters, which are small" if self.uses_lora else "full_vocabulary trains every row"
                raise SettingsError(
                    f"{name}='delta' holds the rows of a partial vocabulary; {what}: leave one of them out"
                )
        if self.resume and self.overwrite:
            raise SettingsError("resume goes on with the earlier run, overwrite discards it; choose one")

    def _check_columns(self) -> None:
        if len(self.text_columns) > 2:
            raise SettingsError(f"text_columns takes one column, or two for pairs; got {list(self.text_columns)}")
        if self.is_language_model and len(self.text_columns) > 1:
            raise SettingsError(
                f"{self.task} reads one text column, got {list(self.text_columns)}; texts in two parts are prompt_column "
                "and completion_column"
            )
        if (self.prompt_column is None) != (self.completion_column is None):
            given, absent = ("prompt_column", "completion_column")[:: 1 if self.prompt_column else -1]
            raise SettingsError(f"{given} was given without {absent}; name both")
        sources = [name for name in ("text_columns", "prompt_column", "messages_column") if getattr(self, name)]
        if len(sources) > 1:
            raise SettingsError(f"{' and '.join(sources)} were given; examples come from one of them")

    def _check_output(self) -> None:
        given = {
            "output": self.output,
            "frozen_rows": None if self.frozen_rows == "device" else self.frozen_rows,
            "filter_eps": self.filter_eps,
            "vocabulary": self.vocabulary,
        }
        for name, value in given.items():
            if self.full_vocabulary and value is not None:
                raise SettingsError(
                    f"full_vocabulary trains every row, so that {name}={value!r} has no meaning; leave one of them out"
                )
        if self.frozen_rows != "device" and self.output in ("full", "restricted"):
            raise SettingsError(f"frozen_rows says where the rows of output='frozen' lie; output is {self.output!r}")
        if self.filter_eps is not None:
            self._check_filter()

    def _check_filter(self) -> None:
        try:
            is_one = self.filter_threshold == "auto" or 0 < float(str(self.filter_threshold)) < 1
        except ValueError:
            is_one = False
        if not is_one:
            raise SettingsError(f"filter_eps must be auto or a number between 0 and 1; got {self.filter_eps!r}")
        if self.output in ("full", "restricted"):
            raise SettingsError(f"filter_eps leaves out rows of output='frozen'; output is {self.output!r}")
        if self.frozen_rows == "host":
            raise SettingsError("filter_eps and frozen_rows='host' exclude each other: leave one of them out")
