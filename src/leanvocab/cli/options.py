"""Options as people type them: the names that other programs have for them, and theirs in the words of errors."""

import re
from collections.abc import Mapping
from typing import Any

import typer
from typer.core import TyperCommand

from leanvocab.cli.printing import print_json

UsageError: Any = typer.BadParameter.__mro__[1]  # what Typer raises where a command line cannot be read

# As transformers', TRL's, PEFT's and other trainers call them.
ALIASES = {
    "--lr": "--learning-rate",
    "--num-train-epochs": "--epochs",
    "--num-epochs": "--epochs",
    "--per-device-train-batch-size": "--batch-size",
    "--train-batch-size": "--batch-size",
    "--per-device-eval-batch-size": "--eval-batch-size",
    "--grad-accum": "--gradient-accumulation-steps",
    "--lr-scheduler-type": "--scheduler",
    "--lr-scheduler": "--scheduler",
    "--warmup-steps": "--warmup",
    "--warmup-ratio": "--warmup",
    "--adam-eps": "--adam-epsilon",
    "--max-seq-length": "--max-length",
    "--max-seq-len": "--max-length",
    "--max-source-length": "--max-length",
    "--lora-r": "--lora-rank",
    "--rank": "--lora-rank",
    "--use-cpu": "--cpu",
    "--no-cuda": "--cpu",
    "--load-in-4bit": "--qlora",
    "--mlm-probability": "--masked-ratio",
    "--evaluation-strategy": "--eval-strategy",
    "--metric-for-best-model": "--best",
    "--overwrite-output-dir": "--overwrite",
    "--resume-from-checkpoint": "--resume",
    "--dataset-config-name": "--config-name",
    "--validation-file": "--validation",
    "--eval-file": "--validation",
    "--test-file": "--test",
    "--text-columns": "--text-column",
    "--force": "--overwrite",
    "--num-rows": "--rows",
}
# Names of arguments, which have none of their own on the command line.
ARGUMENTS = {
    "--model": "model",
    "--model-name-or-path": "model",
    "--data": "data",
    "--dataset": "data",
    "--dataset-name": "data",
    "--train-file": "data",
    "--base": "base",
    "--delta": "delta",
    "--output": "output",
    "--path": "path",
}
_HINTS = {
    "--optimizer": "finetune trains with AdamW; another optimizer is a matter of a Trainer, with LeanVocabCallback",
    "--optim": "finetune trains with AdamW; another optimizer is a matter of a Trainer, with LeanVocabCallback",
    "--fp16": "finetune computes in fp32, or with --bf16",
    "--push-to-hub": "nothing is uploaded; what a run leaves is a folder for `hf upload`",
    "--device": "an accelerator is taken where there is one; --cpu leaves it alone",
}


class ForgivingCommand(TyperCommand):
    """A command that also knows its options by the names that other programs have for them; `--json` holds for usage errors."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, self._as_own(list(args)))
        except UsageError as error:
            if "--json" not in args:
                raise
            print_json({"error": {"type": "UsageError", "message": error.format_message()}})
            raise typer.Exit(2) from None

    def _as_own(self, words: list[str]) -> list[str]:
        known = {name for parameter in self.params for name in parameter.opts}
        arguments = [str(p.name) for p in self.params if p.param_type_name == "argument"]
        own, named = list[str](), dict[str, str]()
        while words:
            word = words.pop(0)
            if word == "--":
                return [*self._in_order(arguments, named, own), word, *words]
            name, equals, value = word.partition("=")
            option = name.replace("_", "-") if name.startswith("--") else name
            option = option if option in known else ALIASES.get(option, option)
            if option in known or not name.startswith("--"):
                own.append(option + equals + value)
            elif (argument := ARGUMENTS.get(option)) in arguments and argument and (equals or words):
                named[argument] = value if equals else words.pop(0)
            elif option in _HINTS:
                raise typer.BadParameter(f"there is no option {name}: {_HINTS[option]}")
            else:
                own.append(word)
        return self._in_order(arguments, named, own)

    def _in_order(self, arguments: list[str], named: Mapping[str, str], own: list[str]) -> list[str]:
        """The words with the arguments that were given by name where they belong: the first in front, or the last behind."""
        values = [named[argument] for argument in arguments if argument in named]
        if not values:
            return own
        if set(arguments[: len(values)]) == named.keys():
            return [*values, *own]
        if set(arguments[-len(values) :]) == named.keys():
            return [*own, *values]
        raise typer.BadParameter(f"give {' '.join(map(str.upper, arguments))} in this order, without names")


def in_options(message: str, flags: Mapping[str, str], *, is_setting: bool = False) -> str:
    """An error's words with the command's options in the place of arguments: `text_columns` as `--text-column`.

    Args:
        flags: argument → option.
        is_setting: the error is about a setting, whose name may begin the message.
    """
    for name, flag in flags.items():
        value = r"=(?P<value>'[^']*'|\"[^\"]*\"|[^\s;,:()]+)"
        same = rf"(?P<same> \({re.escape(flag)}\))?"
        starts = rf"|^{name}\b(?![=-])" if is_setting else ""
        listed = rf"|(?<= \(){name}: (?=[\w-]+)|(?<=: ){name}(?=\))"  # (task: causal-lm), (regression: task)
        bare = rf"|(?<![\w.\-/'\"]){name}(?![\w=/.-])" if "_" in name else rf"|(?<=\bset ){name}\b|(?<=\(or ){name}\b"
        pattern = rf"(?<![\w.\-/]){name}{value}{same}{listed}{bare}{starts}"
        message = re.sub(pattern, lambda match, flag=flag: _option(match, flag), message)  # type: ignore[misc]
    return message


def _option(match: "re.Match[str]", flag: str) -> str:
    value = match["value"]
    if match[0].endswith(": "):
        return f"{flag} "
    return flag if value is None or value == "True" or match["same"] else f"{flag} {value.strip(chr(39) + chr(34))}"
