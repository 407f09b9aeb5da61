"""The device that tests of devices run on: a GPU where there is one, the emulated accelerator elsewhere.

LEANVOCAB_TEST_DEVICE names another: "cpu" tells whether the tests themselves work.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import accelerator
import pytest
import torch
from accelerate.state import AcceleratorState

DEVICE = os.environ.get("LEANVOCAB_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else accelerator.NAME)


@contextmanager
def device_at_hand() -> Iterator[str]:
    """The device is there within the block, for transformers' Trainer too."""
    if DEVICE != accelerator.NAME:
        yield DEVICE
        return
    if not accelerator.can_be_emulated():
        pytest.skip("torch can emulate a device from 2.13 on")
    with (
        accelerator.in_use(),
        mock.patch.dict(os.environ, ACCELERATE_TORCH_DEVICE=DEVICE),
        mock.patch("transformers.training_args.is_torch_bf16_gpu_available", return_value=True),
    ):
        AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the device that it has found
        yield DEVICE
    AcceleratorState._reset_state(reset_partial_state=True)
