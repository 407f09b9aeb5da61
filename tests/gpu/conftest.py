"""Every test here has the device that is at hand, from before it begins until after it ends."""

from collections.abc import Iterator

import pytest
from device_at_hand import device_at_hand


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    with device_at_hand():
        yield
