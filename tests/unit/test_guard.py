"""Paths around the lookup, each with ids below the partial size: an index error would catch only the others."""

import copy
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from comparing import differing, train
from models import batch, small_lm, small_model, twins, used_vocabulary
from torch import Tensor, nn

from leanvocab.errors import BypassError, ModelError
from leanvocab.model.shrink import merge_, partial_state_dicts, shrink_
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

VOCABULARY = PartialVocabulary([0, 3, 5, 8], 9)
LOW = torch.tensor([0, 3])  # ids that are kept, and below the partial size


class Direct(nn.Module):
    """Reads the weight of its table in a way of its own."""

    def __init__(self, read: Any):
        super().__init__()
        self.table, self.read = nn.Embedding(9, 4), read

    def forward(self, ids: Tensor) -> Tensor:
        return self.read(self.table, ids)


READS = {
    "data": lambda table, ids: F.embedding(ids, table.weight.data),
    "detach": lambda table, ids: table.weight.detach()[ids],
    "a head of its own": lambda table, ids: F.linear(table(ids), table.weight),
    "a comparison": lambda table, ids: (table(ids)[:, None] == table.weight).all(2).nonzero()[:, 1],
    "in a list": lambda table, ids: torch.cat([table.weight, table(ids)]),
    "a slice": lambda table, ids: table.weight[:5],
    "a mask": lambda table, ids: table.weight[torch.ones(len(table.weight), dtype=torch.bool)],
    "a column": lambda table, ids: table.weight.index_select(1, ids),
    "a lookup that renorms": lambda table, ids: F.embedding(ids, table.weight, max_norm=1.0),
    "matmul with T": lambda table, ids: table(ids) @ table.weight.T,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_code_that_reads_the_weight_around_the_lookup_is_refused_by_name(read: Any, training: bool) -> None:
    model = shrink_(Direct(read), VOCABULARY, embedding="table").train(training)
    for _ in range(2):  # not only the first time
        with pytest.raises(
            BypassError, match=r"Direct\.forward calls .* on the weight of table itself, around the lookup"
        ):
            model(LOW)


def test_code_that_asks_about_the_weight_is_not_refused() -> None:
    def ask(table: nn.Embedding, ids: Tensor) -> Tensor:
        assert table.weight.dtype == torch.float32
        assert table.weight.shape[1] == table.weight.size(1) == 4
        assert table.weight.device.type == "cpu"
        assert table.weight.requires_grad
        assert table.weight.is_floating_point()
        return table(ids)

    full = Direct(ask)
    model = shrink_(copy.deepcopy(full), VOCABULARY, embedding="table")
    assert torch.equal(model(LOW), full(LOW))


def test_the_watch_ends_after_a_forward_that_passed_in_each_mode() -> None:
    model = shrink_(small_model(), used_vocabulary())
    guard = next(iter(model._forward_pre_hooks.values())).__self__
    for training in (True, False):
        assert not guard.has_passed(model.train(training))
        model(**batch())
        assert guard.has_passed(model)
    assert torch.overrides._get_current_function_mode_stack() == []


def test_a_forward_that_raises_leaves_no_watch_behind() -> None:
    model = shrink_(small_model(), used_vocabulary())
    with pytest.raises(ValueError, match="Expected input batch_size"):
        model(batch()["input_ids"], labels=torch.zeros(5, dtype=torch.int64))
    assert torch.overrides._get_current_function_mode_stack() == []
    full, _ = twins()
    assert train(model)[0] == train(full)[0]


def test_resizing_while_shrunk_is_refused_and_works_again_after_merging() -> None:
    full, model = twins()
    shrink_(model, used_vocabulary())
    for each in (model, model.roberta):
        with pytest.raises(BypassError, match=r"would be resized from its partial rows; call merge_\(model\), resize"):
            each.resize_token_embeddings(510)
    assert differing(full, model) == []
    merge_(model).resize_token_embeddings(510)
    assert model.roberta.embeddings.word_embeddings.weight.shape == (510, 48)


@pytest.mark.parametrize("length", [4, 9, 3])
def test_a_weight_of_another_length_is_refused_in_forward_saving_and_merging(length: int) -> None:
    model = shrink_(nn.Sequential(nn.Embedding(9, 4)), PartialVocabulary([0, 3, 5, 7, 8], 9))
    model[0].weight = nn.Parameter(torch.randn(length, 4))
    for action in (lambda: model(LOW), model.state_dict, lambda: merge_(model)):
        with pytest.raises(
            BypassError, match=rf"0: the weight has {length} rows, expected the 5 of the partial vocabulary"
        ):
            action()


def test_functional_call_takes_a_partial_state_dict_and_refuses_a_full_one() -> None:
    full, model = twins()
    ids = batch()["input_ids"]
    expected = full.eval()(ids).logits
    shrink_(model, used_vocabulary()).eval()
    with partial_state_dicts(model):
        partial = dict(model.state_dict())
    assert torch.equal(torch.func.functional_call(model, partial, (ids,)).logits, expected)
    with pytest.raises(BypassError, match="take the state dict within partial_state_dicts"):
        torch.func.functional_call(model, dict(model.state_dict()), (ids,))


class Doubling(ModelHook):
    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return output * 2


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_accelerate_hook_keeps_working_and_shadows_no_lookup(when: str) -> None:
    """Trap: the hook keeps a bound forward of the class that the module had when it was added."""
    full, model = (nn.Sequential(nn.Embedding(9, 4)) for _ in range(2))
    model.load_state_dict(full.state_dict())
    if when == "before":
        add_hook_to_module(model[0], Doubling())
    shrink_(model, VOCABULARY)
    if when == "after":
        add_hook_to_module(model[0], Doubling())
    assert torch.equal(model(torch.tensor([8, 0, 3])), 2 * full(torch.tensor([8, 0, 3])))
    merge_(model)
    assert torch.equal(model(torch.tensor([8, 1, 3])), 2 * full(torch.tensor([8, 1, 3])))
    remove_hook_from_module(model[0])
    assert torch.equal(model(torch.tensor([8, 1, 3])), full(torch.tensor([8, 1, 3])))


def test_a_hook_that_is_removed_while_shrunk_leaves_the_lookup_right_after_merging() -> None:
    model = nn.Sequential(nn.Embedding(9, 4))
    expected = model(torch.tensor([8, 1, 3]))
    add_hook_to_module(model[0], Doubling())
    shrink_(model, VOCABULARY)
    remove_hook_from_module(model[0])
    assert torch.equal(model(torch.tensor([8, 3])), expected[[0, 2]])
    merge_(model)
    assert torch.equal(model(torch.tensor([8, 1, 3])), expected)


REPLACED: dict[str, Any] = {
    "a lookup in the weight": lambda table: lambda ids: F.embedding(ids, table.weight),
    "around the forward that was there": lambda table: lambda ids, before=table.forward: before(ids) * 2,
    "a method of another class": lambda table: types.MethodType(lambda self, ids: self.weight[ids], table),
}


@pytest.mark.parametrize("make", REPLACED.values(), ids=REPLACED)
def test_a_forward_that_was_put_on_a_table_and_reads_rows_is_answered_in_the_model_and_by_itself(make: Any) -> None:
    full, model = (nn.Sequential(nn.Embedding(9, 4)) for _ in range(2))
    model.load_state_dict(full.state_dict())
    for each in (full, model):
        each[0].forward = make(each[0])
    shrink_(model, VOCABULARY)
    ids = torch.tensor([8, 0, 3])
    for _ in range(2):
        assert torch.equal(model(ids), full(ids))
        assert torch.equal(model[0](ids), full[0](ids))
    with pytest.raises(BypassError, match="a compiled forward cannot be watched"):
        torch.compile(model, backend="eager")(ids)
    merge_(model)
    assert torch.equal(model(torch.tensor([7])), full(torch.tensor([7])))


def test_a_forward_that_was_put_on_a_table_and_reads_all_rows_is_refused_where_it_comes() -> None:
    model = nn.Sequential(nn.Embedding(9, 4))
    model[0].forward = lambda ids: model[0].weight.mean(0)[None] + ids[:, None]
    shrink_(model, VOCABULARY)
    for each in (model, model[0]):
        with pytest.raises(BypassError, match="calls mean on the weight of 0 itself"):
            each(LOW)


def test_a_forward_that_was_put_on_an_output_layer_is_refused() -> None:
    model = small_lm("llama-untied")
    model.lm_head.forward = lambda hidden: F.linear(hidden, model.lm_head.weight)
    with pytest.raises(BypassError, match="lm_head: its forward was replaced on the instance"):
        shrink_(model, used_vocabulary(), output="frozen")


def test_an_offloaded_table_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(9, 4))
    add_hook_to_module(
        model[0], AlignDevicesHook(execution_device="cpu", offload=True, weights_map={"weight": model[0].weight})
    )
    with pytest.raises(ModelError, match="offloaded by accelerate; shrink the model before it is dispatched"):
        shrink_(model, VOCABULARY, embedding="0")


@pytest.mark.parametrize("mover", ["deepspeed.runtime.zero.partition_parameters", "another.module"])
def test_zero_3_may_move_rows_and_others_may_not(mover: str) -> None:
    """DeepSpeed gathers a parameter's rows in a hook before the module's forward."""
    names: dict[str, Any] = {"__name__": mover}
    exec("def gather(module, args): module.weight.data = module.weight.data.clone()", names)
    full = Direct(lambda table, ids: table(ids))
    model = shrink_(copy.deepcopy(full), VOCABULARY, embedding="table")
    model.table.register_forward_pre_hook(names["gather"])
    if mover.startswith("deepspeed"):
        assert torch.equal(model(LOW), full(LOW))
    else:
        with pytest.raises(BypassError, match="around the lookup"):
            model(LOW)


def test_a_module_that_was_tied_to_a_partial_matrix_since_is_refused_by_name() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    model.forward = lambda ids: model["head"](model["table"](ids))  # type: ignore[method-assign]
    shrink_(model, VOCABULARY, embedding="table")
    model["head"].weight = model["table"].weight
    with pytest.raises(
        BypassError, match=r"head: a Linear was given the partial weight of table, .* name both matrices"
    ):
        model(LOW)
