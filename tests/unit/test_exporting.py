"""A shrunk model is refused by everything that makes a file of its graph, and is exported as ever once it is merged."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import batch, small_model, used_vocabulary
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from leanvocab.model.shrink import merge_, shrink_
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

WHY = r"what is exported \(torch\.export, torch\.jit, torch\.fx, ONNX\) would be shrunk .*call merge_\(model\) first, then export"


class Scores(nn.Module):
    """Logits of a model of transformers, as exporters want them."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        scores: Tensor = self.model(ids).logits
        return scores


def to_onnx(model: nn.Module, ids: Tensor) -> None:
    torch.onnx.export(model, (ids,), io.BytesIO(), dynamo=False)


def to_fx(model: nn.Module, ids: Tensor) -> None:
    make_fx(lambda given: model(given))(ids)


EXPORTERS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "export": lambda model, ids: torch.export.export(model, (ids,), strict=False),
    "strict export": lambda model, ids: torch.export.export(model, (ids,), strict=True),
    "trace": lambda model, ids: torch.jit.trace(model, (ids,)),
    "onnx": to_onnx,
    "fx": to_fx,
}
QUIET = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::torch.jit.TracerWarning",
    "ignore:`is_gradient_checkpointing`:FutureWarning",  # tracing asks for each property of a model
    "ignore:While compiling, we found certain side effects:UserWarning",  # transformers' own
)


@QUIET
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", ["roberta", "bert-tied", "llama-untied", "bart-tied"])
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_a_shrunk_model_is_not_exported(exporter: str, family: str, training: bool) -> None:
    model = shrink_(small_model(family), used_vocabulary())
    model.config.use_cache = False
    with pytest.raises(Exception, match=WHY):
        EXPORTERS[exporter](Scores(model).train(training), batch()["input_ids"])


@QUIET
@pytest.mark.parametrize("exporter", ["export", "strict export", "trace"])
def test_it_goes_on_working_and_is_exported_once_it_is_merged(exporter: str) -> None:
    ids, full = batch()["input_ids"], Scores(small_model()).eval()
    model = Scores(shrink_(copy.deepcopy(full.model), used_vocabulary())).eval()
    with pytest.raises(Exception, match=WHY):
        EXPORTERS[exporter](model, ids)
    assert torch.equal(model(ids), full(ids))
    merge_(model.model)
    try:
        made = EXPORTERS[exporter](model, ids)
    except Exception as error:  # of a transformers that exports no model so
        with pytest.raises(type(error)):
            EXPORTERS[exporter](full, ids)
        pytest.skip(f"a model that never was shrunk is not exported so either: {error}")
    assert torch.equal((made if exporter == "trace" else made.module())(ids), full(ids))


@QUIET
def test_a_module_is_not_scripted() -> None:
    model = shrink_(nn.Sequential(nn.Embedding(9, 4)), PartialVocabulary([0, 3, 5, 8], 9), embedding="0")
    with pytest.raises(Exception, match=WHY):
        torch.jit.script(model)
    torch.jit.script(merge_(model))


def test_a_module_is_not_traced_by_symbols() -> None:
    model = shrink_(nn.Sequential(nn.Embedding(10, 4)), PartialVocabulary([1, 7], 10), embedding="0")
    with pytest.raises(Exception, match=WHY):
        torch.fx.symbolic_trace(model)
