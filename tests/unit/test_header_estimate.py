"""Estimates from headers: what lies in a folder in other forms, and what ends in no answer rather than in a wrong one."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import FULL_SIZE, small_model
from safetensors.torch import load_file, save_file

from leanvocab.finetune.settings import FineTuneSettings
from leanvocab.reads.constructors import construct
from leanvocab.reads.transformers_text import Unsure
from leanvocab.reports.header_estimate import estimate_from_headers, folder_of
from leanvocab.reports.memory import estimate_memory
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary
from versions import configs_stand_in_text

pytestmark = configs_stand_in_text
KEPT = 60
OPTIONS: dict[str, Any] = {"auto_class": FineTuneSettings().kind.auto_class, "precision": "fp32"}


def save(folder: Path, family: str = "bert", **changes: Any) -> Path:
    small_model(family, **changes).save_pretrained(folder)
    return folder


def edit(folder: Path, name: str = "config.json", **changes: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Other tensors in the file; None leaves one out."""
    path = folder / "model.safetensors"
    new = {name: tensor for name, tensor in (load_file(path) | tensors).items() if tensor is not None}
    save_file(new, path, metadata={"format": "pt"})


def check_same(folder: Path, kept: Any = KEPT, **options: Any) -> None:
    options = OPTIONS | options
    assert asdict(estimate_from_headers(folder, kept, **options)) == asdict(
        estimate_memory(str(folder), kept, **options)
    )


def test_a_head_that_is_not_in_the_files_is_counted_and_one_that_is_too_much_is_not(tmp_path: Path) -> None:
    check_same(save(tmp_path, "bert-tied"))
    rewrite(
        tmp_path, **{"bert.pooler.dense.weight": torch.zeros(48, 48), "cls.seq_relationship.weight": torch.zeros(2, 48)}
    )
    check_same(tmp_path)
    check_same(tmp_path, auto_class="AutoModelForMaskedLM")


def test_tables_for_each_layer_are_left_to_the_model(tmp_path: Path) -> None:
    save(tmp_path, "gemma4-untied")
    with pytest.raises(Unsure):
        estimate_from_headers(tmp_path, KEPT, **OPTIONS | {"auto_class": "AutoModelForCausalLM"})


def test_a_model_without_a_head_has_names_without_a_prefix(tmp_path: Path) -> None:
    transformers.BertModel(small_model("bert").config).save_pretrained(tmp_path / "bert")
    check_same(tmp_path / "bert")
    transformers.GPT2Model(small_model("gpt2-tied").config).save_pretrained(tmp_path / "gpt2")
    rewrite(tmp_path / "gpt2", **{"h.0.attn.bias": torch.zeros(1, 1, 8, 8)})  # a mask, as old files have it
    check_same(tmp_path / "gpt2", auto_class="AutoModelForCausalLM")


def test_names_of_old_files_are_taken_for_what_they_are(tmp_path: Path) -> None:
    save(tmp_path, "bert")
    old = load_file(tmp_path / "model.safetensors")
    new = {
        name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): its for name, its in old.items()
    }
    save_file(new, tmp_path / "model.safetensors", metadata={"format": "pt"})
    check_same(tmp_path)


def test_shards_and_halves_are_read_alike(tmp_path: Path) -> None:
    small_model("llama-untied").bfloat16().save_pretrained(tmp_path, max_shard_size="40kB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    for output in (None, "frozen", "restricted"):
        check_same(tmp_path, auto_class="AutoModelForCausalLM", output=output)
    check_same(tmp_path, PartialVocabulary([3, 5, 9], FULL_SIZE), precision="bf16", optimizer="sgd")


def test_classes_of_a_config_are_counted(tmp_path: Path) -> None:
    save(tmp_path, "bert-tied", num_labels=7)
    check_same(tmp_path)


@pytest.mark.parametrize(
    ("config", "tensors"),
    [
        ({"num_hidden_layers": 1}, {}),
        ({"num_hidden_layers": 3}, {"bert.encoder.layer.0.output.dense.bias": None}),  # a layer that is new, and a bias
        ({}, {"bert.encoder.layer.0.gate": torch.zeros(48)}),
        ({"type_vocab_size": 2}, {"bert.embeddings.token_type_embeddings.weight": None}),
    ],
)
def test_what_is_too_much_or_too_little_is_counted_as_the_model_has_it(
    tmp_path: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor | None]
) -> None:
    save(tmp_path)
    edit(tmp_path, **config)
    rewrite(tmp_path, **tensors)
    check_same(tmp_path)


@pytest.mark.parametrize(
    ("config", "tensors"),
    [
        ({"vocab_size": FULL_SIZE + 1}, {}),
        ({"model_type": "no_such_model"}, {}),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, {}),
        ({"auto_map": {"AutoModel": "modeling.Model"}}, {}),
        ({}, {"bert.encoder.layer.0.output.dense.weight": torch.zeros(48, 64, dtype=torch.int8)}),
        ({}, {"bert.embeddings.word_embeddings.weight": torch.zeros(3, 48)}),
        (
            {},
            {
                "bert.encoder.layer.0.output.dense.weight": None,
                "bert.encoder.layer.0.output.dense.split": torch.zeros(9),
            },
        ),
    ],
)
def test_what_disagrees_is_not_answered(
    tmp_path: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor | None]
) -> None:
    save(tmp_path)
    edit(tmp_path, **config)
    rewrite(tmp_path, **tensors)
    with pytest.raises(Unsure):
        estimate_from_headers(tmp_path, KEPT, **OPTIONS)


@pytest.mark.parametrize(
    "options",
    [
        {"kept": 0},
        {"kept": FULL_SIZE + 1},
        {"kept": PartialVocabulary([1], FULL_SIZE - 1)},
        {"optimizer": "adafactor"},
        {"precision": "fp16"},
        {"auto_class": "AutoModelForCausalLM", "output": "full"},
        {"auto_class": "AutoModelForSequenceClassification", "output": "frozen"},
        {"auto_class": "AutoModelForSeq2SeqLM"},
    ],
)
def test_what_is_refused_or_of_another_kind_is_left_to_the_model(tmp_path: Path, options: dict[str, Any]) -> None:
    save(tmp_path, "llama-tied")
    with pytest.raises(Unsure):
        estimate_from_headers(tmp_path, options.pop("kept", KEPT), **OPTIONS | options)


def test_a_folder_without_files_or_with_pickles_is_left_to_the_model(tmp_path: Path) -> None:
    small_model("bert").config.save_pretrained(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Unsure, match=r"model\.safetensors"):
        estimate_from_headers(tmp_path, KEPT, **OPTIONS)


def test_a_hub_name_is_found_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert folder_of("somebody/bert") is None
    cached = tmp_path / "models--somebody--bert"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    save(cached / "snapshots" / "abc")
    check_same(folder_of("somebody/bert"))  # type: ignore[arg-type]


def test_a_condition_that_is_not_known_is_no_guess() -> None:
    config = small_model("bert").config.to_dict()
    assert construct("bert", "AutoModel", config).at("pooler.dense.weight").shape == (48, 48)
    with pytest.raises(Unsure):
        construct("bert", "AutoModel", config | {"num_hidden_layers": None})


def test_the_command_loads_neither_torch_nor_transformers(tmp_path: Path) -> None:
    save(tmp_path)
    code = (
        f"import sys; sys.argv = ['leanvocab', 'estimate', {str(tmp_path)!r}, '--rows', '60']\n"
        "from leanvocab.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'datasets'} & sys.modules.keys()))"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert shown.stdout.splitlines()[-1] == "[]"
    assert "Activations are not among these figures: --activations counts a step" in shown.stdout
    assert not shown.stderr
