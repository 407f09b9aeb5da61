"""A pytest plugin, `-p default_device`: a whole run of tests with the device at hand as torch's default device.

Tests are written for a CPU; what they make lands on the device. Two things are helped: numbers that they draw from a generator
of the CPU are brought to the device, and numpy gets a copy. Tests of what differs by design are skipped, with the reason.
"""

from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
from device_at_hand import device_at_hand
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_LATER = "on a device, what is wrong with ids and labels is said at the step (tests/unit/test_device_faults.py)"
_ON_THE_HOST = "state dicts of a model on a device hold the full tables on the host"
DIFFERENT = {
    "test_a_label_outside_a_restricted_vocabulary_is_an_error_in_training_and_infinite_in_evaluation": _LATER,
    "test_labels_that_are_no_ids_are_an_error_as_they_are_for_torch": _LATER,
    "test_a_label_that_is_no_token_is_an_error_in_every_mode": _LATER,
    "test_an_unseen_id_in_training_is_an_error_that_names_token_id_position_and_module": _LATER,
    "test_an_id_that_is_none_is_an_error_in_every_mode_and_never_wraps_around": _LATER,
    "test_errors_may_be_asked_for_in_evaluation_too": _LATER,
    "test_tokens_that_were_added_while_the_model_was_not_resized_are_told_to_be_resized_for": _LATER,
    "test_an_id_that_is_negative_has_nothing_to_do_with_added_tokens": _LATER,
    "test_a_partial_id_out_of_range_is_an_error": _LATER,
    "test_a_pickled_and_a_copied_model_go_on_as_the_first": _ON_THE_HOST,
    "test_a_tensor_that_is_not_understood_stays_whole_and_trains_as_it_did": _ON_THE_HOST,
    "test_a_saved_state_dict_has_the_bytes_of_the_unshrunk_models": _ON_THE_HOST,
    "test_decay_without_replay_is_announced_once_and_leaves_unused_rows_as_they_were": _ON_THE_HOST,
    "test_a_detour_over_the_meta_device_keeps_the_map": "the test itself goes to the CPU",
    "test_a_fused_optimizer_on_rows_that_do_not_fill_vectors_is_announced": "a matter of the CPU's kernels",
    "test_no_gradient_is_computed_that_nobody_wants": "it looks at the rows of a CPU; a device has compact ones",
    "test_rows_that_were_taken_away_after_the_forward_are_an_error_by_name": "the emulated device cannot resize storages",
}
# Tests that tell torch that it compiles while AdamW takes a step.
_STEPS_AS_IF_COMPILED = (
    "test_on_a_device_the_first_of_several_accumulated_batches_is_named_and_training_can_go_on",
    "test_the_lookup_of_a_device_gives_the_same_bits",
)
_COMPILED = "test_a_compiled_step_raises_before_it_touches_a_parameter"
_OPEN = ExitStack()


class _OnTheDevice(TorchFunctionMode):
    def __init__(self, device: str):
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.numpy, Tensor.__array__):
            return func(args[0].cpu(), *args[1:], **kwargs)
        generator = kwargs.get("generator")
        draws = generator is not None and generator.device.type == "cpu" and not {"device", "out"} & set(kwargs)
        if draws and not any(isinstance(value, Tensor) for value in args):
            requires_grad = kwargs.pop("requires_grad", False)
            return func(*args, **kwargs, device="cpu").to(self.device).requires_grad_(requires_grad)
        return func(*args, **kwargs)


def pytest_configure(config: pytest.Config) -> None:
    device = _OPEN.enter_context(device_at_hand())
    _OPEN.enter_context(torch.device(device))
    _OPEN.enter_context(_OnTheDevice(device))


def pytest_unconfigure(config: pytest.Config) -> None:
    _OPEN.close()


def _steps_as_if_compiled() -> bool:
    """False where AdamW then puts its step sizes on the default device, where its kernels do not take them: torch 2.11."""
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    with mock.patch.object(torch.compiler, "is_compiling", return_value=True):
        try:
            torch.optim.AdamW(weights).step()
        except RuntimeError:
            return False
    return True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    steps = _steps_as_if_compiled()
    different = dict(DIFFERENT)
    if not steps:
        different |= dict.fromkeys(_STEPS_AS_IF_COMPILED, "AdamW, told that it compiles, takes no step")
        different[_COMPILED] = "a torch of that age cannot trace what makes tensors on the emulated device"
    for item in items:
        reason = different.get(getattr(item, "originalname", item.name))
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
