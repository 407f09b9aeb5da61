"""Questions about a tensor that read none of its values, and so are harmless on a partial weight."""

import torch
from torch import Tensor

METHODS = {
    "__hash__", "__len__", "dim", "element_size", "get_device", "is_complex", "is_contiguous", "is_floating_point",
    "ndimension", "nelement", "numel", "size", "stride",
}  # fmt: skip
ATTRIBUTES = {
    "device", "dtype", "is_cpu", "is_cuda", "is_meta", "is_quantized", "is_sparse", "layout", "ndim", "shape",
}  # fmt: skip
FUNCTIONS = {getattr(Tensor, name) for name in METHODS} | {
    torch.is_complex, torch.is_floating_point, torch.is_tensor, torch.numel,
}  # fmt: skip
