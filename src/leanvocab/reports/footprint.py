"""Bytes of parameters, their gradients and states: from shapes alone, by arithmetic, or of the tensors that are there.

Imports no torch.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

FP32_BYTES = 4
BF16_BYTES = 2


@dataclass(frozen=True)
class Parameter:
    """Shape and kind of a parameter, on which its bytes depend."""

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


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes that training holds in parameters and what belongs to them."""

    num_parameters: int
    num_vocabulary_parameters: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    autocast_bytes: int
    buffers_bytes: int = 0
    remap_bytes: int = 0
    """The map from token ids to rows that each shrunk module holds on its device."""
    frozen_bytes: int = 0
    """Rows that do not train and are in the softmax, with their order."""
    loss_bytes: int = 0
    """What the loss holds at its peak; 0 where no number of tokens was given."""
    vocabulary_bytes: int
    """Of the weights, gradients, states and frozen rows above, those of the vocabulary matrices."""

    @property
    def total_bytes(self) -> int:
        """Everything above, of which the vocabulary's bytes are a part."""
        trained_bytes = self.weights_bytes + self.gradients_bytes + self.optimizer_bytes
        held_bytes = trained_bytes + self.autocast_bytes + self.buffers_bytes + self.remap_bytes
        return held_bytes + self.frozen_bytes + self.loss_bytes

    def to_dict(self) -> dict[str, int]:
        """Every part and their sum, as plain values."""
        return {**asdict(self), "total_bytes": self.total_bytes}


def make_footprint(
    parameters: list[Parameter], states: Mapping[Parameter, int], mixed: bool, shared_bytes: int, **others: int
) -> Footprint:
    """Adds up what training a model with these parameters holds; `mixed` is autocast over fp32 weights.

    `states` are the optimizer's bytes for each parameter that trains, beside those that all share; `others` belong to none.
    """
    trained = [parameter for parameter in parameters if parameter.trains]
    tables = [parameter for parameter in parameters if parameter.is_table]
    trained_tables = [parameter for parameter in tables if parameter.trains]
    in_layers = sum(parameter.num_values for parameter in parameters if parameter.in_layer)
    vocabulary_bytes = _bytes_of(tables) + _bytes_of(trained_tables) + sum(states[table] for table in trained_tables)
    return Footprint(
        num_parameters=sum(parameter.num_values for parameter in parameters),
        num_vocabulary_parameters=sum(parameter.num_values for parameter in tables),
        weights_bytes=_bytes_of(parameters),
        gradients_bytes=_bytes_of(trained),
        optimizer_bytes=sum(states[parameter] for parameter in trained) + shared_bytes,
        autocast_bytes=in_layers * BF16_BYTES if mixed else 0,
        vocabulary_bytes=vocabulary_bytes + others.get("frozen_bytes", 0),
        **others,
    )


def _bytes_of(parameters: Iterable[Parameter]) -> int:
    return sum(parameter.num_bytes for parameter in parameters)


def plain_loss_bytes(num_tokens: int, full_rows: int) -> int:
    """The peak of an ordinary cross-entropy, in its backward: log-probabilities, their gradient and that of the logits, in
    fp32 whatever the model's dtype. The logits themselves are gone by then, unless somebody holds on to them."""
    return 3 * num_tokens * full_rows * FP32_BYTES


# --- tensors that are there -------------------------------------------------------------------------------------------


def held_bytes(parameters: Iterable[Any], states: Any) -> dict[str, int]:
    """Bytes of parameters, each once, of the gradients that they have now, and of an optimizer's states."""
    distinct = {id(parameter): parameter for parameter in parameters}.values()
    return {
        "weights": sum(map(tensor_bytes, distinct)),
        "gradients": sum(tensor_bytes(parameter.grad) for parameter in distinct),
        "states": tensor_bytes(states),
    }


def tensor_bytes(value: Any) -> int:
    """Bytes of a tensor, or of all tensors in a mapping or list; 0 of anything else.

    Of a sparse tensor these are values and indices; of one that is made of others (quantized, a rank's shard), those.
    """
    if isinstance(value, Mapping):
        return sum(map(tensor_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(tensor_bytes, value))
    if not hasattr(value, "element_size"):
        return 0
    if hasattr(value, "__tensor_flatten__"):
        return sum(tensor_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    if value.is_sparse:
        return tensor_bytes(value._values()) + tensor_bytes(value._indices())
    return int(value.nbytes)
