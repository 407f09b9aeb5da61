"""Reads of a weight around its module, told from the code: which are certain, which may come, and which are none."""

import copy
import functools
import gc
import sys
import types
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MobileBertConfig, MobileBertForMaskedLM

from leanvocab.errors import BypassError, LeanVocabWarning
from leanvocab.model.shrink import shrink_
from leanvocab.reads.weight_reads import reads_of
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

this = sys.modules[__name__]
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
            found = found + self.table.weight[5]
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


class InALambda(Base):
    def forward(self, ids: Tensor, pad: bool = False) -> Tensor:
        found: Tensor = self.table(ids)
        if pad:
            found = found + self.table.weight[5]
        return torch.stack(list(map(lambda each: each + self.bias.sum(), found)))  # noqa: C417


class InAComprehension(Base):
    def forward(self, ids: Tensor) -> Tensor:
        return torch.stack([each @ self.table.weight.t() for each in self.table(ids)])


class AsksWhetherThereIsOne(Base):
    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.table(ids)
        if self.table.weight is None or self.table.weight is self.bias:
            found = found + 1
        return found


class AsAProperty(Base):
    @property
    def rows(self) -> Tensor:
        return self.table.weight


def unsaid(function: Any) -> Any:
    def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper


def reading(function: Any) -> Any:
    def wrapper(*args: Any) -> Any:
        return args[0].table.weight[5]

    return wrapper


def padding_of(model: Any) -> Any:
    return model.table.weight[5]


def first_row(table: nn.Embedding) -> Tensor:
    return table.weight[5]


class Decorated(Base):
    @torch.no_grad()
    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.table(ids), self.table.weight)


class Hidden(Base):
    @unsaid
    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.table(ids), self.table.weight)


class Named(Base):
    """Reads under other names, each in a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = [self.table]
        self.heads = nn.ModuleList([nn.Linear(4, 2), self.table])

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, ids: Tensor, way: str = "") -> Tensor:
        found: Tensor = self.table(ids)
        return found + getattr(self, f"by_{way}")() if way else found


class Ways(Named):
    def by_alias(self) -> Tensor:
        table = self.table
        return table.weight[5]

    def by_getattr(self) -> Any:
        return getattr(self.table, "weight")[1]  # noqa: B009

    def by_a_list(self) -> Any:
        return self.kept[0].weight[5]

    def by_index(self) -> Any:
        return self.heads[-1].weight[5]

    def by_a_getter(self) -> Any:
        return self.get_input_embeddings().weight[5]

    def by_a_helper(self) -> Any:
        return padding_of(self)

    def by_handing_on(self) -> Any:
        return first_row(self.table)

    by_partial = functools.partialmethod(padding_of)

    def by_a_module(self) -> Any:
        return this.padding_of(self)

    @reading
    def by_all_arguments(self) -> None:
        return None


READS = {name: value for name, value in vars(Ways).items() if name.startswith("by_")}


class WithAGetter(Base):
    def forward(self, ids: Tensor, pad: bool = False) -> Tensor:
        return self.table(ids) + self.get_padding() if pad else self.table(ids)

    def get_padding(self) -> Tensor:
        return self.table.weight[5]


TEXT = """
class Typed(Base):
    def forward(self, ids, pad=False):
        found = self.table(ids)
        return found + self.table.weight[5] if pad else found

class Elsewhere(Base):
    def forward(self, ids):
        return self.table(ids) @ self.inner.weight

class Plain(Base):
    def forward(self, ids):
        return self.inner(ids)
"""
typed: dict[str, Any] = {"Base": Base}
exec(TEXT, typed)  # there is no source, as at the prompt


class Compiled(Base):
    forward = str.join  # stands for a method of no Python code


class OfItsOwn(nn.Embedding):
    def forward(self, ids: Tensor, pad: bool = False) -> Tensor:
        found = super().forward(ids)
        return found + self.weight[5] if pad else found


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
        (InALambda, [("InALambda.forward reads the weight of", False)]),
        (InAComprehension, [("InAComprehension.forward calls t on the weight of", False)]),
        (AsksWhetherThereIsOne, []),
        (AsAProperty, [("AsAProperty.rows reads the weight of", False)]),
        (Decorated, [("Decorated.forward reads the weight of", True)]),
        (Hidden, [("Hidden.forward reads the weight of", False)]),  # a decorator that does not say what it is around
        (WithAGetter, [("WithAGetter.get_padding reads the weight of", False)]),
        (typed["Typed"], [("Typed.forward reads the weight of", False)]),
        (typed["Elsewhere"], [("Elsewhere.forward reads the weight of", False)]),  # not to be told without source
        (typed["Plain"], []),
        (Compiled, [("Compiled.forward reads the weight of", False)]),
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


def check_answered(full: Any, model: Any, **options: Any) -> None:
    """Two forwards without the read, which would end the watch of a model whose code reads nothing, and then one with it."""
    shrink_(model, VOCABULARY, embedding="table")
    for _ in range(2):
        assert torch.equal(model(LOW), full(LOW))
    assert torch.equal(model(LOW, **options), full(LOW, **options))
    assert torch.equal(model(LOW), full(LOW))


@pytest.mark.parametrize("kind", [Sometimes, InALambda, WithAGetter, typed["Typed"]])
def test_a_branch_that_a_later_forward_is_the_first_to_come_to_is_answered_there(kind: Any) -> None:
    full = kind()
    check_answered(full, copy.deepcopy(full), pad=True)


@pytest.mark.parametrize("way", [name.removeprefix("by_") for name in READS])
def test_a_branch_that_reads_by_another_name_is_answered_where_it_comes(way: str) -> None:
    full = type("OnlyOne", (Named,), {f"by_{way}": READS[f"by_{way}"]})()
    check_answered(full, copy.deepcopy(full), way=way)


def test_a_branch_that_reads_all_rows_is_refused_where_it_comes() -> None:
    class Sums(Base):
        def forward(self, ids: Tensor, pad: bool = False) -> Tensor:
            found: Tensor = self.table(ids)
            return found + self.table.weight.sum(0) if pad else found

    model = shrink_(Sums(), VOCABULARY, embedding="table")
    for _ in range(2):
        model(LOW)
    with pytest.raises(BypassError, match=r"Sums\.forward calls sum on the weight of table itself"):
        model(LOW, pad=True)
    model(LOW)


def test_a_table_that_reads_its_own_weight_in_a_branch_is_answered_there() -> None:
    full = nn.ModuleDict({"table": OfItsOwn(10, 4)})
    model = copy.deepcopy(full)
    for each in (full, model):
        each.forward = lambda ids, each=each, **options: each["table"](ids, **options)  # type: ignore[method-assign]
    check_answered(full, model, pad=True)


def test_a_forward_that_was_put_in_the_place_of_the_first_is_the_one_that_is_read() -> None:
    class Patched(Base):
        def forward(self, ids: Tensor) -> Tensor:
            found: Tensor = self.table(ids)
            return found

    model = Patched()
    assert reads_of(model, [model.table]) == []
    Patched.forward = Sometimes.forward  # type: ignore[method-assign, assignment]
    assert [read.where for read in reads_of(model, [model.table])] == ["Patched.forward"]
    del Patched.forward
    model.forward = types.MethodType(Sometimes.forward, model)
    assert [read.where for read in reads_of(model, [model.table])] == ["Patched.forward"]
    model.forward = lambda ids: model.table(ids) + model.table.weight[5]
    assert [read.where for read in reads_of(model, [model.table])] == ["Patched.forward"]


def test_attributes_of_other_kinds_on_the_way_lead_nowhere() -> None:
    model = Base()
    model.heads = types.SimpleNamespace(_modules={"inner"})
    model.by_parts = types.MethodType(lambda self: self.heads.inner.weight + self.heads[0].weight, model)
    assert reads_of(model, [model.table]) == []


def test_a_class_whose_code_was_read_can_be_collected() -> None:
    kind = type("Passing", (Sometimes,), {"forward": lambda self, ids: F.linear(self.table(ids), self.table.weight)})
    model = kind()
    assert reads_of(model, [model.table])
    alive = weakref.ref(kind)
    del kind, model
    gc.collect()
    assert alive() is None


def test_a_forward_whose_lambda_looks_rows_up_itself_is_one_of_its_own() -> None:
    class Lazily(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return (lambda: super(Lazily, self).forward(ids) + F.embedding(ids, self.weight))()

    class Inside(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            def look() -> Tensor:
                return super(Inside, self).forward(ids)

            return look()

    with pytest.raises(BypassError, match=r"0: Lazily\.forward looks rows up in the weight itself"):
        shrink_(nn.Sequential(Lazily(10, 4)), VOCABULARY, embedding="0")
    assert shrink_(nn.Sequential(Inside(10, 4)), VOCABULARY, embedding="0")(LOW).shape == (1, 3, 4)


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


class Scores(Base):
    def score(self, hidden: Tensor) -> Tensor:
        return hidden + self.table.weight[5]

    def forward(self, ids: Tensor) -> Tensor:
        return self.score(self.table(ids))


@pytest.mark.parametrize("kind", [Sometimes, Scores])
def test_a_compiled_forward_that_may_read_is_refused_since_nothing_watches_it(kind: Any) -> None:
    compiled = torch.compile(shrink_(kind(), VOCABULARY, embedding="table"), backend="eager")
    with pytest.raises(
        BypassError, match=f"{kind.__name__}.* reads the weight of table itself.*Compile the layers below"
    ):
        compiled(LOW)
    torch._dynamo.reset()


@pytest.mark.parametrize("keep", [lambda weight: weight, lambda weight: [weight], lambda weight: {"a": weight.data}])
def test_a_reference_beside_the_module_would_not_train_and_is_refused(keep: Any) -> None:
    model = Overridden()
    model.__dict__["kept"] = keep(model.table.weight)
    with pytest.raises(BypassError, match=r"kept of Overridden keeps table\.weight beside its module"):
        shrink_(model, VOCABULARY, embedding="table")
    del model.kept
    shrink_(model, VOCABULARY, embedding="table")
