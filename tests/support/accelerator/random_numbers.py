"""Random numbers of the device's own, which those of the host do not disturb."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

generator = torch.Generator()


@contextmanager
def device_random_numbers() -> Iterator[None]:
    """Within the block, the numbers that operations of the CPU draw are the device's."""
    before = torch.get_rng_state()
    torch.set_rng_state(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(torch.get_rng_state())
        torch.set_rng_state(before)
