import copy
import io
import warnings
from typing import Any

import pytest
import torch
from comparing import differing, train
from models import FULL_SIZE, batch, small_model, twins, unseen_ids, used_vocabulary
from torch import Tensor, nn, optim
from torch.utils._pytree import tree_map_only
from transformers.optimization import Adafactor

from leanvocab.errors import LeanVocabWarning, OptimizerError
from leanvocab.model.shrink import merge_, shrink_, shrunk
from leanvocab.partial.optimizers import is_row_separable
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

TABLE = "roberta.embeddings.word_embeddings"


class SlowWeights(optim.Optimizer):
    """Descends, and goes half of the way back to a copy that follows slowly, as Lookahead and schedule-free ones do."""

    def __init__(self, parameters: Any, lr: float = 1e-2, weight_decay: float = 0.0):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})
        self.trains = False

    def train(self) -> None:
        self.trains = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert self.trains or not hasattr(self, "strict")
        for group in self.param_groups:
            for weight in group["params"]:
                slow = self.state[weight].setdefault("slow", weight.detach().clone())
                weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * weight.grad)
                slow.lerp_(weight, 0.5)
                weight.grad.add_(1.0)  # some work in the gradient's memory
                weight.copy_(slow)


class StrictSlowWeights(SlowWeights):
    """Steps in training mode alone, as schedule-free ones do."""

    strict = True


SEPARABLE: dict[str, tuple[type[optim.Optimizer], dict[str, Any]]] = {
    "SGD": (optim.SGD, {}),
    "momentum": (optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "Adam": (optim.Adam, {"amsgrad": True}),
    "AdamW": (optim.AdamW, {}),
    "AdamW fused": (optim.AdamW, {"fused": True}),
    "AdamW foreach": (optim.AdamW, {"foreach": True}),
    "Adagrad": (optim.Adagrad, {"initial_accumulator_value": 0.1}),
    "RMSprop": (optim.RMSprop, {"momentum": 0.9, "centered": True}),
    "Adadelta": (optim.Adadelta, {}),
    "Adamax": (optim.Adamax, {}),
    "NAdam": (optim.NAdam, {}),
    "RAdam": (optim.RAdam, {}),
    "Rprop": (optim.Rprop, {}),
    "slow weights": (SlowWeights, {}),
}


def made(name: str, model: nn.Module, **options: Any) -> optim.Optimizer:
    kind, own = SEPARABLE[name]
    if "Rprop" not in name:
        options = {"weight_decay": 0.0} | options
    return kind(model.parameters(), **{"lr": 1e-2} | own | options)


def saved(optimizer: optim.Optimizer) -> bytes:
    buffer = io.BytesIO()
    torch.save(tree_map_only(Tensor, Tensor.cpu, optimizer.state_dict()), buffer)  # full tables are on the host anyway
    return buffer.getvalue()


@pytest.mark.parametrize("name", SEPARABLE)
def test_model_and_optimizer_are_saved_byte_for_byte_as_ordinary_training_saves_them(name: str) -> None:
    full, model = twins()
    expected, ordinary = train(full, made(name, full))
    shrink_(model, used_vocabulary())
    losses, optimizer = train(model, made(name, model))
    assert losses == expected
    assert differing(full, model) == []
    assert saved(optimizer) == saved(ordinary)


@pytest.mark.parametrize("name", SEPARABLE)
def test_a_full_optimizer_state_is_resumed_in_partial_and_the_other_way_round(name: str) -> None:
    full, model = twins()
    vocabulary = used_vocabulary()
    _, ordinary = train(full, made(name, full))
    shrink_(model, vocabulary)
    model.load_state_dict(full.state_dict())
    resumed = made(name, model)
    resumed.load_state_dict(copy.deepcopy(ordinary.state_dict()))
    back = small_model()
    assert train(full, ordinary)[0] == train(model, resumed)[0]
    assert saved(resumed) == saved(ordinary)
    back.load_state_dict(model.state_dict())
    unshrunk = made(name, back)
    unshrunk.load_state_dict(resumed.state_dict())
    assert train(full, ordinary)[0] == train(back, unshrunk)[0]
    assert differing(full, back) == []


@pytest.mark.parametrize("name", SEPARABLE)
def test_an_optimizer_that_exists_is_handed_over_with_its_states_and_back(name: str) -> None:
    full, model = twins()
    _, ordinary = train(full, made(name, full))
    _, optimizer = train(model, made(name, model))
    shrink_(model, used_vocabulary(), optimizer=optimizer)
    assert any(
        each is model.get_submodule(TABLE).weight for group in optimizer.param_groups for each in group["params"]
    )
    assert train(full, ordinary)[0] == train(model, optimizer)[0]
    merge_(model, optimizer=optimizer)
    assert train(full, ordinary)[0] == train(model, optimizer)[0]
    assert differing(full, model) == []
    assert saved(optimizer) == saved(ordinary)


def test_the_context_manager_hands_the_optimizer_over_and_back() -> None:
    full, model = twins()
    _, ordinary = train(full)
    _, optimizer = train(model)
    with shrunk(model, used_vocabulary(), optimizer=optimizer):
        train(model, optimizer)
    train(full, ordinary)
    assert train(model, optimizer)[0] == train(full, ordinary)[0]


@pytest.mark.parametrize("kind", [SlowWeights, StrictSlowWeights])
def test_slow_weights_are_not_replayed_where_unused_rows_decay(kind: type[SlowWeights]) -> None:
    model = shrink_(small_model(), used_vocabulary(), decay_unused_rows=True)
    optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.1)
    optimizer.train()
    with pytest.raises(
        OptimizerError,
        match=r"decay_unused_rows=True cannot replay \w*SlowWeights, which keeps a copy of each row \('slow'\)",
    ):
        train(model, optimizer)


def test_states_that_would_be_lost_are_refused_before_anything_changes() -> None:
    _, model = twins()
    _, optimizer = train(model)
    before, states = copy.deepcopy(model.state_dict()), saved(optimizer)
    ids = used_vocabulary().token_ids
    with pytest.raises(
        OptimizerError, match=r"'exp_avg' of AdamW is not zero for 1 rows outside .* the first of them id \d+"
    ):
        shrink_(model, PartialVocabulary(ids[ids != batch()["input_ids"][1, 1].item()], FULL_SIZE), optimizer=optimizer)
    assert differing(before, model.state_dict()) == []
    assert saved(optimizer) == states
    train(model, optimizer)


def test_loaded_states_of_another_vocabulary_are_refused_before_a_step() -> None:
    model = shrink_(small_model(), used_vocabulary())
    _, optimizer = train(model)
    other = shrink_(small_model(), PartialVocabulary([*range(3), *unseen_ids()[0].tolist()], FULL_SIZE))
    resumed = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.0)
    resumed.load_state_dict(optimizer.state_dict())
    before = copy.deepcopy(other.state_dict())
    inputs = batch()
    inputs["input_ids"] = unseen_ids().repeat(6, 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with pytest.raises(OptimizerError, match="ordinary training would go on moving those rows"):
        train(other, resumed, steps=1, **inputs)
    assert differing(before, other.state_dict()) == []


def test_states_of_another_length_are_refused_before_a_fused_step_could_read_beyond_them() -> None:
    model = shrink_(small_model(), used_vocabulary())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True, weight_decay=0.0)
    train(model, optimizer, steps=1)
    weight = model.get_submodule(TABLE).weight
    optimizer.state[weight]["exp_avg"] = torch.zeros(17, 48)
    with pytest.raises(
        OptimizerError, match=r"'exp_avg' of AdamW has 17 rows, expected 500 \(full\) or \d+ \(partial\)"
    ):
        train(model, optimizer, steps=1)


@pytest.mark.parametrize("order", ["shrink", "merge"])
def test_an_optimizer_that_was_not_handed_over_is_an_error_at_its_first_step(order: str) -> None:
    """Without the error it would train a matrix that no model holds, silently."""
    model = small_model()
    if order == "merge":
        shrink_(model, used_vocabulary())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    shrink_(model, used_vocabulary()) if order == "shrink" else merge_(model)
    with pytest.raises(
        OptimizerError, match=r"no longer in the model, since the model was .*; build the optimizer after that"
    ):
        train(model, optimizer, steps=1)


# --- weight decay -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in SEPARABLE if name not in ("Rprop", "slow weights")])
def test_decay_replayed_on_unused_rows_equals_ordinary_decay_bit_for_bit(name: str) -> None:
    full, model = twins()
    ordinary = made(name, full, weight_decay=0.1)
    shrink_(model, used_vocabulary(), decay_unused_rows=True)
    optimizer = made(name, model, weight_decay=0.1)
    for round_number in range(3):  # rows and states are asked for between the rounds
        for each in (ordinary, optimizer):
            each.param_groups[0]["lr"] = 1e-2 / (1 + round_number)
        assert train(full, ordinary)[0] == train(model, optimizer)[0]
        assert differing(full, model) == []
        assert saved(optimizer) == saved(ordinary)
    merge_(model, optimizer=optimizer)
    assert train(full, ordinary)[0] == train(model, optimizer)[0]
    assert differing(full, model) == []


def test_decay_in_bf16_is_replayed_in_bf16() -> None:
    full, model = (each.to(torch.bfloat16) for each in twins())
    shrink_(model, used_vocabulary(), decay_unused_rows=True)
    for each in (full, model):
        train(each, made("AdamW", each, weight_decay=0.1), steps=10)
    assert differing(full, model) == []


def test_replayed_decay_reaches_rows_that_evaluation_reads() -> None:
    full, model = twins()
    shrink_(model, used_vocabulary(), decay_unused_rows=True)
    for each in (full, model):
        train(each, made("AdamW", each, weight_decay=0.1))
    with pytest.warns(LeanVocabWarning, match="served from the base"):
        assert torch.equal(model.eval()(unseen_ids()).logits, full.eval()(unseen_ids()).logits)


def test_resuming_with_coupled_decay_keeps_the_states_of_unused_rows() -> None:
    full, model = twins()
    ordinary = made("Adam", full, weight_decay=0.1)
    train(full, ordinary)
    shrink_(model, used_vocabulary(), decay_unused_rows=True)
    model.load_state_dict(full.state_dict())
    resumed = made("Adam", model, weight_decay=0.1)
    resumed.load_state_dict(copy.deepcopy(ordinary.state_dict()))
    assert train(full, ordinary)[0] == train(model, resumed)[0]
    assert differing(full, model) == []
    assert saved(resumed) == saved(ordinary)


def test_decay_without_replay_is_announced_once_and_leaves_unused_rows_as_they_were() -> None:
    model = shrink_(small_model(), used_vocabulary())
    with pytest.warns(
        LeanVocabWarning, match=r"AdamW decays this matrix \(weight_decay=0.1\).*decay_unused_rows=True"
    ) as caught:
        train(model, made("AdamW", model, weight_decay=0.1))
    assert len(caught) == 1
    row = int(unseen_ids()[0, 0])
    assert torch.equal(model.state_dict()[f"{TABLE}.weight"][row], small_model().state_dict()[f"{TABLE}.weight"][row])


def test_a_matrix_outside_the_decay_groups_is_announced_to_nobody() -> None:
    model = shrink_(small_model(), used_vocabulary())
    table = model.get_submodule(TABLE).weight
    rest = [p for p in model.parameters() if p is not table]
    groups = [{"params": [table], "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.1}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, torch.optim.AdamW(groups, lr=1e-2))


# --- which optimizers mix rows ----------------------------------------------------------------------------------------


class MyAdamW(optim.AdamW):
    """A subclass that nobody has heard of, and that keeps rows apart."""


class Centralized(optim.SGD):
    """Subtracts the mean gradient of all rows: mixes them."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.ndim == 2:
                    parameter.grad -= parameter.grad.mean(0)
        return super().step(closure)


class Peculiar(optim.SGD):
    def __init__(self, params: Any, model: Any):
        super().__init__(params, lr=0.1)


MIXING: list[tuple[Any, dict[str, Any]]] = [
    (Adafactor, {"lr": 1e-2, "relative_step": False, "scale_parameter": False}),
    (optim.Adafactor, {"lr": 1e-2}),
    (Centralized, {"lr": 1e-2}),
]


@pytest.mark.parametrize("name", SEPARABLE)
def test_the_optimizers_that_are_said_to_keep_rows_apart_do(name: str) -> None:
    class Unknown(SEPARABLE[name][0]):  # type: ignore[misc]
        pass

    optimizer = Unknown([nn.Parameter(torch.zeros(2, 2))], **SEPARABLE[name][1])
    assert is_row_separable(optimizer) is True


@pytest.mark.parametrize(("kind", "options"), MIXING, ids=lambda value: getattr(value, "__module__", None))
def test_an_optimizer_that_mixes_rows_is_announced_by_name_once_before_its_first_step(
    kind: Any, options: dict[str, Any]
) -> None:
    model = shrink_(small_model(), used_vocabulary())
    weight = model.get_submodule(TABLE).weight
    before = weight.detach().clone()
    optimizer = kind(model.parameters(), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LeanVocabWarning)
        with pytest.raises(LeanVocabWarning, match=f"{kind.__name__} is not row-separable"):
            train(model, optimizer, steps=1)
        assert torch.equal(weight, before)
        train(model, optimizer, steps=2)  # said once
    saved(optimizer)


def test_muon_is_announced() -> None:
    model = shrink_(nn.Sequential(nn.Embedding(9, 4)), PartialVocabulary([3, 8], 9))
    optimizer = optim.Muon(model.parameters(), lr=1e-2, weight_decay=0.0)
    model(torch.tensor([3])).sum().backward()
    with pytest.warns(LeanVocabWarning, match="Muon is not row-separable"):
        optimizer.step()


def test_an_optimizer_that_cannot_be_tried_is_announced_as_unknown() -> None:
    model = shrink_(nn.Sequential(nn.Embedding(9, 4)), PartialVocabulary([3, 8], 9))
    optimizer = Peculiar(model.parameters(), model)
    model(torch.tensor([3])).sum().backward()
    with pytest.warns(LeanVocabWarning, match="Peculiar could not be shown to be row-separable"):
        optimizer.step()


def test_trying_an_optimizer_leaves_the_random_state_alone() -> None:
    optimizer = MyAdamW([nn.Parameter(torch.zeros(2, 2))])
    state = torch.get_rng_state()
    assert is_row_separable(optimizer) is True
    assert torch.equal(torch.get_rng_state(), state)


def test_replaying_decay_with_an_optimizer_that_mixes_rows_is_an_error() -> None:
    model = shrink_(small_model(), used_vocabulary(), decay_unused_rows=True)
    with (
        pytest.warns(LeanVocabWarning, match="not row-separable"),
        pytest.raises(OptimizerError, match="decay_unused_rows=True needs a row-separable optimizer"),
    ):
        train(model, optim.Adafactor(model.parameters(), lr=1e-2), steps=1)


@pytest.mark.parametrize(
    ("dim", "dtype", "announced"), [(32, "float32", False), (36, "float32", True), (48, "bfloat16", True)]
)
def test_a_fused_optimizer_on_rows_that_do_not_fill_vectors_is_announced(dim: int, dtype: str, announced: bool) -> None:
    """torch's fused CPU loops take another path for the elements that are left over at the end of a matrix."""
    model = nn.Sequential(nn.Embedding(9, dim, dtype=getattr(torch, dtype)))
    shrink_(model, PartialVocabulary([3, 8], 9))
    optimizer = optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    model(torch.tensor([3])).sum().backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    # rows of 36 floats leave 8 of the 72 in two rows over; rows of 48 bf16 leave 16 of the 48 in the ninth
    assert [f"with rows of {dim} elements these are not" in str(each.message) for each in caught] == [True] * announced


class BlockScaled(torch.optim.Optimizer):
    """Divides by the largest gradient of each block of 256 elements, in matrices of 4,096 and more: as 8-bit states do."""

    def __init__(self, params, lr=1e-2, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                step = p.grad.flatten()
                if p.numel() >= 4096 and p.numel() % 256 == 0:
                    step = (
                        step.view(-1, 256) / step.view(-1, 256).abs().amax(1, keepdim=True).clamp(min=1e-6)
                    ).flatten()
                p.sub_(step.view_as(p), alpha=group["lr"])


@pytest.mark.parametrize(("width", "separable"), [(64, False), (48, False), (256, True), (768, True)])
def test_blocks_of_states_keep_rows_apart_where_rows_are_whole_blocks(width: int, separable: bool) -> None:
    weight = nn.Parameter(torch.zeros(4, width))
    assert is_row_separable(BlockScaled([weight]), weight) is separable


class OneWayInOneGroup(torch.optim.SGD):
    """Mixes rows in a group that says so, whose option is no argument of the class: as GaLore does."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(
                    p.grad / (p.grad.abs().mean(dim=0) if "rank" in group and p.ndim == 2 else 1.0), alpha=group["lr"]
                )


def test_an_optimizer_is_tried_with_the_options_of_the_group_that_holds_the_weight() -> None:
    first, second = nn.Parameter(torch.zeros(4, 8)), nn.Parameter(torch.zeros(4, 8))
    optimizer = OneWayInOneGroup([{"params": [first]}, {"params": [second], "rank": 4}], lr=1e-2)
    assert is_row_separable(optimizer, first) is True
    assert is_row_separable(optimizer, second) is False


class Stacked(torch.optim.SGD):
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("both", torch.zeros(2, *p.shape))


def test_two_matrices_in_one_state_are_refused_by_the_optimizers_name() -> None:
    model = shrink_(small_model(), used_vocabulary())
    optimizer = Stacked(model.parameters(), lr=1e-2)
    warnings.simplefilter("ignore")  # that it could not be shown to be row-separable
    with pytest.raises(OptimizerError, match=r"Stacked keeps 2 matrices in one state \('both'\)"):
        train(model, optimizer)
