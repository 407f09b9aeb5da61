"""Questions about a tensor that read none of its values, by name, and so are harmless on a partial weight. No torch."""

ATTRIBUTES = {
    "device", "dtype", "is_cpu", "is_cuda", "is_meta", "is_quantized", "is_sparse", "layout", "ndim", "shape",
}  # fmt: skip
METHODS = {
    "__hash__", "__len__", "dim", "element_size", "get_device", "is_complex", "is_contiguous", "is_floating_point",
    "ndimension", "nelement", "numel", "size", "stride",
}  # fmt: skip
