"""`torch.autocast("emulated")`: the operations that torch casts on CUDA, cast likewise."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from accelerator.memory import NAME

KEY = "AutocastPrivateUse1"
# The lists of torch's autocast_mode.h.
NARROW = (
    "matmul", "mm", "mv", "linear", "addmm", "addmv", "addr", "addbmm", "baddbmm", "bmm", "chain_matmul",
    "linalg_multi_dot", "conv1d", "conv2d", "conv3d", "prelu", "scaled_dot_product_attention",
)  # fmt: skip
WIDE = (
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt",
    "sinh", "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm", "group_norm",
    "cosine_similarity", "nll_loss", "kl_div", "l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss",
    "binary_cross_entropy_with_logits", "dist", "cdist", "renorm", "logsumexp", "norm.Scalar", "norm.ScalarOpt_dim",
)  # fmt: skip
# They take narrow numbers and give wide ones.
WIDENING = (
    "prod", "softmax.int", "log_softmax.int", "cumprod", "cumsum", "sum", "sum.dim_IntList",
)  # fmt: skip

_key_set = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
_casts: dict[int, tuple[Tensor, Tensor]] = {}  # by id of a parameter: it, and its copy in the narrow dtype


def _is_eligible(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.device.type == NAME
        and value.is_floating_point()
        and value.dtype != torch.float64
    )


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_cast(part, dtype) for part in value)
    if not _is_eligible(value) or value.dtype == dtype:
        return value
    is_kept = value.is_leaf and value.requires_grad and value.dtype == torch.float32 and dtype != torch.float32
    if not (is_kept and torch.is_autocast_cache_enabled() and value._base is None):
        return value.to(dtype)
    if id(value) not in _casts:
        _casts[id(value)] = value, value.to(dtype)
    return _casts[id(value)][1]


def _casting(operation: Any, dtype_of: Callable[[], torch.dtype]) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        dtype = dtype_of()
        with torch._C._ExcludeDispatchKeyGuard(_key_set):
            return operation(*_cast(args, dtype), **{name: _cast(value, dtype) for name, value in kwargs.items()})

    return kernel


def _widening(operation: Any) -> Callable[..., Any]:
    position = [argument.name for argument in operation._schema.arguments].index("dtype")
    is_keyword = operation._schema.arguments[position].kwarg_only

    def kernel(*args: Any, **kwargs: Any) -> Any:
        asked = kwargs.get("dtype") if is_keyword else args[position] if len(args) > position else None
        with torch._C._ExcludeDispatchKeyGuard(_key_set):
            if asked is not None or not _is_eligible(args[0]):
                return operation(*args, **kwargs)
            if is_keyword:
                return operation(*args, **{**kwargs, "dtype": torch.float32})
            return operation(*args[:position], torch.float32)

    return kernel


def _operation(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def register() -> list[torch.library.Library]:
    """Gives torch these casts, for as long as what is returned lives."""
    library, others = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, KEY)
    for name in NARROW:
        library.impl(name, _casting(_operation(name), lambda: torch.get_autocast_dtype(NAME)), KEY)
    for name in WIDE:
        library.impl(name, _casting(_operation(name), lambda: torch.float32), KEY)
    for name in WIDENING:
        library.impl(name, _widening(_operation(name)), KEY)
    clear = torch.clear_autocast_cache

    def clear_both() -> None:
        _casts.clear()
        clear()

    torch.clear_autocast_cache = clear_both
    return [library, others]
