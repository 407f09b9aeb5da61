"""Tensors of safetensors files whose headers were checked, as torch tensors."""

import hashlib

import torch
from torch import Tensor

from leanvocab.errors import CheckpointError
from leanvocab.files.copying import read_exactly
from leanvocab.files.headers import SafetensorsFile, TensorEntry
from leanvocab.files.row_store import as_bits

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64, "U16": torch.uint16,
    "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def read_tensor(file: SafetensorsFile, name: str) -> Tensor:
    """One tensor of a file whose header was checked."""
    entry = file.tensors[name]
    with file.opened() as source:
        return _tensor(read_exactly(source, entry.start, entry.num_bytes), entry.dtype, entry.shape)


def read_rows(source: int, entry: TensorEntry, start: int, num_rows: int) -> Tensor:
    """Rows of a tensor in the file with the descriptor `source`."""
    data = read_exactly(source, entry.start + start * entry.row_bytes, num_rows * entry.row_bytes)
    return _tensor(data, entry.dtype, (num_rows, *entry.shape[1:]))


def sha256_of_tensor(tensor: Tensor) -> str:
    """sha256 of the bytes that a file has for a tensor."""
    return hashlib.sha256(as_bits(tensor.cpu().contiguous().reshape(-1)).numpy().data).hexdigest()


def _tensor(data: bytes, dtype: str, shape: tuple[int, ...]) -> Tensor:
    if dtype not in TORCH_DTYPES:
        raise CheckpointError(f"expected a dtype that torch has, found {dtype}")
    if not data:
        return torch.empty(shape, dtype=TORCH_DTYPES[dtype], device="cpu")
    return torch.frombuffer(bytearray(data), dtype=TORCH_DTYPES[dtype]).view(shape)
