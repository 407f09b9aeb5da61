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
from leanvocab.trainers.resuming import resume_from_delta

BEFORE = Path(__file__).parents[1] / "data" / "before_the_wings"
EXPECTED: dict[str, Any] = json.loads((BEFORE / "expected.json").read_text())
VOCABULARY = lv.PartialVocabulary([0, 1, 2, 5, 8, 13, 21, 34, 39], 40)
DELTAS = {  # → base
    "tied-frozen": "tied",
    "untied-full": "untied",
    "untied-frozen": "untied",
    "untied-restricted": "untied",
}


def digests(tensors: dict[str, Tensor]) -> dict[str, str]:
    values = {name: tensor.detach().contiguous().numpy().tobytes() for name, tensor in tensors.items()}
    return {name: hashlib.sha256(value).hexdigest()[:16] for name, value in values.items()}


def files(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in sorted(folder.iterdir())}


def shrunk(base: str, output: Any) -> nn.Module:
    return lv.shrink_(LlamaForCausalLM.from_pretrained(BEFORE / base), VOCABULARY, output=output)


def test_a_vocabulary() -> None:
    assert lv.PartialVocabulary.load(BEFORE / "vocabulary.json") == VOCABULARY


@pytest.mark.parametrize("name", DELTAS)
def test_a_delta_merges_to_the_same_bytes(tmp_path: Path, name: str) -> None:
    options: dict[str, Any] = {"base": BEFORE / DELTAS[name], "delta": BEFORE / name, "output": tmp_path / "out"}
    lv.merge_checkpoint(**options, verify=True)
    assert files(tmp_path / "out") == EXPECTED["merged"][name]


@pytest.mark.parametrize("name", DELTAS)
@pytest.mark.filterwarnings('ignore:.*output="restricted" trains')
def test_a_delta_loads_with_its_states(name: str) -> None:
    model = shrunk(DELTAS[name], name.partition("-")[2])
    lv.load_delta(model, BEFORE / name, base=BEFORE / DELTAS[name])
    assert digests(model.state_dict()) == EXPECTED["loaded"][name]
    states = read_full_states(BEFORE / name, read_delta(BEFORE / name)[0])["state"]
    assert {str(number): digests(state) for number, state in states.items()} == EXPECTED["states"][name]


@pytest.mark.parametrize("name", DELTAS)
def test_a_delta_is_described_as_it_was(name: str) -> None:
    described = json.loads(json.dumps(inspect_delta(BEFORE / name).to_dict()))
    assert described | {"name": name} == EXPECTED["info"][name]


def test_a_partial_checkpoint_merges_to_the_same_bytes(tmp_path: Path) -> None:
    options: dict[str, Any] = {"base": BEFORE / "tied", "delta": BEFORE / "partial", "output": tmp_path / "out"}
    lv.merge_checkpoint(**options, vocabulary=BEFORE / "vocabulary.json", verify=True)
    assert files(tmp_path / "out") == EXPECTED["merged"]["partial"]


def test_a_full_checkpoint_says_what_it_was_trained_for() -> None:
    assert files(BEFORE / "full") == EXPECTED["full"]
    note = read_training_note(BEFORE / "full")
    assert note is not None
    assert {table["digest"] for table in note["tables"].values()} == {VOCABULARY.digest}
    LlamaForCausalLM.from_pretrained(BEFORE / "full")


def test_a_trainers_delta_checkpoint_is_resumed_from(tmp_path: Path) -> None:
    shutil.copytree(BEFORE / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=2, save_strategy="no", per_device_train_batch_size=2, use_cpu=True, report_to=[],
        disable_tqdm=True, optim="adamw_torch", seed=1,
    )  # fmt: skip
    model = shrunk("tied", None)
    ids = torch.tensor([[0, 5, 8, 13, 2], [0, 21, 34, 39, 2]])
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
    resume_from_delta(trainer, tmp_path / "run" / "checkpoint-2", base=BEFORE / "tied")
    assert trainer.state.global_step == 2
    assert digests(model.state_dict()) == EXPECTED["resumed"]
