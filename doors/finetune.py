"""`leanvocab finetune`: its switches, in one process and under the launchers, beside the same with --full-vocabulary."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from doors import models, pairs
from doors.registry import Outcome, door
from doors.trainer import CLOSE
from doors.trl import texts, tokenizer

_ONE = ("-m",)
_TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
_ACCELERATE = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m")
_LANGUAGE = ("--task", "causal-lm")
_LORA: Any = {"needs": "peft", "pip": "'leanvocab[peft]'"}
_QLORA: Any = {"needs": ("peft", "bitsandbytes"), "pip": "'leanvocab[peft,quantization]'"}


def run(folder: Path, name: str, launcher: Sequence[str], options: Sequence[str]) -> pairs.Run:
    """One run of the command, in a process of its own or in two."""
    command = [sys.executable, *launcher, "leanvocab", "finetune", str(folder / "model"), str(folder / "data.csv")]
    command += ["-o", str(folder / name), "--max-steps", "4", "--logging-steps", "1", "--max-length", "16", "--cpu"]
    command += ["--dropout", "-1", "--batch-size", "4", "--save-strategy", "no", "--json", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
    said = json.loads((folder / name / "finetune.json").read_text())
    return pairs.Run([loss for _, loss in said["losses"]], _saved(folder / name))


def _saved(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    files = [folder / name for name in ("model.safetensors", "adapter_model.safetensors") if (folder / name).exists()]
    return load_file(files[0])


def pair(
    folder: Path, family: str, launcher: Sequence[str], options: Sequence[str], output: Sequence[str] = ()
) -> Outcome:
    """The same command with the full vocabulary and with a partial one."""
    models.make_model(family).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    with open(folder / "data.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerows([("text", "label"), *((text, i % 3) for i, text in enumerate(texts()))])
    full = run(folder, "full", launcher, [*options, "--full-vocabulary"])
    return pairs.compare(full, run(folder, "lean", launcher, [*options, *output]))


def _door(name: str, combined: str, family: str, launcher: Sequence[str], *options: str, **rest: Any) -> None:
    task = _LANGUAGE if family.startswith("llama-") else ()
    output = ("--output", "full") if family == "llama-untied" else ()

    def combination(folder: Path) -> Outcome:
        return pair(folder, family, launcher, [*task, *options], output)

    combination.__module__ = __name__
    door(f"leanvocab finetune {combined}", name=name, fast=False, **rest)(combination)


_door("defaults", "a classifier", "roberta", _ONE)
_door("bf16", "--bf16", "roberta", _ONE, "--bf16")
_door("lora", "--lora", "llama", _ONE, "--lora", **_LORA)
_door("lora_tied", "--lora, tied language model", "llama-tied", _ONE, "--lora", **_LORA | CLOSE)
_door("qlora", "--qlora, untied language model (--output full)", "llama-untied", _ONE, "--qlora", **_QLORA)
_door("torchrun", "under torchrun, two processes", "roberta", _TORCHRUN)
_door("torchrun_bf16", "--lora --bf16 under torchrun, two processes", "llama", _TORCHRUN, "--lora", "--bf16", **_LORA)
_door("accelerate", "--bf16 under accelerate launch, two processes", "roberta", _ACCELERATE, "--bf16")
_door("accelerate_lora", "--lora under accelerate launch, two processes", "llama", _ACCELERATE, "--lora", **_LORA)
_door(
    "accelerate_qlora",
    "--qlora under accelerate launch, two processes, untied language model (--output full)",
    "llama-untied",
    _ACCELERATE,
    "--qlora",
    **_QLORA,
)
