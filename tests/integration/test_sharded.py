"""FSDP2 with two processes: state dicts of weights and optimizer are full, full ones load, and what cannot be is refused."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import leanvocab as lv
from doors import ranks
from leanvocab.checkpoints.delta_saving import write_delta
from leanvocab.errors import CheckpointError, LeanVocabWarning, ModelError
from leanvocab.partial.sharded import share_of, whole

FULL_SIZE, KEPT = 23, [1, 2, 5, 7, 11, 20, 22]  # neither is even: the ranks' shares are not alike


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(FULL_SIZE, 4), nn.Linear(4, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(ids)).sum()


def made(lean: bool) -> Classifier:
    torch.manual_seed(0)
    model = Classifier()
    return lv.shrink_(model, lv.PartialVocabulary(KEPT, FULL_SIZE), embedding="table") if lean else model


def trained(lean: bool, **options: Any) -> tuple[Any, torch.optim.Optimizer]:
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(made(lean), mesh=torch.distributed.init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **{"weight_decay": 0.0} | options)
    step(model, optimizer)
    return model, optimizer


def step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    model(torch.tensor(KEPT[:5])).backward()
    optimizer.step()
    optimizer.zero_grad()


def full(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: whole(value).clone() for name, value in state.items() if isinstance(value, torch.Tensor)}


def everything(folder: Path) -> dict[str, Any]:
    """What the tests look at, in one start of two processes."""
    given: dict[str, Any] = {}
    for lean in (False, True):
        model, optimizer = trained(lean)
        given[f"weights {lean}"] = full(model.state_dict())
        given[f"states {lean}"] = full(optimizer.state_dict()["state"][0])
    given["kept variables"] = isinstance(model.state_dict(keep_vars=True)["table.weight"], nn.Parameter)
    with lv.partial_state_dicts(model):
        given["partial"] = full(model.state_dict())["table.weight"].shape

    other, _ = trained(True)
    changed = {name: value + 1 for name, value in model.state_dict().items()}
    other.load_state_dict(changed)
    given["loaded"] = full(other.state_dict()), full(changed)

    again, resumed = trained(True)
    again.load_state_dict(model.state_dict())
    states = optimizer.state_dict()  # torch would share its tensors
    states["state"] = {i: {name: each.clone() for name, each in state.items()} for i, state in states["state"].items()}
    resumed.load_state_dict(states)
    for each in ((model, optimizer), (again, resumed)):
        step(*each)
    given["resumed"] = full(again.state_dict()), full(model.state_dict())
    given["sliced"] = resumed.state[again.table.weight]["exp_avg"].shape

    given["merge"] = raised(ModelError, lambda: lv.merge_(model))
    given["delta"] = raised(ModelError, lambda: write_delta(model, folder, None))  # type: ignore[arg-type]
    given["full"] = raised(CheckpointError, lambda: lv.save_full(model, folder / "full"))
    strange = type("Strange", (), {"full_tensor": None, "placements": ["_StridedShard(0)"], "device_mesh": None})()
    given["strange"] = raised(CheckpointError, lambda: share_of(torch.zeros(3, 2), strange))
    given["warned"] = warned()
    return given


def raised(kind: type[Exception], run: Any) -> str:
    with pytest.raises(kind) as caught:
        run()
    return str(caught.value)


def warned() -> list[str]:
    """What is said where accelerate's plugin saves in full, and where it saves shares."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import FullyShardedDataParallelPlugin

    said = []
    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2, state_dict_type=kind
        )
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            trained(True)
        said.append([str(each.message) for each in found if issubclass(each.category, LeanVocabWarning)])
    return [len(said[0]), *said[0], len(said[1])]  # type: ignore[list-item]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return ranks.start(everything, tmp_path_factory.mktemp("ranks"))  # type: ignore[no-any-return]


@pytest.mark.parametrize("what", ["weights", "states"])
def test_what_a_sharded_model_saves_is_what_an_ordinary_one_saves(found: dict[str, Any], what: str) -> None:
    ordinary, lean = found[f"{what} False"], found[f"{what} True"]
    assert ordinary.keys() == lean.keys()
    assert {name for name in ordinary if not torch.equal(ordinary[name], lean[name])} == set()
    assert ordinary["table.weight" if what == "weights" else "exp_avg"].shape == (FULL_SIZE, 4)


def test_state_dicts_are_parameters_or_partial_where_they_are_asked_for(found: dict[str, Any]) -> None:
    assert found["kept variables"]
    assert found["partial"] == (len(KEPT), 4)


def test_a_full_state_dict_loads_with_all_its_rows(found: dict[str, Any]) -> None:
    loaded, saved = found["loaded"]
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)  # those outside the vocabulary too


def test_training_goes_on_from_full_states(found: dict[str, Any]) -> None:
    resumed, uninterrupted = found["resumed"]
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in uninterrupted)
    assert found["sliced"] == (len(KEPT), 4)


def test_what_cannot_be_is_an_error_that_says_what_to_do(found: dict[str, Any]) -> None:
    assert found["merge"].startswith("table: its rows are sharded over processes")
    assert "StateDictOptions(full_state_dict=True)" in found["merge"]
    assert found["delta"].startswith(
        "table.weight: its rows are sharded over processes, and one process writes a delta"
    )
    assert found["full"].startswith(
        "table.weight: its rows are sharded over processes, and one process writes the folder"
    )
    assert found["strange"].startswith(
        "a vocabulary matrix is spread over processes as _StridedShard(0), expected Shard"
    )


def test_checkpoints_that_could_not_be_resumed_are_announced_before_the_first_step(found: dict[str, Any]) -> None:
    count, said, sharded = found["warned"]
    assert (count, sharded) == (1, 0)
    assert "to resume, set state_dict_type to SHARDED_STATE_DICT" in said
