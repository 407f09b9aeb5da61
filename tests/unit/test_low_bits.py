"""torchao's states in 8 and 4 bits: cut to rows from full ones, and in few bits again."""

from typing import Any

import pytest
import torch
from torch import nn

import leanvocab as lv
from leanvocab.errors import OptimizerError
from leanvocab.model.live_optimizer_states import check_states, full_states, slice_states

torchao = pytest.importorskip("torchao.optim")
KEPT, FULL_SIZE, DIM = list(range(1, 65, 2)), 64, 256


def shrunk_with_full_states(name: str, moved: list[int], dim: int = DIM) -> tuple[Any, torch.optim.Optimizer]:
    """A shrunk table, and an optimizer that has loaded the states of ordinary training, which moved some rows."""
    model = nn.Sequential(nn.Embedding(FULL_SIZE, dim))
    lv.shrink_(model, lv.PartialVocabulary(KEPT, FULL_SIZE), embedding="0")
    table: Any = model[0]
    optimizer: Any = getattr(torchao, name)(model.parameters(), lr=1e-2)
    numbers = torch.zeros(FULL_SIZE, dim)
    numbers[moved] = torch.rand(len(moved), dim, generator=torch.Generator().manual_seed(0)) + 0.1
    for key in ("exp_avg", "exp_avg_sq"):
        state = optimizer._new_buffer(numbers, key == "exp_avg")
        optimizer.state[table.weight][key] = state.copy_(numbers)
    return table, optimizer


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit"])
def test_full_states_are_cut_to_rows_and_stay_in_few_bits(name: str) -> None:
    table, optimizer = shrunk_with_full_states(name, KEPT)
    before = {key: state.dequantize() for key, state in optimizer.state[table.weight].items()}
    slice_states(optimizer, table.table, table.weight)
    for key, state in optimizer.state[table.weight].items():
        assert type(state).__name__ == f"OptimState{name[5:]}"
        assert state.shape == (len(KEPT), DIM)
        assert torch.allclose(state.dequantize(), before[key][KEPT], rtol=0.2)  # a code of 4 bits apart at most
    saved = full_states(optimizer, table.table, table.weight, optimizer.state[table.weight])
    assert {type(each) for each in saved.values()} == {torch.Tensor}  # any optimizer loads these
    assert {tuple(each.shape) for each in saved.values()} == {(FULL_SIZE, DIM)}


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit"])
def test_states_that_would_be_lost_are_refused_by_name(name: str) -> None:
    table, optimizer = shrunk_with_full_states(name, [*KEPT, 10])
    with pytest.raises(
        OptimizerError, match=rf"'exp_avg' of {name} is not zero for 1 rows outside .* the first of them id 10"
    ):
        check_states(optimizer, table.table, table.weight)


def test_rows_that_share_a_scale_with_others_stay_numbers() -> None:
    table, optimizer = shrunk_with_full_states("AdamW8bit", KEPT, dim=128)
    slice_states(optimizer, table.table, table.weight)
    assert type(optimizer.state[table.weight]["exp_avg"]) is torch.Tensor
