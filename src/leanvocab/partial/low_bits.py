"""States that torchao's optimizers keep in 8 or 4 bits: as numbers, and in the form in which the optimizer holds them.

They are saved as the numbers that they stand for, which any optimizer loads, and are put in few bits again before the next step.
"""

from torch import Tensor
from torch.optim import Optimizer


def numbers(state: Tensor) -> Tensor:
    """What a state stands for; a plain tensor as it is."""
    return state.dequantize() if hasattr(state, "__tensor_flatten__") else state


_SMALLEST_SCALE = 1e-12  # torchao's


def without_dust(state: Tensor) -> Tensor:
    """What a state stands for, with zero where that is as small as can be: 4 bits without a sign have no code for zero."""
    found = numbers(state)
    return found if found is state else found.masked_fill(found.abs() <= _SMALLEST_SCALE, 0)


def in_form_of(optimizer: Optimizer, key: str, state: Tensor) -> Tensor:
    """`state` as `optimizer` would hold it: in few bits where it is one of torchao's, and no two rows share a scale.

    Where they do, a row at rest beside others would be rounded with their scale, to what is not zero.
    """
    is_torchaos = any(each.__module__.startswith("torchao.") for each in type(optimizer).__mro__)
    if not is_torchaos or state.shape[-1] % optimizer.block_size:  # type: ignore[attr-defined]
        return state
    held: Tensor = optimizer._new_buffer(state, key == "exp_avg")  # type: ignore[attr-defined] # the first moment has signs
    return held.copy_(state)
