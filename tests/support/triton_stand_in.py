"""Triton's language in torch's operations: kernels run program by program from their own source, and what they move is counted.

For machines without Triton, and for the emulated accelerator, whose tensors Triton does not know. A load or a store beside its
tensor is an error here. How quick a kernel is, and whether it compiles, nobody learns from it.
"""

import importlib.util
import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import accelerator.memory as device
import pytest
import torch
from torch import Tensor

import leanvocab.output
from leanvocab.output import softmax_kernel


@dataclass(frozen=True)
class _Pointer:
    """Positions in a tensor that is contiguous."""

    flat: Tensor
    positions: Any

    def __add__(self, steps: Any) -> "_Pointer":
        return _Pointer(self.flat, self.positions + steps)

    def asked(self, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Positions, and which of them are read or written."""
        positions = torch.as_tensor(self.positions)
        is_asked = torch.ones_like(positions, dtype=torch.bool) if mask is None else mask
        beside = is_asked & ((positions < 0) | (positions >= len(self.flat)))
        assert not beside.any(), f"a kernel asks for position {positions[beside][0]} of {len(self.flat)}"
        return positions, is_asked


class _Kernels:
    """The language, and bytes that kernels have moved, by name of the kernel."""

    def __init__(self) -> None:
        self.moved: Counter[str] = Counter()
        self._name, self._program = "", (0, 0, 0)

    def jit(self, function: Callable[..., None]) -> Any:
        name = function.__name__

        def on(grid: Sequence[int]) -> Callable[..., None]:
            def launch(*given: Any, num_warps: int, **named: Any) -> None:
                arguments = [_pointer(value) if isinstance(value, Tensor) else value for value in given]
                for program in itertools.product(*map(range, grid)):
                    self._name, self._program = name, program
                    function(*arguments, **named)

            return launch

        return type("Kernel", (), {"__getitem__": lambda _, grid: on(grid), "__name__": name})()

    def load(self, pointer: _Pointer, mask: Tensor | None = None, other: float = 0.0) -> Tensor:
        positions, is_asked = pointer.asked(mask)
        self.moved[self._name] += int(is_asked.sum()) * pointer.flat.element_size()
        return pointer.flat[positions.masked_fill(~is_asked, 0)].masked_fill(~is_asked, other)

    def store(self, pointer: _Pointer, value: Tensor, mask: Tensor | None = None) -> None:
        positions, is_asked = pointer.asked(mask)
        self.moved[self._name] += int(is_asked.sum()) * pointer.flat.element_size()
        pointer.flat[positions[is_asked]] = value.to(pointer.flat.dtype).expand_as(positions)[is_asked]

    def language(self) -> ModuleType:
        module: Any = ModuleType("triton.language")
        vars(module).update(
            load=self.load, store=self.store, program_id=lambda axis: torch.tensor(self._program[axis]),
            arange=torch.arange, where=torch.where, exp=torch.exp, log=torch.log, sum=torch.sum, max=torch.amax,
            maximum=lambda first, second: torch.maximum(first, torch.as_tensor(second, dtype=first.dtype)),
            full=lambda shape, value, dtype: torch.full(shape, value, dtype=dtype),
            zeros=lambda shape, dtype: torch.zeros(shape, dtype=dtype),
            int64=torch.int64, float32=torch.float32, constexpr=object,
        )  # fmt: skip
        return module


def _pointer(tensor: Tensor) -> _Pointer:
    assert tensor.is_contiguous(), "a kernel counts on rows that follow on one another"
    there = device.inside(tensor) if tensor.device.type == device.NAME else tensor
    return _Pointer(there.view(-1), 0)


@contextmanager
def kernels_run() -> Iterator[Counter[str]]:
    """Within it the loss is computed by the kernels, on whatever device, and the counter has the bytes that they move."""
    kernels = _Kernels()
    triton: Any = ModuleType("triton")
    triton.jit, triton.language = kernels.jit, kernels.language()
    triton.cdiv, triton.next_power_of_2 = lambda a, b: -(-a // b), lambda n: 1 << math.ceil(math.log2(n))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "triton", triton)
        patch.setitem(sys.modules, "triton.language", triton.language)
        patch.setattr(leanvocab.output, "triton_kernels", _module(), raising=False)
        patch.setattr(softmax_kernel, "serves", lambda scores: scores.is_contiguous())
        yield kernels.moved


def _module() -> ModuleType:
    """The module of the kernels, made anew of its source."""
    spec = importlib.util.find_spec("leanvocab.output.triton_kernels")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
