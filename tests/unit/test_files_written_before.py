"""Vocabularies, deltas and checkpoints that an earlier commit wrote are read as they were then (tests/data/before_the_wings)."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

import leanvocab as lv
from leanvocab.checkpoints.delta_format import read_delta, read_training_note
from leanvocab.checkpoints.optimizer_states import read_full_states
from leanvocab.reports.inspection import inspect_delta
from leanvocab.trainer import resume_from_delta

BEFORE = Path(__file__).parents[1] / "data" / "before_the_wings"
EXPECTED: dict[str, Any] = json.loads((BEFORE / "expected.json").read_text())
VOCABULARY = lv.PartialVocabulary([0, 1, 2, 5, 8, 13, 21, 34, 39], 40)
DELTAS = {  # → base
    "tied-frozen": "tied",
    "untied-full": "untied",
    "untied-frozen": "untied",
    "untied-restricted": "untied",
}
