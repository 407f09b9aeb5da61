"""Tokenizers that fit neither their model nor the texts are refused, by every command, before anything is trained."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from runs import run
from texts import WORDS, save_pretrained, small_tokenizer, write, write_splits
from transformers import AutoConfig, AutoTokenizer

from leanvocab.errors import DataError, ModelError
from leanvocab.finetune.job import finetune
from leanvocab.finetune.settings import FineTuneSettings
from leanvocab.texts.fitting import check_sizes

pytestmark = pytest.mark.usefixtures("loud_libraries_afterwards")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pretrained(tmp_path_factory.mktemp("pretrained") / "base")


def without_tokenizer(base: Path, folder: Path) -> Path:
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("token*"))
    return folder


@pytest.mark.parametrize("command", ["finetune", "estimate", "count"])
def test_a_folder_without_tokenizer_files_is_refused(base: Path, tmp_path: Path, command: str) -> None:
    model, data = str(without_tokenizer(base, tmp_path / "model")), str(write_splits(tmp_path / "data"))
    words = {
        "finetune": [model, data, "--output-dir", tmp_path / "out"],
        "estimate": [model, "--data", data],
        "count": [data, "--tokenizer", model, "--output", tmp_path / "v.json"],
    }[command]
    shown = run(command, *words, code=1).stderr
    assert "tokenizer" in shown
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "v.json").exists()


def test_a_tokenizer_for_another_language_is_refused(base: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "train.csv", [{"text": f"Ж{n} Щ{n} {WORDS[0]}", "label": n % 2} for n in range(20)])
    with pytest.raises(
        DataError, match=r"\d+% of the tokens in the first 20 rows of split 'train' are '\[UNK\]'.*knows \d+ tokens"
    ):
        finetune(base, data, tmp_path / "out", FineTuneSettings(cpu=True))
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_and_a_model_of_other_sizes_are_refused() -> None:
    config: Any = AutoConfig.for_model("bert", vocab_size=30_522)
    with pytest.raises(
        ModelError, match=r"tokenizer of 'model' knows \d+ tokens, and the model has 30,522 rows: they do not"
    ):
        check_sizes(small_tokenizer(), config, "model")


@pytest.mark.shared_data
def test_real_tokenizers_fit_their_models(shared: Path) -> None:
    for folder in sorted((shared / "data/tokenizers").iterdir()):
        if (folder / "config.json").exists():
            check_sizes(AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder), folder.name)
