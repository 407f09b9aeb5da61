"""Bytes of parameters, their gradients and states, and of the loss, from shapes alone: arithmetic, without torch."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Parameter:
    """What a parameter's bytes depend on."""

    shape: tuple[int, ...]
    value_bytes: int  # bytes of one value
    trains: bool
    in_embedding: bool  # held by an nn.Embedding, be it for tokens or for positions
    in_layer: bool  # held by a linear layer or a convolution, which autocast runs in bf16
    is_table: bool

    @property
    def num_values(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_values * self.value_bytes


FP32_BYTES = 4
BF16_BYTES = 2
_STEP_BYTES = 4  # one fp32 number a parameter, which counts the steps
_INT8_BLOCK = 256  # values that share one fp32 scale in bitsandbytes' block-wise states
_INT8_MIN_VALUES = 4096  # smaller parameters keep fp32 states
_INT8_MAPS_BYTES = 2 * 256 * FP32_BYTES  # the two code books, shared by all parameters


def _adamw_bytes(parameter: Parameter) -> int:
    return 2 * parameter.num_bytes + _STEP_BYTES


def _factored_values(shape: tuple[int, ...]) -> int:
    """Values that Adafactor keeps of the second moment: a row and a column of sums, or all of a vector."""
    if len(shape) < 2:
        return math.prod(shape)
    return math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1]


def _adafactor_bytes(parameter: Parameter) -> int:
    """transformers' Adafactor keeps fp32 states whatever the weights are, and one fp32 norm a parameter."""
    return _factored_values(parameter.shape) * FP32_BYTES + FP32_BYTES


def _torch_adafactor_bytes(parameter: Parameter) -> int:
    return _factored_values(parameter.shape) * parameter.value_bytes + _STEP_BYTES


def _adamw_8bit_bytes(parameter: Parameter) -> int:
    """bitsandbytes under the Trainer, which has every nn.Embedding keep 32-bit states."""
    if _keeps_32_bit_states(parameter):
        return 2 * parameter.num_values * FP32_BYTES
    return 2 * (parameter.num_values + math.ceil(parameter.num_values / _INT8_BLOCK) * FP32_BYTES)


def _keeps_32_bit_states(parameter: Parameter) -> bool:
    return parameter.in_embedding or parameter.num_values < _INT8_MIN_VALUES


OPTIMIZERS: Mapping[str, Callable[[Parameter], int]] = {
    "adamw": _adamw_bytes,  # torch.optim.AdamW and Adam: two moments
    "sgd": lambda _: 0,  # torch.optim.SGD
    "sgd_momentum": lambda parameter: parameter.num_bytes,  # torch.optim.SGD(momentum=…)
    "adafactor": _adafactor_bytes,  # transformers.Adafactor, which the Trainer uses; without a first moment
    "torch_adafactor": _torch_adafactor_bytes,  # torch.optim.Adafactor
    "adamw_8bit": _adamw_8bit_bytes,  # bitsandbytes
}
"""Bytes of states of one trained parameter, by the name of the optimizer."""


@dataclass(frozen=True)
class Footprint:
    """What training holds in parameters and what belongs to them, in bytes."""

    num_parameters: int
    num_vocabulary_parameters: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    autocast_bytes: int
    buffers_bytes: int
    remap_bytes: int
    """The map from token ids to rows that each shrunk module holds on its device."""
    frozen_bytes: int
    """Rows that do not train and are in the softmax, with their order."""
    loss_bytes: int
    """What the loss holds at its peak; 0 where no number of tokens was given."""
    vocabulary_bytes: int
    """Of the weights, gradients, states and frozen rows above, those of the vocabulary matrices."""

    @property
    def total_bytes(self) -> int:
        """Everything above, of which the vocabulary's bytes are a part."""
        trained_bytes = self.weights_bytes + self.gradients_bytes + self.optimizer_bytes
        held_bytes = trained_bytes + self.autocast_bytes + self.buffers_bytes + self.remap_bytes
        return held_bytes + self.frozen_bytes + self.loss_bytes


def make_footprint(
    parameters: list[Parameter],
    optimizer: str,
    mixed: bool,
    *,
    buffers_bytes: int,
    remap_bytes: int = 0,
    frozen_bytes: int = 0,
    loss_bytes: int = 0,
) -> Footprint:
    """What training a model with these parameters holds; `mixed` is autocast over fp32 weights."""
    trained = [parameter for parameter in parameters if parameter.trains]
    layers = [parameter for parameter in parameters if parameter.in_layer and mixed]
    states_bytes = OPTIMIZERS[optimizer]
    maps = optimizer == "adamw_8bit" and not all(_keeps_32_bit_states(parameter) for parameter in trained)

    def held_bytes(parameter: Parameter) -> int:
        return parameter.num_bytes + (parameter.num_bytes + states_bytes(parameter) if parameter.trains else 0)

    tables = [parameter for parameter in parameters if parameter.is_table]
    return Footprint(
        num_parameters=sum(parameter.num_values for parameter in parameters),
        num_vocabulary_parameters=sum(parameter.num_values for parameter in tables),
        weights_bytes=sum(parameter.num_bytes for parameter in parameters),
        gradients_bytes=sum(parameter.num_bytes for parameter in trained),
        optimizer_bytes=sum(map(states_bytes, trained)) + (_INT8_MAPS_BYTES if maps else 0),
        autocast_bytes=sum(parameter.num_values * BF16_BYTES for parameter in layers),
        buffers_bytes=buffers_bytes,
        remap_bytes=remap_bytes,
        frozen_bytes=frozen_bytes,
        loss_bytes=loss_bytes,
        vocabulary_bytes=sum(map(held_bytes, tables)) + frozen_bytes,
    )


def footprint_dict(footprint: Footprint) -> dict[str, int]:
    """Every part and their sum, as plain values."""
    return {**asdict(footprint), "total_bytes": footprint.total_bytes}


# --- the loss ---------------------------------------------------------------------------------------------------------


def plain_loss_bytes(num_tokens: int, full_rows: int) -> int:
    """The peak of an ordinary cross-entropy, in its backward: log-probabilities, their gradient and that of the logits, in
    fp32 whatever the model's dtype. The logits themselves are gone by then, unless somebody holds on to them."""
    return 3 * num_tokens * full_rows * FP32_BYTES


def chunked_loss_bytes(
    num_tokens: int, num_columns: int, kept_columns: int, kept_rows: int, dim: int, value_bytes: int, chunk_bytes: int
) -> int:
    """The peak of the loss in chunks of tokens: scores of one chunk, those of kept rows among frozen ones a second time, and
    fp32 sums of gradients."""
    step = max(1, chunk_bytes // (max(FP32_BYTES, value_bytes) * num_columns))
    score_bytes = FP32_BYTES + (value_bytes if value_bytes < FP32_BYTES else 0)  # as they are, and in fp32
    scores_bytes = min(step, num_tokens) * (num_columns + kept_columns) * score_bytes
    return scores_bytes + (num_tokens + kept_rows) * dim * FP32_BYTES
