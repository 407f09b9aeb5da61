"""Where a model that trains in few bits is loaded."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from leanvocab.finetune import pretrained
from leanvocab.finetune.pretrained import Pretrained


@pytest.mark.parametrize(
    ("on_cpu", "at_hand", "expected"), [(True, True, "cpu"), (False, True, 0), (False, False, "cpu")]
)
def test_four_bits_are_loaded_where_the_model_trains(
    on_cpu: bool, at_hand: bool, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`leanvocab finetune --cpu --qlora` where there is a GPU: the weights are not on it."""
    given: dict[str, Any] = {}
    auto_class = SimpleNamespace(from_pretrained=lambda name, **options: (given.update(options), {"missing_keys": []}))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(pretrained, "accelerator_at_hand", lambda: torch.device("cuda") if at_hand else None)
    task: Any = SimpleNamespace(set_labels=lambda config: None, has_new_head=False, replaces_head=False)
    Pretrained("a model", None, None, auto_class, ()).load(task, few_bits=True, on_cpu=on_cpu)
    assert given["device_map"] == {"": expected}
