"""The kernels of the loss in Triton's interpreter, against torch's operations; and made for GPUs that nobody has to have."""

import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from triton_stand_in import kernels_run

from leanvocab.errors import LeanVocabWarning
from leanvocab.output import softmax_kernel

if importlib.util.find_spec("triton") is None:
    _TRITON = pytest.mark.skip(reason="Triton is not installed: no kernel is there to be tried")
else:
    _TRITON = pytest.mark.filterwarnings("ignore")

_VALUES = """
import torch
from leanvocab.output import triton_kernels
from leanvocab.output.logit_operations import Elementwise
from leanvocab.output.scores import KernelScores, Targets, WideScores

torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for num_columns in (1, 70, 9_000):  # less than a block, and more than one
        raw = (5 * torch.randn(5, num_columns)).to(dtype)
        if num_columns > 70:
            raw[3, :8192] = -torch.inf
        wide, columns = raw.float(), torch.tensor([0, -1, num_columns - 1, 0, num_columns // 2])
        lse, of_label, total = torch.empty(3, 5).unbind()
        triton_kernels.write_statistics(raw, columns, lse, of_label, total)
        expected = wide.gather(1, columns.clamp(min=0)[:, None])[:, 0].masked_fill(columns < 0, -torch.inf)
        torch.testing.assert_close(lse, wide.logsumexp(-1))
        torch.testing.assert_close(of_label, expected)
        torch.testing.assert_close(total, wide.sum(-1), rtol=1e-5, atol=1e-3)
        scale, hot = torch.rand(5, 1), torch.zeros(5, num_columns)
        for row in (0, 2, 3, 4):
            hot[row, columns[row]] = 0.9
        smoothed = wide.softmax(-1) - hot - 0.1 / num_columns
        for its_columns, its_scale, gradient in (
            (columns, scale, smoothed * scale), (columns, None, smoothed), (None, None, wide.softmax(-1)),
        ):
            scores = raw.clone()
            triton_kernels.write_gradient(scores, lse, its_columns, 0.9, 0.1 / num_columns, its_scale)
            torch.testing.assert_close(scores.float(), gradient, rtol=2**-7, atol=1e-6)

    for dim in (1, 70, 9_000):
        rows, total = (torch.randint(-8, 9, (num, dim)).to(dtype) for num in (4, 5))  # sums are not rounded
        picked = torch.tensor([3, -1, 0, 3, 1])
        added = torch.where(picked[:, None] < 0, total, total + rows[picked])
        triton_kernels.add_rows(total, rows, picked)
        torch.testing.assert_close(total, added, rtol=0, atol=0)

raw, scale = torch.randn(5, 70), torch.rand(5, 1)
targets = Targets(torch.tensor([0, -1, 69, 3, 35]), 0.1, 90)
both = []
for scores in (KernelScores(raw.clone()), WideScores(raw.clone(), Elementwise(70), None, True)):
    numbers = scores.statistics(targets)
    scores.turn_into_gradient(numbers.lse + 0.5, targets, scale)
    both.append((numbers.losses(targets)[torch.tensor([0, 2, 3, 4])], scores.raw))
torch.testing.assert_close(*both)
"""

_COMPILED = """
import itertools, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from leanvocab.output import triton_kernels

def make(kernel, constants, **others):
    signature = {name: others.get(name, "constexpr" if name in constants else "*fp32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    assert "cubin" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm

for kernel, dtype in itertools.product(triton_kernels.KERNELS, ("fp32", "bf16", "fp16")):
    for flags in itertools.product((True, False), repeat=sum(name.startswith("has") for name in kernel.arg_names)):
        constants = {"block": 8192, **dict(zip(("has_labels", "has_scale"), flags))}
        make(
            kernel, constants, columns="*i64", num_columns="i32", dim="i32", at_label="fp32", share="fp32",
            **dict.fromkeys(("scores", "rows", "sums"), "*" + dtype),
        )
"""


def _run(program: str, **environment: str) -> None:
    source = Path(softmax_kernel.__file__).parents[2]
    paths = os.pathsep.join([str(source), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, **environment}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_kernels_give_what_torchs_operations_give() -> None:
    """By a stand-in for Triton's language, which is there on every machine."""
    with kernels_run() as moved:
        exec(compile(_VALUES, "kernels", "exec"), {})
    assert len(moved) == 3  # all kernels ran


@_TRITON
def test_the_kernels_give_the_same_in_tritons_interpreter() -> None:
    _run(_VALUES, TRITON_INTERPRET="1")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_read_scores_twice_and_write_them_once(dtype: torch.dtype) -> None:
    raw, columns = torch.zeros(3, 9_000, dtype=dtype), torch.zeros(3, dtype=torch.int64)
    with kernels_run() as moved:
        lse, _, _ = softmax_kernel.statistics(raw, columns)
        softmax_kernel.turn_into_gradient(raw, lse, columns, 1.0, 0.0, None)
    assert sum(moved.values()) == pytest.approx(3 * raw.nbytes, rel=0.01)
    assert sum(moved.values()) > 3 * raw.nbytes  # and the numbers of the tokens


def test_the_stand_in_refuses_a_kernel_that_reads_beside_its_tensor() -> None:
    with kernels_run(), pytest.raises(AssertionError, match="asks for position 5 of 2"):
        softmax_kernel.statistics(torch.zeros(1, 2), torch.tensor([5]))


@_TRITON
def test_the_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    _run(_COMPILED, TRITON_CACHE_DIR=str(tmp_path))


def test_scores_on_a_cpu_are_left_to_torchs_operations() -> None:
    assert not softmax_kernel.serves(torch.zeros(2, 3))


def test_kernels_that_do_not_run_are_said_so_once_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> bool:
        raise RuntimeError("no driver")

    monkeypatch.setattr(softmax_kernel, "is_right_on", fail)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    device = torch.device("cuda:7")
    with pytest.warns(
        LeanVocabWarning, match=r"its kernels do not run on cuda:7 \(RuntimeError: no driver\); the loss is"
    ):
        assert not softmax_kernel.works_on(device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not softmax_kernel.works_on(device)
