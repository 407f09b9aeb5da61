"""Every vocabulary-sized tensor of a model is listed once, with what becomes of it."""

import json
from typing import Any

import pytest
import torch
import transformers
from models import FULL_SIZE, small_gemma3n, small_model, used_vocabulary
from torch import nn

from leanvocab.model.shrink import merge_, shrink_
from leanvocab.partial.module import PartialModule
from leanvocab.reports.inventory import NOT_UNDERSTOOD, take_inventory

PARTIAL, WHOLE = "partial", "stays whole"


def listed(model: nn.Module, mode: str) -> dict[str, tuple[str, str | None]]:
    """First name → (kind, what becomes of it)."""
    found = take_inventory(model).tensors
    return {each.names[0]: (each.kind, each.outcomes.get(mode)) for each in found}


def test_a_tied_decoder_has_one_matrix() -> None:
    model = small_model("llama-tied")
    found = take_inventory(model)
    (only,) = found.tensors
    assert only.names == ("model.embed_tokens.weight", "lm_head.weight")
    assert (only.kind, only.shape, only.dtype) == ("input table and output weight", (FULL_SIZE, 48), "float32")
    assert only.num_bytes == FULL_SIZE * 48 * 4
    assert found.num_bytes == sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    assert only.outcomes == {"frozen": PARTIAL, "restricted": PARTIAL}
    assert found.default_mode == "frozen"
    assert list(found.refusals) == ["full"]
    assert "tied to the output layer lm_head.weight" in found.refusals["full"]


def test_an_untied_decoder_has_two_and_the_output_weight_stays_whole_in_full_mode() -> None:
    model = small_model("llama-untied")
    assert take_inventory(model).default_mode == "full"
    for mode, output in (("full", WHOLE), ("frozen", PARTIAL), ("restricted", PARTIAL)):
        assert listed(model, mode) == {
            "model.embed_tokens.weight": ("input table", PARTIAL),
            "lm_head.weight": ("output weight", output),
        }


def test_a_classifier_has_an_input_table_alone() -> None:
    found = take_inventory(small_model())
    assert [(each.kind, dict(each.outcomes)) for each in found.tensors] == [("input table", {"full": PARTIAL})]
    assert found.default_mode is None
    assert "has no output layer" in found.refusals["frozen"]


def test_the_bias_of_a_masked_language_model_is_listed_once_and_stays_whole() -> None:
    found = {each.kind: each for each in take_inventory(small_model("bert-tied")).tensors}
    assert set(found) == {"input table and output weight", "output bias"}
    assert set(found["output bias"].names) == {"cls.predictions.bias", "cls.predictions.decoder.bias"}
    assert found["output bias"].outcomes["frozen"] == WHOLE


def test_encoder_decoder_shared_and_output_are_one_and_the_buffer_is_another() -> None:
    found = {each.kind: each for each in take_inventory(small_model("bart-tied")).tensors}
    assert len(found["input table and output weight"].names) == 4
    assert found["buffer"].names == ("final_logits_bias",)
    assert (found["buffer"].shape, found["buffer"].outcomes["frozen"]) == ((1, FULL_SIZE), WHOLE)


def test_tables_for_each_layer_are_input_tables_though_their_size_is_another() -> None:
    with torch.device("meta"):
        model = transformers.Gemma3nForCausalLM(small_gemma3n())
    model.tie_weights()
    found = listed(model, "frozen")
    assert found["model.embed_tokens.weight"] == ("input table and output weight", PARTIAL)
    assert found["model.embed_tokens_per_layer.weight"] == ("input table", PARTIAL)


def test_mobileberts_head_is_listed_with_its_transposed_half_and_refused() -> None:
    config = transformers.MobileBertConfig(
        vocab_size=FULL_SIZE, hidden_size=24, embedding_size=16, true_hidden_size=16, intra_bottleneck_size=16,
        num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.MobileBertForMaskedLM(config)
    model.tie_weights()
    found = take_inventory(model)
    kinds = {each.names[0]: (each.kind, each.shape) for each in found.tensors}
    assert kinds["cls.predictions.dense.weight"] == ("another layer", (8, FULL_SIZE))
    assert "MobileBertLMPredictionHead.forward" in found.refusals["frozen"]
    assert found.default_mode is None


def test_views_of_one_memory_are_one_tensor_and_what_nobody_knows_is_not_understood() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(70, 4)
            self.transposed = nn.Parameter(self.table.weight.detach().t())
            self.mixing = nn.Parameter(torch.zeros(70, 70))
            self.small = nn.Parameter(torch.zeros(4, 4))

    found = {each.names: each for each in take_inventory(Odd(), embedding="table").tensors}
    assert set(found) == {("transposed", "table.weight"), ("mixing",)}
    assert found[("mixing",)].kind == NOT_UNDERSTOOD
    assert not found[("mixing",)].is_understood


@pytest.mark.parametrize("family", ["llama-tied", "llama-untied", "bert-tied", "bart-tied", "gemma2-softcap"])
@pytest.mark.filterwarnings('ignore:.*output="restricted" trains a softmax:UserWarning')
def test_what_is_said_is_what_happens_and_the_model_is_left_alone(family: str) -> None:
    model = small_model(family)
    shapes = {name: value.shape for name, value in model.named_parameters(remove_duplicate=False)}
    found = take_inventory(model)
    assert {name: value.shape for name, value in model.named_parameters(remove_duplicate=False)} == shapes
    modes = [None, *(mode for mode in ("full", "frozen", "restricted") if mode not in found.refusals)]
    for mode in modes:
        shrink_(model, used_vocabulary(), output=mode)  # type: ignore[arg-type]
        partial = {f"{path}.weight" for path, each in model.named_modules() if isinstance(each, PartialModule)}
        said: Any = mode or found.default_mode
        assert partial == {name for each in found.tensors if each.outcomes[said] == PARTIAL for name in each.names}
        assert take_inventory(model).refusals == dict.fromkeys(
            ("full", "frozen", "restricted"), f"{type(model).__name__} is shrunk; merge_(model) first"
        )
        merge_(model)


def test_the_meta_device_and_json_will_do() -> None:
    with torch.device("meta"):
        model = small_model("bart-tied")
    model.tie_weights()  # transformers 5.0 leaves what has no memory untied
    on_meta, real = take_inventory(model), take_inventory(small_model("bart-tied"))
    assert on_meta == real
    read = json.loads(json.dumps(on_meta.to_dict()))
    assert read["default_mode"] == "frozen"
    assert read["tensors"][0]["ratio"] == real.tensors[0].num_bytes / real.num_bytes
    assert read["tensors"][0]["outcomes"]["frozen"] == PARTIAL
