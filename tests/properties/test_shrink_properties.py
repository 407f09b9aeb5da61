"""For any table, vocabulary and ids: the shrunk table answers, trains, saves and merges as the full one does."""

import copy
from typing import Any

import pytest
import torch
from comparing import differing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from leanvocab.errors import LeanVocabWarning, MissingTokenError
from leanvocab.model.shrink import merge_, shrink_
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary


@st.composite
def cases(draw: Any) -> tuple[nn.Sequential, PartialVocabulary, torch.Tensor]:
    """A table of any size, dtype and options, a vocabulary of it, and ids that the vocabulary has."""
    rows, dim = draw(st.integers(2, 40)), draw(st.integers(1, 20))
    kept = draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=rows, unique=True))
    options = {
        "padding_idx": draw(st.none() | st.integers(-rows, rows - 1)),
        "max_norm": draw(st.sampled_from([None, 0.5])),
        "scale_grad_by_freq": draw(st.booleans()),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])),
    }
    torch.manual_seed(draw(st.integers(0, 99)))
    ids = draw(st.lists(st.sampled_from(kept), min_size=1, max_size=12))
    kind = draw(st.sampled_from([torch.int64, torch.int32]))
    return (
        nn.Sequential(nn.Embedding(rows, dim, **options)),
        PartialVocabulary(kept, rows),
        torch.tensor(ids, dtype=kind),
    )


@given(cases(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_shrunk_table_answers_trains_saves_and_merges_as_the_full_one(case: Any, adopt: bool) -> None:
    full, vocabulary, ids = case
    model = copy.deepcopy(full)
    optimizers = [torch.optim.Adam(each.parameters(), lr=0.1, foreach=False) for each in (full, model)]
    if not adopt:
        optimizers.pop()
    shrink_(model, vocabulary, optimizer=optimizers[1] if adopt else None)
    if not adopt:
        optimizers.append(torch.optim.Adam(model.parameters(), lr=0.1, foreach=False))
    for _ in range(3):
        outputs = [each(ids) for each in (full, model)]
        assert torch.equal(*outputs)
        for output, optimizer in zip(outputs, optimizers, strict=True):
            output.float().square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert differing(full, model) == []
    merge_(model)
    assert differing(full, model) == []
    assert repr(full) == repr(model)


@given(cases(), st.data())
@settings(max_examples=100, deadline=None)
def test_any_other_id_is_an_error_in_training_and_the_base_in_evaluation(case: Any, data: Any) -> None:
    full, vocabulary, ids = case
    outside = [i for i in range(vocabulary.full_size) if i not in vocabulary]
    if not outside:
        return
    ids = torch.cat([ids, torch.tensor([data.draw(st.sampled_from(outside))], dtype=ids.dtype)])
    model = shrink_(copy.deepcopy(full), vocabulary)
    with pytest.raises(MissingTokenError):
        model(ids)
    with pytest.warns(LeanVocabWarning, match="served from the base"):
        assert torch.equal(model.eval()(ids), full.eval()(ids))
