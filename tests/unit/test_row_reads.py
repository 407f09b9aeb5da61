"""Reads of rows by full ids around the lookup, beside the same reads of the full table: values, gradients, missing rows."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from comparing import differing, same_bits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.idefics.modeling_idefics import IdeficsDecoupledEmbedding

from leanvocab.errors import BypassError, LeanVocabWarning, MissingTokenError
from leanvocab.model.shrink import merge_, shrink_
from leanvocab.model.status import status
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

KEPT = [1, 3, 5, 8, 11]
VOCABULARY = PartialVocabulary(KEPT, 12)
IDS = torch.tensor([[8, 3, 3], [11, 1, 5]])

READS: dict[str, Callable[[nn.Embedding, Tensor], Any]] = {
    "weight[ids]": lambda table, ids: table.weight[ids],
    "weight[ids, :]": lambda table, ids: table.weight[ids, :],
    "weight[ids, None]": lambda table, ids: table.weight[ids, None],
    "weight[ids, ..., :2]": lambda table, ids: table.weight[ids, ..., :2],
    "weight[ids, columns]": lambda table, ids: table.weight[ids, torch.tensor([0, 2, 2])],
    "weight[negative ids]": lambda table, ids: table.weight[ids - 12],
    "weight[int32 ids]": lambda table, ids: table.weight[ids.int()],
    "weight[a list]": lambda table, ids: table.weight[ids.flatten().tolist()],
    "weight[an array]": lambda table, ids: table.weight[ids.flatten().numpy()],
    "weight[int]": lambda table, ids: table.weight[int(ids[0, 0])],
    "weight[int, :]": lambda table, ids: table.weight[int(ids[0, 0]), :],
    "weight[int, int]": lambda table, ids: table.weight[int(ids[0, 0]), 2],
    "weight[numpy int]": lambda table, ids: table.weight[np.int64(ids[0, 0])],
    "weight[-int]": lambda table, ids: table.weight[int(ids[0, 0]) - 12],
    "weight[a tensor of one id]": lambda table, ids: table.weight[ids[0, 0]],
    "weight.index_select": lambda table, ids: table.weight.index_select(0, ids.flatten()),
    "weight.index_select, named": lambda table, ids: table.weight.index_select(dim=-2, index=ids.flatten()),
    "torch.index_select": lambda table, ids: torch.index_select(table.weight, 0, ids.flatten()),
    "F.embedding": lambda table, ids: F.embedding(ids, table.weight),
    "F.embedding, named": lambda table, ids: F.embedding(weight=table.weight, input=ids),
    "F.embedding with padding": lambda table, ids: F.embedding(ids, table.weight, padding_idx=3),
    "F.embedding with padding from behind": lambda table, ids: F.embedding(ids, table.weight, padding_idx=-9),
    "F.embedding, padding that is not kept": lambda table, ids: F.embedding(ids, table.weight, padding_idx=0),
    "F.embedding, scaled by frequency": lambda table, ids: F.embedding(ids, table.weight, scale_grad_by_freq=True),
    "F.embedding, sparse": lambda table, ids: F.embedding(ids, table.weight, sparse=True),
    "torch.embedding": lambda table, ids: torch.embedding(table.weight, ids),
    "torch.embedding with padding": lambda table, ids: torch.embedding(table.weight, ids, 3),
}


class Reading(nn.Module):
    """Looks ids up, and reads the weight in a way of its own beside that."""

    def __init__(self, read: Callable[[nn.Embedding, Tensor], Any], **options: Any):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.read = nn.Embedding(12, 4, **options), read

    def forward(self, ids: Tensor, around: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.table(ids), self.read(self.table, ids if around is None else around)


def twins(read: Callable[[nn.Embedding, Tensor], Any], **options: Any) -> tuple[Any, Any]:
    full = Reading(read)
    return full, shrink_(copy.deepcopy(full), VOCABULARY, embedding="table", **options)


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_read_of_rows_gives_what_the_full_table_gives_and_trains_it_alike(read: Any) -> None:
    full, lean = twins(read)
    for step in range(3):
        for model in (full, lean):
            looked_up, rows = model(IDS)
            (looked_up.sin().sum() + (rows * torch.arange(rows.numel()).view_as(rows)).sum()).backward()
        assert all(map(same_bits, full(IDS), lean(IDS))), step
        gradients = (model.table.weight.grad.to_dense() for model in (full, lean))
        assert torch.equal(next(gradients)[KEPT], next(gradients))
        for model in (full, lean):
            torch.optim.SGD(model.parameters(), lr=0.01).step()
            model.zero_grad()
    assert torch.equal(merge_(lean).table.weight, full.table.weight)


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_rows_outside_come_from_the_base_in_evaluation_and_are_an_error_in_training(read: Any) -> None:
    full, lean = twins(read)
    outside = torch.tensor([[4, 3, 11], [4, 7, 1]])
    full.eval(), lean.eval()
    with pytest.warns(LeanVocabWarning, match="are served from the base"):
        expected, found = full(IDS, outside)[1], lean(IDS, outside)[1]
    assert same_bits(expected, found)
    assert status(lean).tables[0].num_served > 0
    lean.train()
    with pytest.raises(MissingTokenError, match=r"table: token id 4 .*is outside the partial vocabulary"):
        lean(IDS, outside)


def test_on_missing_base_serves_a_read_in_training_too_with_gradients_for_the_kept_rows_alone() -> None:
    full, lean = twins(lambda table, ids: table.weight[ids], on_missing="base")
    outside = torch.tensor([4, 3, 7])
    full(IDS, outside)[1].square().sum().backward()
    with pytest.warns(LeanVocabWarning, match="are served from the base"):
        rows = lean(IDS, outside)[1]
    rows.square().sum().backward()
    assert torch.equal(lean.table.weight.grad, full.table.weight.grad[KEPT])


def test_a_read_by_an_id_that_is_none_is_an_error() -> None:
    _, lean = twins(lambda table, ids: table.weight[12])
    with pytest.raises(MissingTokenError, match="id 12 at a read of the weight itself is no token id"):
        lean.eval()(IDS)


def test_partial_ids_are_read_as_they_are() -> None:
    full, lean = twins(lambda table, ids: table.weight[ids] + table.weight[int(ids[0, 0])], ids="partial")
    partial_ids = VOCABULARY.to_partial(IDS)
    assert all(map(same_bits, full(IDS), lean(partial_ids)))


def test_a_read_that_only_running_shows_is_answered_in_every_later_forward() -> None:
    """Without a source that says so: the watch goes on once it has answered."""
    full, lean = twins(lambda table, ids: getattr(table, "".join(["wei", "ght"]))[ids])
    for _ in range(3):
        assert all(map(same_bits, full(IDS), lean(IDS)))


def test_a_module_that_is_computed_again_in_the_backward_reads_the_same_rows() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Reading(lambda table, ids: table.weight[ids] * table.weight[5])

        def forward(self, ids: Tensor) -> Tensor:
            first, second = checkpoint(self.inner, ids, use_reentrant=False)
            return (first * second).sum()

    full = Checkpointed()
    lean = shrink_(copy.deepcopy(full), VOCABULARY, embedding="inner.table")
    for model in (full, lean):
        model(IDS).backward()
    assert torch.equal(lean.inner.table.weight.grad, full.inner.table.weight.grad[KEPT])


def test_a_function_that_is_computed_again_without_a_module_around_it_is_refused() -> None:
    _, lean = twins(lambda table, ids: checkpoint(lambda: table.weight[ids] * 2, use_reentrant=False))
    with pytest.raises(BypassError, match=r"Reading.forward reads rows of table itself in what is computed again"):
        lean(IDS)


def test_a_module_that_holds_no_table_and_is_computed_again_is_refused() -> None:
    """Its call begins no watch: in the backward nothing would see the read."""

    class Reader(nn.Module):
        def __init__(self, table: nn.Embedding):
            super().__init__()
            self.tables = [table]

        def forward(self, ids: Tensor) -> Tensor:
            return self.tables[0].weight[ids] * 2

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(12, 4)
            self.reader = Reader(self.table)

        def forward(self, ids: Tensor, again: bool = False) -> Tensor:
            return checkpoint(self.reader, ids, use_reentrant=False) if again else self.reader(ids)

    full = Model()
    lean = shrink_(copy.deepcopy(full), VOCABULARY, embedding="table")
    assert same_bits(lean(IDS), full(IDS))
    with pytest.raises(BypassError, match=r"Reader.forward reads rows of table itself in what is computed again"):
        lean(IDS, again=True)


def test_a_compiled_forward_that_reads_rows_is_refused_by_name() -> None:
    _, lean = twins(lambda table, ids: table.weight[ids])
    with pytest.raises(BypassError, match=r"reads the weight of table itself.*a compiled forward cannot be watched"):
        torch.compile(lean, backend="eager")(IDS)


# --- tables that look rows up themselves ------------------------------------------------------------------------------


class Indexing(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids] * 2 + self.weight[3]


class Doubling(nn.Embedding):
    """Looks rows up in a way of its own and keeps what it looked up in another room of its code."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows(ids) * 2

    def rows(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


OWN_TABLES: dict[str, Callable[[], nn.Embedding]] = {
    "Idefics with an additional table": lambda: IdeficsDecoupledEmbedding(12, 2, 4),
    "Idefics without": lambda: IdeficsDecoupledEmbedding(12, 0, 4),
    "weight[ids]": lambda: Indexing(12, 4),
    "in a method of its own": lambda: Doubling(12, 4),
}


WAYS: dict[str, Callable[[nn.Sequential], Callable[[Tensor], Tensor]]] = {
    "in a model": lambda model: model,
    "called by itself": lambda model: model[0],
    "by its forward": lambda model: model[0].forward,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("make", OWN_TABLES.values(), ids=OWN_TABLES)
def test_a_table_that_looks_rows_up_itself_is_answered(make: Any, way: Any) -> None:
    torch.manual_seed(0)
    full = nn.Sequential(make())
    lean = shrink_(copy.deepcopy(full), PartialVocabulary([0, *KEPT], 12), embedding="0")
    ids = torch.tensor([[8, 3, 13], [12, 1, 5]]) if getattr(full[0], "num_additional_embeddings", 0) else IDS
    for _ in range(3):
        called = [way(model) for model in (full, lean)]
        for forward in called:
            forward(ids).sin().sum().backward()
        for model in (full, lean):
            torch.optim.SGD(model.parameters(), lr=0.1).step()
            model.zero_grad()
        assert same_bits(*(forward(ids) for forward in called))
    assert same_bits(copy.deepcopy(lean)(ids), full(ids))
    with pytest.raises(MissingTokenError, match=r"0: token id 4 .*is outside the partial vocabulary"):
        called[1](torch.tensor([4]))
    full.eval(), lean.eval()
    with pytest.warns(LeanVocabWarning, match="are served from the base"):
        assert same_bits(*(way(model)(torch.tensor([4, 3])) for model in (full, lean)))
    assert not differing(full, lean)
    assert type(merge_(lean)[0]) is type(full[0])
    assert "forward" not in vars(lean[0])
    assert same_bits(full[0](ids), lean[0](ids))


def test_a_table_whose_forward_takes_all_rows_is_refused_at_once() -> None:
    class Multiplying(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return F.one_hot(ids, 12).float() @ self.weight + F.embedding(ids, self.weight)

    with pytest.raises(BypassError, match=r"0: Multiplying\.forward looks rows up in the weight itself"):
        shrink_(nn.Sequential(Multiplying(12, 4)), VOCABULARY, embedding="0")


def test_a_table_whose_own_lookup_renormalizes_rows_is_refused_when_it_runs() -> None:
    class Renormalizing(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return F.embedding(ids, self.weight, max_norm=1.0)

    lean = shrink_(nn.Sequential(Renormalizing(12, 4)), VOCABULARY, embedding="0")
    with pytest.raises(BypassError, match="calls embedding on the weight of 0 itself"):
        lean(IDS)
