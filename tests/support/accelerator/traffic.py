"""Bytes that an operation reads and writes on the device: each operand and each result once, as a kernel without waste has it."""

from torch import Tensor

# Their first argument is written without being read.
OVERWRITING = frozenset((
    "fill_", "zero_", "copy_", "normal_", "uniform_", "random_", "exponential_", "bernoulli_", "geometric_",
    "cauchy_",
))  # fmt: skip
# They read of their first argument as much as they give.
PICKING = frozenset((
    "index_select", "index", "gather", "embedding", "take", "masked_select",
))  # fmt: skip
# They touch of the argument that they write to as much as they are given.
PUTTING = frozenset((
    "index_copy_", "index_add_", "index_put_", "_index_put_impl_", "scatter_", "scatter_add_", "index_copy",
    "index_add", "scatter",
))  # fmt: skip


def num_bytes(tensor: Tensor) -> int:
    """Bytes of the elements that there are; those that a stride of zero repeats are read once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or size == 0 else 1
    return count * tensor.dtype.itemsize


def bytes_moved(name: str, given: list[Tensor], written: list[Tensor], results: list[Tensor]) -> int:
    """Bytes read and written; `written` are those of the given tensors that are written to, `out=` among them."""
    is_written = {id(tensor) for tensor in written}
    new = [tensor for tensor in results if id(tensor) not in is_written]
    read = [num_bytes(tensor) for tensor in given if id(tensor) not in is_written]
    if name in PICKING and read:
        read[0] = min(read[0], sum(map(num_bytes, results)))
    if name in PUTTING and written:
        touched = max(
            [num_bytes(tensor) for tensor in given if id(tensor) not in is_written and tensor.is_floating_point()],
            default=0,
        )
        return sum(read) + touched + sum(map(num_bytes, new))
    is_in_place = name.endswith("_") and name not in OVERWRITING
    return sum(read) + sum(map(num_bytes, [*written, *new])) + (sum(map(num_bytes, written)) if is_in_place else 0)
