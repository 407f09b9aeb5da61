"""What a checkpoint is, from its headers alone, and which rows were trained."""

import pytest
import torch
from models import FULL_SIZE
from safetensors.torch import load_file
from texts import save_pretrained
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from leanvocab.errors import CheckpointError
from leanvocab.reports.inspection import inspect_checkpoint, read_tensors, trained_rows

SIZES = {
    "vocab_size": FULL_SIZE, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 128,
}  # fmt: skip


def test_headers_say_what_loading_the_file_would(tmp_path):
    folder = save_pretrained(tmp_path / "base")
    loaded = load_file(folder / "model.safetensors")
    headers = read_tensors(folder)
    assert {name: each.shape for name, each in headers.items()} == {n: tuple(t.shape) for n, t in loaded.items()}
    assert sum(each.num_bytes for each in headers.values()) == sum(tensor.nbytes for tensor in loaded.values())


def test_a_checkpoint_is_described_without_loading_weights(tmp_path, monkeypatch):
    folder = save_pretrained(tmp_path / "base", BertForSequenceClassification(BertConfig(**SIZES)))
    monkeypatch.setattr(torch, "load", pytest.fail)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", pytest.fail)
    found = inspect_checkpoint(folder)
    assert (found.model_class, found.model_type) == ("BertForSequenceClassification", "bert")
    assert (found.full_size, found.input_table.name) == (FULL_SIZE, "bert.embeddings.word_embeddings.weight")
    assert [each.name for each in found.vocabulary_tensors] == ["bert.embeddings.word_embeddings.weight"]
    assert found.ties == ()
    assert found.dtypes == {"F32": found.num_parameters}


@pytest.mark.parametrize("tied", [True, False])
def test_ties_and_output_layers_are_named(tmp_path, tied):
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=tied))
    found = inspect_checkpoint(save_pretrained(tmp_path / "llama", model))
    both = ("model.embed_tokens.weight", "lm_head.weight")
    assert found.ties == ((both,) if tied else ())
    assert {each.name for each in found.vocabulary_tensors} == ({both[0]} if tied else set(both))


def test_shards_are_read_as_one(tmp_path):
    model = BertForSequenceClassification(BertConfig(**SIZES))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    model.save_pretrained(tmp_path / "single")
    sharded, single = (inspect_checkpoint(tmp_path / name) for name in ("sharded", "single"))
    assert sharded.num_parameters == single.num_parameters == model.num_parameters()
    assert trained_rows(sharded, single).tolist() == []


def test_trained_rows_are_those_that_differ_in_any_bit(tmp_path):
    base = save_pretrained(tmp_path / "base")  # a base model: no prefix in its names
    tuned = BertForSequenceClassification.from_pretrained(base)
    with torch.no_grad():
        tuned.get_input_embeddings().weight[7, 3] += 1e-3
        tuned.get_input_embeddings().weight[FULL_SIZE - 1] *= 1.001
    tuned.save_pretrained(tmp_path / "tuned")
    rows = trained_rows(inspect_checkpoint(tmp_path / "tuned"), inspect_checkpoint(base))
    assert rows.tolist() == [7, FULL_SIZE - 1]


def test_tables_of_other_sizes_cannot_be_compared(tmp_path):
    base = save_pretrained(tmp_path / "base")
    larger = save_pretrained(
        tmp_path / "larger", BertForSequenceClassification(BertConfig(**SIZES | {"vocab_size": 600}))
    )
    with pytest.raises(CheckpointError, match=r"cannot be compared: .*larger has \(600, 16\), .*base \(500, 16\)"):
        trained_rows(inspect_checkpoint(larger), inspect_checkpoint(base))


def test_what_is_no_checkpoint_is_an_error_that_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="holds no model"):
        inspect_checkpoint(tmp_path)
    with pytest.raises(
        CheckpointError, match="'no/such-model' is no folder here, and the hub gave no model of that name"
    ):
        inspect_checkpoint("no/such-model")
    folder = save_pretrained(tmp_path / "base")
    (folder / "model.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0hello")
    with pytest.raises(CheckpointError, match=r"model.safetensors: expected JSON"):
        inspect_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"expected model.safetensors or model.safetensors.index.json, found neither"
    ):
        inspect_checkpoint(folder)
