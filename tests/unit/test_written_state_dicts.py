"""What is written in place to a state dict reaches a shrunk model as it reaches an ordinary one, or is an error."""

import copy
import gc
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import bits, differing, train
from models import FULL_SIZE, batch, small_model, twins, used_vocabulary
from torch import Tensor, nn

from leanvocab.checkpoints.full_saving import save_full
from leanvocab.errors import BypassError, OptimizerError
from leanvocab.model.shrink import merge_, partial_state_dicts, shrink_
from leanvocab.partial.module import partial_modules

KEY = "roberta.embeddings.word_embeddings.weight"
FAMILIES = ["roberta", "bart", "bert-tied", "llama-untied"]


def trained(family: str = "roberta") -> tuple[Any, Any]:
    """The same model twice, one of them shrunk, after the same steps."""
    full, model = twins(family)
    shrink_(model, used_vocabulary(), output="frozen" if "tied" in family else None)
    return full, model


def only_floats(model: nn.Module) -> list[Tensor]:
    return [value for value in model.state_dict().values() if value.is_floating_point()]


def copies(average: nn.Module, model: nn.Module) -> None:
    """The loop of timm's ModelEmaV2, and of many a script."""
    for ours, theirs in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        ours.copy_(0.9 * ours + (1.0 - 0.9) * theirs)


def lerps(average: nn.Module, model: nn.Module) -> None:
    for ours, theirs in zip(only_floats(average), only_floats(model), strict=True):
        ours.lerp_(theirs, 0.1)


def multiplies_and_adds(average: nn.Module, model: nn.Module) -> None:
    theirs = model.state_dict()
    for name, ours in average.state_dict().items():
        if ours.is_floating_point():
            ours.mul_(0.9).add_(theirs[name], alpha=0.1)


def goes_over_all_at_once(average: nn.Module, model: nn.Module) -> None:
    """The loop of timm's ModelEmaV3."""
    torch._foreach_lerp_(only_floats(average), only_floats(model), weight=0.1)


def writes_rows(average: nn.Module, model: nn.Module) -> None:
    for ours, theirs in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        ours[...] = theirs
        if ours.ndim:
            ours[1:4].mul_(0.5)


def writes_into_parts(average: nn.Module, model: nn.Module) -> None:
    """The state dicts of modules within the model."""
    for ours, theirs in zip(average.modules(), model.modules(), strict=True):
        if not list(ours.children()):
            for own, their in zip(only_floats(ours), only_floats(theirs), strict=True):
                torch.add(own, their, out=own)


WRITERS = [copies, lerps, multiplies_and_adds, goes_over_all_at_once, writes_rows, writes_into_parts]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("write", WRITERS)
def test_averaging_in_place_averages_the_table_too(write: Callable[..., None], family: str) -> None:
    averages = []
    for model in trained(family):
        average = copy.deepcopy(model).eval()
        for step in range(3):
            with torch.no_grad():
                model.get_input_embeddings().weight.add_(0.25 + step)
                write(average, model)
        with torch.no_grad():
            score = average(batch()["input_ids"]).logits
            averages.append({**average.state_dict(), "score": score[..., :3].clone()})
    assert_equal_on_kept_rows(*averages)


def assert_equal_on_kept_rows(full: dict[str, Tensor], lean: dict[str, Tensor]) -> None:
    """Equal bits but for rows outside the vocabulary, which `weight.add_` above did not reach, and for rounding of scores."""
    kept = used_vocabulary().token_ids.tolist()
    assert full.keys() == lean.keys()
    for name, value in full.items():
        if name == "score":
            torch.testing.assert_close(lean[name], value)
        else:
            rows = (each[kept] if each.shape[:1] == (FULL_SIZE,) else each for each in (value, lean[name]))
            assert len({bits(each) for each in rows}) == 1, name


def forward(model: Any) -> None:
    with torch.no_grad():
        model.eval()(batch()["input_ids"])


def an_optimizer_step(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def a_partial_state_dict(model: Any) -> None:
    if partial_modules(model):
        with partial_state_dicts(model):
            model.state_dict()


LOOKS: dict[str, Callable[[Any], Any]] = {
    "forward": forward,
    "step": an_optimizer_step,
    "state dict": lambda model: model.state_dict(),
    "partial state dict": a_partial_state_dict,
    "merge": lambda model: merge_(model) if partial_modules(model) else model,
    "deep copy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "cast": lambda model: model.double().float(),
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_written_is_there_whatever_comes_next(look: str, family: str) -> None:
    """All rows, also those outside the vocabulary; the state dict itself is gone by then."""
    full, model = trained(family)
    for each in (full, model):
        each.eval()
        for value in only_floats(each):
            value.mul_(1.5).add_(0.125)
    results = [LOOKS[look](each) for each in (full, model)]
    full, model = (
        each if result is None or isinstance(result, dict) else result
        for each, result in zip((full, model), results, strict=True)
    )
    weights = [each.get_input_embeddings().weight.detach() for each in (full, model)]
    kept = slice(None) if len(weights[1]) == FULL_SIZE else used_vocabulary().token_ids.tolist()
    assert bits(weights[0][kept]) == bits(weights[1])
    assert differing(full, model) == []


def test_what_was_written_is_saved(tmp_path: Path) -> None:
    full, model = trained("bert-tied")
    for each in (full, model):
        for value in only_floats(each):
            value.mul_(0.5)
    full.save_pretrained(tmp_path / "full")
    save_full(model, tmp_path / "lean")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("full", "lean")]
    assert files[0] == files[1]


def test_a_state_dict_that_is_kept_may_be_written_to_again_and_again() -> None:
    """An average of which somebody keeps the state dict: nothing else changes it."""
    averages = []
    for model in trained():
        average = copy.deepcopy(model)
        kept = average.state_dict()
        for _ in range(3):
            train(model, steps=1)
            with torch.no_grad():
                for name, value in model.state_dict().items():
                    if value.is_floating_point():
                        kept[name].lerp_(value, 0.25)
            forward(average)
        averages.append(average)
    assert differing(*averages) == []


@pytest.mark.parametrize("keep_vars", [False, True])
def test_variables_of_tied_tables_are_written_to_as_well(keep_vars: bool) -> None:
    full, model = trained("bert-tied")
    for each in (full, model):
        state = each.state_dict(keep_vars=keep_vars)
        with torch.no_grad():
            for value in {value.data_ptr(): value for value in state.values() if value.is_floating_point()}.values():
                value.mul_(2)
        del state, value
    assert differing(full, model) == []


WHY = (
    r"word_embeddings: a state dict that was taken before the table changed was written to in place.*copies.*"
    r"load_state_dict.*named_parameters\(\).*merge_\(model\)"
)


@pytest.mark.parametrize("look", ["forward", "step", "state dict", "partial state dict", "merge", "deep copy"])
def test_writing_to_a_state_dict_from_before_training_is_an_error(look: str) -> None:
    _, model = trained()
    kept = model.state_dict()
    train(model, steps=1)
    kept[KEY].mul_(0.5)
    with pytest.raises(BypassError, match=WHY):
        LOOKS[look](model)
    LOOKS[look](model)  # it was said


def test_a_write_to_what_somebody_has_loaded_since_is_no_error() -> None:
    """Averages of clients: a state dict is written to in place and loaded, round after round."""
    results = []
    for model in trained():
        state = model.state_dict()
        for _ in range(2):
            train(model, steps=1)
            for name, value in model.state_dict().items():
                state[name].copy_(value * 0.5 if value.is_floating_point() else value)
            model.load_state_dict(state)
            forward(model)
        results.append(model)
    assert differing(*results) == []


def test_a_state_dict_of_which_another_copy_is_loaded_keeps_what_is_loaded() -> None:
    full, model = trained()
    for each in (full, model):
        saved = copy.deepcopy(each.state_dict())
        for value in only_floats(each):
            value.zero_()
        each.load_state_dict(saved)
    assert differing(full, model) == []


def test_a_moved_or_cast_model_has_left_its_state_dicts_behind() -> None:
    full, model = trained()
    for each in (full, model):
        kept = each.state_dict()
        each.double()
        kept[KEY].zero_()
    assert differing(full, model) == []


def test_writing_in_inference_mode_counts() -> None:
    full, model = trained()
    for each in (full, model):
        with torch.inference_mode():
            for value in only_floats(each):
                value.mul_(2)
    assert differing(full, model) == []


def num_full_matrices() -> int:
    gc.collect()
    return sum(issubclass(type(each), Tensor) and each.shape == (FULL_SIZE, 48) for each in gc.get_objects())


@pytest.mark.parametrize("look", ["forward", "step", "state dict", "merge"])
def test_full_rows_that_nobody_wrote_to_are_let_go_of(look: str) -> None:
    model = shrink_(small_model(), used_vocabulary())
    before = num_full_matrices()
    model.state_dict()
    assert num_full_matrices() == before + 1
    model.state_dict()
    assert num_full_matrices() == before + 1
    LOOKS[look](model)
    assert num_full_matrices() == before + (look == "state dict")  # merged, a model has its own in place of the store's


# --- states of optimizers ---------------------------------------------------------------------------------------------


def with_optimizers() -> list[tuple[Any, torch.optim.Optimizer]]:
    return [(model, train(model, steps=2)[1]) for model in trained()]


def moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [state["exp_avg"] for state in optimizer.state_dict()["state"].values()]


@pytest.mark.parametrize("look", ["step", "state dict", "merge"])
def test_states_that_are_written_to_in_place_are_the_optimizers(look: str) -> None:
    pairs = with_optimizers()
    for model, optimizer in pairs:
        for value in moments(optimizer):
            value.mul_(0.5)
        if look == "merge" and partial_modules(model):
            merge_(model, optimizer=optimizer)
        if look == "step":
            train(model, optimizer, steps=1)
    full, lean = (optimizer.state_dict()["state"] for _, optimizer in pairs)
    for index, state in full.items():
        assert all(bits(value) == bits(lean[index][key]) for key, value in state.items())
    assert differing(pairs[0][0], pairs[1][0]) == []


def test_states_written_for_rows_outside_the_vocabulary_are_an_error() -> None:
    (_, _), (model, optimizer) = with_optimizers()
    for value in moments(optimizer):
        value.add_(0.5)
    with pytest.raises(
        OptimizerError, match=r"'exp_avg' of AdamW is not zero for 4.. rows outside the partial vocabulary"
    ):
        train(model, optimizer, steps=1)


def test_states_from_before_a_step_that_are_written_to_are_an_error() -> None:
    (_, _), (model, optimizer) = with_optimizers()
    kept = moments(optimizer)
    train(model, optimizer, steps=1)
    for value in kept:
        value.mul_(0.5)
    with pytest.raises(
        OptimizerError, match=r"'exp_avg' of AdamW.*was written to in place.*optimizer\.load_state_dict"
    ):
        train(model, optimizer, steps=1)


def test_states_that_were_loaded_since_are_no_error() -> None:
    pairs, results = with_optimizers(), []
    for model, optimizer in pairs:
        state = optimizer.state_dict()
        for each in state["state"].values():
            each["exp_avg"].mul_(0.5)
        optimizer.load_state_dict(state)
        train(model, optimizer, steps=1)
        results.append(model)
    assert differing(*results) == []
