"""bitsandbytes' kernels, each one operation as on CUDA: elsewhere it falls back on plain operations with temporaries of theirs.

A 4-bit weight is held as it is there: two values a byte, and absmax in blocks, in 8 bits where it is quantized twice. A product
makes the weight anew in 16 bits, as CUDA does for more than a few hundred tokens.
"""

import functools
import importlib

import torch

from accelerator.kernels import run

KERNELS = ("quantize_4bit", "dequantize_4bit", "quantize_blockwise", "dequantize_blockwise")


@functools.cache
def know_four_bits() -> torch.library.Library:
    """Gives torch these kernels. Raises ImportError where bitsandbytes is not installed."""
    importlib.import_module("bitsandbytes")
    library = torch.library.Library("bitsandbytes", "IMPL")
    for name in KERNELS:
        operation = getattr(torch.ops.bitsandbytes, name).default
        library.impl(name, functools.partial(run, operation), "PrivateUse1")
    return library
