"""Attention that holds no scores, as CUDA's fused kernels do: its result stays, and a logsumexp for each query."""

from typing import Any

import torch
from torch import Tensor

from accelerator.kernels import run
from accelerator.memory import switches

aten = torch.ops.aten
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_fused = aten._scaled_dot_product_fused_attention_overrideable
_on_cpu = aten._scaled_dot_product_flash_attention_for_cpu.default
_on_cpu_backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0, is_causal: bool = False, *,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Plain operations where a CPU has no such kernel: with dropout, unless nothing is computed, and for odd shapes."""
    is_usual = query.dim() == 4 and query.shape[-1] == value.shape[-1] and 0 not in (query.numel(), key.numel())
    if not is_usual or (mask is not None and mask.requires_grad) or (dropout and switches.computes):
        return aten.scaled_dot_product_attention.default._op_dk(
            _COMPOSITE, query, key, value, mask, dropout, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, -torch.inf).to(query.dtype)
    return _fused(query, key, value, mask, dropout, is_causal, False, scale=scale)[0]


def forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0, is_causal: bool = False,
    return_debug_mask: bool = False, *, scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """The result and its logsumexp, and what other devices have besides."""
    result, logsumexp = run(_on_cpu, query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale)
    none = torch.empty(0, dtype=torch.int64)
    return result, logsumexp, none, none, query.shape[2], key.shape[2], none, none, none


def backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, wanted: list[bool], result: Tensor,
    logsumexp: Tensor, cum_query: Tensor, cum_key: Tensor, most_query: int, most_key: int, dropout: float, is_causal: bool,
    seed: Tensor, offset: Tensor, *, scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """Gradients of query, key and value."""
    options = {"attn_mask": mask, "scale": scale}
    return *run(_on_cpu_backward, gradient, query, key, value, result, logsumexp, 0.0, is_causal, **options), None


def register() -> list[torch.library.Library]:
    """Gives torch this attention, for as long as what is returned lives."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_scaled_dot_product_fused_attention_overrideable", forward, "PrivateUse1")
    library.impl("_scaled_dot_product_fused_attention_overrideable_backward", backward, "PrivateUse1")
    for key in ("PrivateUse1", "AutogradPrivateUse1"):  # torch asks a device of Python's for no way of its own
        library.impl("scaled_dot_product_attention", attention, key)
    return [library]
