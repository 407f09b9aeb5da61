"""A card on paper: the emulated accelerator of the tests, which computes nothing, so that bytes are counted on any machine.

Models of a published size are built on it from their configs, and take no memory here. Everything that PyTorch allocates by
itself is counted; `LEFT_OUT` says what is not.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

PAPER = "paper"
LEFT_OUT = (
    "Counted, not measured: bytes of tensors that PyTorch allocates, by an emulated device that computes nothing. Left out: "
    "workspaces of kernels, the allocator's rounding, fragmentation, the driver's context (some hundred MB). Labels that are "
    "ignored are counted as none; attention is a fused kernel's, which holds no scores."
)


def why_not() -> str | None:
    """Reason why nothing can be counted here, None where it can."""
    import accelerator

    return None if accelerator.can_be_emulated() else "open: a device can be emulated from torch 2.13 on"


@contextmanager
def on_paper() -> Iterator[str]:
    """The device is there within the block; gives its name."""
    import accelerator

    with accelerator.in_use(computes=False):
        if find_spec("bitsandbytes") is not None:
            accelerator.know_four_bits()
        yield accelerator.NAME


def peak_of(prepare: Callable[[str], Callable[[], Any]]) -> tuple[int, Any]:
    """The peak of the second step of a program, and what it gave; `prepare(device)` makes the program, and gives its step."""
    import torch

    gc.collect()
    with on_paper() as device:
        module = torch.get_device_module(device)
        start = module.memory_allocated()
        step = prepare(device)
        for _ in range(2):
            gc.collect()
            module.reset_peak_memory_stats()
            given = step()
        return int(module.max_memory_allocated()) - start, given


def allocated(device: str) -> int:
    """Bytes that are on the device now."""
    import torch

    return int(torch.get_device_module(device).memory_allocated())


def set_total_memory(num_bytes: int | None) -> None:
    """Makes the card one of so many bytes."""
    import accelerator

    accelerator.set_total_memory(num_bytes)


def in_four_bits(model: Any) -> Any:
    """A model whose linear layers are bitsandbytes' in 4 bits (nf4, double quantization), as `from_pretrained` would load them.

    Quantized on the model's own device by bitsandbytes itself; the output layer stays, as it does there.
    """
    import bitsandbytes as bnb
    import torch
    from torch import nn

    options = {"quant_type": "nf4", "compress_statistics": True}
    output = model.get_output_embeddings()
    for path, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or module is output:
            continue
        size = module.in_features, module.out_features, module.bias is not None
        quantized = bnb.nn.Linear4bit(*size, compute_dtype=torch.bfloat16, device="meta", **options)
        weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, module=quantized, **options)
        quantized.weight, quantized.bias = weight.to(module.weight.device), module.bias
        model.set_submodule(path, quantized)
    model.is_loaded_in_4bit, model.quantization_method = True, "bitsandbytes"
    return model
