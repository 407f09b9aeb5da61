"""Trimmed folders where they go: sentence-transformers, and onnxruntime after an export to ONNX."""

from pathlib import Path

import numpy as np
import pytest
import torch
from models import TEXT, make_model
from texts import small_tokenizer
from transformers import AutoModel, AutoTokenizer

import leanvocab as lv
from leanvocab.trimming.export import export_trimmed
from leanvocab.trimming.proof import prove
from leanvocab.trimming.recipe import RECIPE, read_recipe

TEXTS = ["word3 word9 word44", "word9 word120 word3", "word4"]
REAL = {
    "minilm": ["A cat sat on the mat.", "What is a vocabulary?"],
    "e5-small": ["query: ein Satz", "query: a sentence 123"],
}


def trimmed(base: Path, output: Path, texts: list[str]) -> None:
    """A folder trimmed to some texts."""
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModel.from_pretrained(base)
    counts = lv.count_tokens(texts, tokenizer=tokenizer)
    export_trimmed(base, lv.PartialVocabulary.from_counts(counts, tokenizer=tokenizer, model=model), output)
    assert len(AutoTokenizer.from_pretrained(output)) < len(tokenizer) / 3


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained") / "base"
    make_model("bert", TEXT, num_labels=2).base_model.save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


def real_model(name: str, repository: Path) -> Path:
    folder = repository / ".cache/models" / name
    if not folder.is_dir():
        pytest.skip(f"the real model {name} is not in .cache/models")
    return folder


def run_in_onnxruntime(folder: Path, file: Path, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The last hidden states that torch and onnxruntime give, of the model in a folder."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    example = dict(tokenizer(texts[:2], padding=True, return_tensors="pt"))
    sizes = {name: dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC) for name in example}
    torch.onnx.export(
        model, (), file, kwargs=example, dynamo=True, dynamic_shapes=sizes, input_names=list(example), verbose=False
    )
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    given = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        expected = model(**given).last_hidden_state.numpy()
    return expected, session.run(None, {name: tensor.numpy() for name, tensor in given.items()})[0]


@pytest.mark.filterwarnings("ignore")  # of torch's exporter, about its own parts
def test_a_trimmed_model_runs_in_onnxruntime_as_in_torch_and_as_the_whole_one(base: Path, tmp_path: Path) -> None:
    trimmed(base, tmp_path / "small", TEXTS)
    expected, got = run_in_onnxruntime(tmp_path / "small", tmp_path / "small.onnx", TEXTS)
    assert np.abs(expected - got).max() < 1e-5
    whole, tokenizer = AutoModel.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    with torch.inference_mode():
        before = whole(**tokenizer(TEXTS, padding=True, return_tensors="pt")).last_hidden_state.numpy()
    assert np.array_equal(before, expected)


@pytest.mark.slow
@pytest.mark.shared_data
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REAL)
def test_a_real_model_is_trimmed_proven_and_run_in_onnxruntime(name: str, repository: Path, tmp_path: Path) -> None:
    folder = real_model(name, repository)
    trimmed(folder, tmp_path / "small", REAL[name])
    kept = read_recipe(tmp_path / "small" / RECIPE).vocabulary
    assert prove(folder, tmp_path / "small", kept, REAL[name]).holds
    expected, got = run_in_onnxruntime(tmp_path / "small", tmp_path / "small.onnx", REAL[name])
    assert np.abs(expected - got).max() < 1e-4 * np.abs(expected).max()


def test_sentence_transformers_loads_a_trimmed_folder_and_gives_the_same_embeddings(base: Path, tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    whole = sentence_transformers.SentenceTransformer(str(base), device="cpu")  # with mean pooling
    whole.save(str(tmp_path / "whole"))
    trimmed(tmp_path / "whole", tmp_path / "small", TEXTS)
    small = sentence_transformers.SentenceTransformer(str(tmp_path / "small"), device="cpu")
    assert [type(module).__name__ for module in small] == [type(module).__name__ for module in whole]
    assert np.array_equal(whole.encode(TEXTS), small.encode(TEXTS))
