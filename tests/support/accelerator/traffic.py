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
# They touch as much of the argument that they write to as they are given. (`index_fill_` is given no rows: it counts whole.)
PUTTING = frozenset(("index_copy", "index_add", "index_put", "_index_put_impl", "scatter", "scatter_add"))


def num_bytes(tensor: Tensor) -> int:
    """Bytes of the elements that there are; those that a stride of zero repeats are read once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or size == 0 else 1
    return count * tensor.dtype.itemsize


def bytes_moved(name: str, read: list[Tensor], written: list[Tensor], results: list[Tensor]) -> int:
    """Bytes read and written: `written` are arguments, `out=` among them, and `results` what is given back."""
    reads, writes = [num_bytes(tensor) for tensor in read], [num_bytes(tensor) for tensor in written]
    new = sum(num_bytes(tensor) for tensor in results if not any(tensor is other for other in written))
    if name in PICKING and reads:
        reads[0] = min(reads[0], new + sum(writes))
    is_in_place = name.endswith("_") or (bool(read and written) and read[0] is written[0])
    if name.removesuffix("_") in PUTTING and is_in_place:
        given = [tensor for tensor in read if tensor is not written[0]]
        touched = max((tensor.numel() for tensor in given), default=0) * written[0].dtype.itemsize
        return sum(map(num_bytes, given)) + 2 * touched + new
    is_read_too = name.endswith("_") and name not in OVERWRITING  # which is no argument beside
    return sum(reads) + sum(writes) * (2 if is_read_too else 1) + new
