"""Nothing of a shrunk model outlives it: no hook, no set, no cache, no class; it is freed as soon as nobody holds it."""

import copy
import gc
import pickle
import subprocess
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import differing, train
from models import batch, small_model, twins, used_vocabulary
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_pre_hooks as hooks_of_all_optimizers

from leanvocab.errors import BypassError, LeanVocabWarning, VocabularyError
from leanvocab.model import stand_ins
from leanvocab.model.shrink import merge_, shrink_
from leanvocab.model.status import status
from leanvocab.partial.module import partial_modules, shrunk_modules
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

VOCABULARY = PartialVocabulary([0, 3, 5, 8], 9)
IDS = torch.tensor([[0, 3, 8]])


class Tiny(nn.Module):
    """A tied language model, small enough for a thousand of them."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.table.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        scores: Tensor = self.head(self.table(ids))
        return nn.functional.cross_entropy(scores.view(-1, 9), ids.view(-1))


def step(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    model(IDS).backward()
    optimizer.step()
    optimizer.state_dict()
    return optimizer


def shrunk() -> nn.Module:
    return shrink_(Tiny(), VOCABULARY)


def trained() -> nn.Module:
    model = shrunk()
    step(model)
    return model


def merged() -> nn.Module:
    model = shrunk()
    optimizer = step(model)
    merge_(model, optimizer=optimizer)
    assert not optimizer._optimizer_state_dict_post_hooks  # type: ignore[attr-defined]
    return model


def refused() -> nn.Module:
    model = Tiny()
    with pytest.raises(VocabularyError):
        shrink_(model, PartialVocabulary([3], 8))
    return model


def deep_copied() -> nn.Module:
    model = copy.deepcopy(trained())
    step(model)
    return model


def unpickled() -> nn.Module:
    model: nn.Module = pickle.loads(pickle.dumps(trained()))
    step(model)
    return model


def run_into_an_error() -> nn.Module:
    model = trained()
    with pytest.raises(IndexError):
        model(IDS + 1)
    return model


STORIES = [shrunk, trained, merged, refused, deep_copied, unpickled, run_into_an_error]


def own_objects() -> Counter[str]:
    names = (f"{type(each).__module__}.{type(each).__qualname__}" for each in gc.get_objects())
    return Counter(name for name in names if name.startswith("leanvocab."))


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Checks that a test leaves nothing of ours in torch, in our sets or in memory."""
    gc.collect()
    assert not list(shrunk_modules()), "a test before this one left a model to somebody"
    hooks, objects = len(hooks_of_all_optimizers), own_objects()
    yield
    gc.collect()
    assert not list(shrunk_modules())
    assert len(hooks_of_all_optimizers) == hooks
    assert own_objects() - objects == Counter()


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
def test_a_model_is_freed_as_soon_as_nobody_holds_it(story: Callable[[], nn.Module]) -> None:
    model = story()
    references = [weakref.ref(module) for module in model.modules()]
    gc.collect()
    gc.disable()
    try:
        del model
        assert [reference() for reference in references] == [None] * len(references)
        assert not list(shrunk_modules())
    finally:
        gc.enable()


@pytest.mark.usefixtures("nothing_left")
def test_transformers_models_are_freed_as_soon_as_nobody_holds_them() -> None:
    for family in ("roberta", "llama-untied"):
        model = shrink_(small_model(family), used_vocabulary())
        reference = weakref.ref(model)
        gc.collect()
        gc.disable()
        try:
            del model
            assert reference() is None
        finally:
            gc.enable()


@pytest.mark.usefixtures("nothing_left")
def test_a_thousand_models_leave_nothing_behind_their_classes_included() -> None:
    classes = []
    for number in range(1000):
        kind = type(f"Table{number}", (nn.Embedding,), {}) if number % 10 == 0 else nn.Embedding
        model = Tiny()
        model.table.__class__ = kind
        shrink_(model, VOCABULARY)
        if number % 50 == 0:
            step(model)
        classes += [weakref.ref(kind)] if kind is not nn.Embedding else []
    del model, kind
    for _ in range(2):  # the partial classes, and then those that they were made of
        gc.collect()
    assert [reference() for reference in classes] == [None] * 100


@pytest.mark.usefixtures("nothing_left")
def test_the_hook_stays_while_an_optimizer_holds_a_parameter_that_left_its_model() -> None:
    before = len(hooks_of_all_optimizers)
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    shrink_(model, VOCABULARY)
    del model
    assert len(hooks_of_all_optimizers) == before + 1
    del optimizer
    assert len(hooks_of_all_optimizers) == before


def test_a_failure_in_the_midst_of_shrinking_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    full, model = twins()
    _, optimizer = train(model)
    train(full)
    keys = {id(module): set(module.__dict__) for module in model.modules()}
    states = copy.deepcopy(optimizer.state_dict())

    def fail(model: nn.Module) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(stand_ins, "put_on", fail)
        with pytest.raises(MemoryError):
            shrink_(model, used_vocabulary(), optimizer=optimizer)
    assert {id(module): set(module.__dict__) for module in model.modules()} == keys
    assert not any(module._forward_pre_hooks or module._state_dict_hooks for module in model.modules())
    assert differing(full, model) == []
    assert str(optimizer.state_dict()) == str(states)
    assert train(model, optimizer)[0]


def test_a_warning_that_is_an_error_is_raised_before_anything_changes() -> None:
    model = Tiny()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(LeanVocabWarning, match='output="restricted" trains a softmax over 4 of 9 tokens'):
            shrink_(model, VOCABULARY, output="restricted")
    assert not status(model)


def test_what_stood_on_the_instance_is_called_and_stands_there_again_after_merging() -> None:
    model = small_model()
    model.num_parameters = lambda *options: 7
    own = model.num_parameters
    shrink_(model, used_vocabulary())
    table = next(iter(partial_modules(model).values()))
    assert model.num_parameters() == 7 + (500 - len(used_vocabulary())) * table.weight.shape[1]
    assert merge_(model).num_parameters is own


def test_a_model_around_one_that_was_merged_is_an_ordinary_one_again() -> None:
    model = nn.Sequential(small_model())
    shrink_(model, used_vocabulary(), embedding="0.roberta.embeddings.word_embeddings")
    merge_(model[0])
    weight = model[0].get_input_embeddings().weight  # type: ignore[operator]
    model[0].register_forward_hook(lambda module, args, output: (weight[0], None)[1])  # reads rows, as it may now
    model(batch()["input_ids"])


def test_an_adapter_refuses_to_merge_while_its_table_is_partial_and_only_then() -> None:
    class Adapter(nn.Module):
        def __init__(self, base_layer: nn.Module) -> None:
            super().__init__()
            self.base_layer = base_layer

        def merge(self) -> str:
            return "merged"

    model = nn.Sequential(Adapter(nn.Embedding(9, 4)))
    shrink_(model, VOCABULARY, embedding="0.base_layer")
    for adapter in (model[0], copy.deepcopy(model)[0]):
        with pytest.raises(
            BypassError, match=r"0\.base_layer: an adapter on a partial vocabulary matrix cannot be merged"
        ):
            adapter.merge()
    merge_(model[0].base_layer)
    assert model[0].merge() == "merged"


def test_a_model_that_is_unpickled_in_another_process_is_watched_there_too(tmp_path: Path) -> None:
    torch.save(shrink_(small_model(), used_vocabulary()), tmp_path / "model.pt")
    program = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
weight = model.get_input_embeddings().weight
optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
weight.grad = torch.ones_like(weight)
optimizer.step()
assert optimizer.state_dict()["state"][0]["momentum_buffer"].shape == (500, 48)
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "model.pt")], check=True)


def test_a_method_of_a_model_that_is_gone_says_so() -> None:
    with pytest.raises(Exception, match="keep the model in a variable"):
        shrink_(small_model(), used_vocabulary()).num_parameters()


def test_a_copy_of_a_model_stands_alone(tmp_path: Any) -> None:
    model = shrink_(small_model(), used_vocabulary())
    copied = copy.deepcopy(model)
    del model
    copied.save_pretrained(tmp_path)
    with pytest.raises(BypassError):
        copied.resize_token_embeddings(510)
    assert not status(merge_(copied))
