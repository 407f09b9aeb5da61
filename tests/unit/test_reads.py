"""Reads of a weight around its module, told from the code: which are certain, which may come, and which are none."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MobileBertConfig, MobileBertForMaskedLM

from leanvocab.errors import BypassError, LeanVocabWarning
from leanvocab.model.shrink import shrink_
from leanvocab.model.weight_reads import reads_of
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

VOCABULARY = PartialVocabulary([0, 1, 2, 5, 9], 10)
LOW = torch.tensor([[0, 1, 2]])


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.inner = nn.ModuleDict({"deep": nn.Embedding(10, 4)})
        self.bias = nn.Parameter(torch.zeros(10))


class Always(Base):
    def forward(self, ids: Tensor) -> Tensor:
        scores: Tensor = self.table(ids) @ self.table.weight.t()
        return scores


class PassedOn(Base):
    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.table(ids), self.table.weight)


class Sometimes(Base):
    def forward(self, ids: Tensor, pad: bool = False) -> Tensor:
        found: Tensor = self.table(ids)
        if pad:
            found = found + self.table.weight[1]
        return found


class AfterReturning(Base):
    def forward(self, ids: Tensor, pad: bool = True) -> Tensor:
        if pad:
            found: Tensor = self.table(ids)
            return found
        return F.embedding(ids, self.table.weight)


class InAnotherMethod(Base):
    def score(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.table.weight)

    def forward(self, ids: Tensor) -> Tensor:
        return self.score(self.table(ids))


class Inherited(Always):
    pass


class Overridden(Always):
    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.table(ids)
        return found


class Harmless(Base):
    def __init__(self) -> None:
        super().__init__()
        self.table.weight.data.normal_()

    def _init_weights(self) -> None:
        self.table.weight.data.zero_()

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.table(ids.to(self.table.weight.device)).to(self.table.weight.dtype)
        return found if self.table.weight.size(1) == 4 else found + self.bias


class Another(Base):
    def forward(self, ids: Tensor) -> Tensor:
        scores: Tensor = self.table(ids) @ self.inner.deep.weight.t()
        return scores


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Always, [("Always.forward calls t on the weight of", True)]),
        (PassedOn, [("PassedOn.forward reads the weight of", True)]),
        (Inherited, [("Inherited.forward calls t on the weight of", True)]),
        (Sometimes, [("Sometimes.forward reads the weight of", False)]),
        (AfterReturning, [("AfterReturning.forward reads the weight of", False)]),
        (InAnotherMethod, [("InAnotherMethod.score reads the weight of", False)]),
        (Overridden, [("Overridden.forward calls t on the weight of", False)]),  # super() may come there
        (Harmless, []),
        (Another, []),
    ],
)
def test_reads_are_found_in_the_code(kind: Any, expected: Any) -> None:
    model = nn.Sequential(kind())
    assert [(str(read), read.is_certain) for read in reads_of(model, [model[0].table])] == expected


def test_what_is_meant_is_found_by_the_module_and_not_by_its_name() -> None:
    model = Another()
    (read,) = reads_of(model, [model.inner.deep])
    assert read.attributes == ("inner", "deep")


def test_a_certain_read_is_refused_when_the_model_is_shrunk() -> None:
    model = Always()
    before = model.table.weight
    with pytest.raises(
        BypassError, match=r"Always.forward calls t on the weight of table itself \(self.table.weight\), in"
    ):
        shrink_(model, VOCABULARY, embedding="table")
    assert model.table.weight is before


def test_a_branch_that_a_later_forward_is_the_first_to_come_to_is_refused_there() -> None:
    model = shrink_(Sometimes(), VOCABULARY, embedding="table")
    for _ in range(3):
        model(LOW)
    with pytest.raises(BypassError, match=r"Sometimes.forward calls __getitem__ on the weight of table itself"):
        model(LOW, pad=True)
    model(LOW)


def test_mobilebert_is_refused_by_name_before_anything_changes() -> None:
    """Its head concatenates the decoder's weight, as wide as the vocabulary, with another matrix."""
    config = MobileBertConfig(
        vocab_size=40, hidden_size=24, embedding_size=16, true_hidden_size=16, intra_bottleneck_size=16,
        num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
    )  # fmt: skip
    model = MobileBertForMaskedLM(config)
    for mode in ("frozen", "restricted"):
        with pytest.raises(
            BypassError, match=r"MobileBertLMPredictionHead\.forward calls t on the weight of .*decoder\.weight"
        ):
            shrink_(model, PartialVocabulary([0, 3], 40), output=mode)


def test_reading_again_and_again_says_nothing(recwarn: pytest.WarningsRecorder) -> None:
    model = shrink_(Sometimes(), VOCABULARY, embedding="table")
    model(LOW)
    assert not [each for each in recwarn if issubclass(each.category, LeanVocabWarning)]
