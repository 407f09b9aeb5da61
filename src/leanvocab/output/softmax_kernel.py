"""The softmax of scores on CUDA by kernels that read them twice and write them once, where Triton is installed; and the rows of
labels.

torch's own operations pass over scores in bf16 eleven times, since each that widens them is a pass of its own
(docs/decisions/frozen-rows.md). The kernels are tried once on each device before they are used.
"""

import functools
import importlib.util
import warnings

import torch
from torch import Tensor

from leanvocab.errors import LeanVocabWarning

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def serves(values: Tensor) -> bool:
    """True where the kernels can be given scores, or rows."""
    return values.is_cuda and values.is_contiguous() and values.dtype in _DTYPES and works_on(values.device)


def statistics(scores: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of scores [n, columns] the logsumexp, the score in the label's column (-inf for column -1) and the sum: fp32 [n]."""
    from leanvocab.output import triton_kernels

    numbers = torch.empty(3, len(scores), dtype=torch.float32, device=scores.device)
    lse, of_label, total = numbers.unbind()
    with torch.cuda.device_of(scores):
        triton_kernels.write_statistics(scores, columns.contiguous(), lse, of_label, total)
    return lse, of_label, total


def turn_into_gradient(
    scores: Tensor, lse: Tensor, columns: Tensor | None, at_label: float, share: float, scale: Tensor | None
) -> None:
    """Writes exp(score - lse) over the scores, less `share`, less `at_label` in the column of the label, times `scale` [n, 1]."""
    from leanvocab.output import triton_kernels

    columns = None if columns is None else columns.contiguous()
    scale = None if scale is None else scale.contiguous()
    with torch.cuda.device_of(scores):
        triton_kernels.write_gradient(scores, lse.contiguous(), columns, at_label, share, scale)


def add_rows(total: Tensor, rows: Tensor, columns: Tensor) -> None:
    """Adds to each row of `total` [n, dim] the row of its column, and nothing for column -1."""
    from leanvocab.output import triton_kernels

    with torch.cuda.device_of(total):
        triton_kernels.add_rows(total, rows, columns.contiguous())


@functools.cache
def works_on(device: torch.device) -> bool:
    """True where the kernels can be made and give what they should, tried once."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        if is_right_on(device):
            return True
        problem = "their numbers are not those of torch's operations"
    except Exception as error:  # whatever a compiler or driver raises: torch's own operations do
        problem = f"{type(error).__name__}: {error}"
    warnings.warn(
        f"Triton is installed and its kernels do not run on {device} ({problem}); the loss is computed by torch's operations, "
        "which move more bytes",
        LeanVocabWarning,
        stacklevel=2,
    )
    return False


def is_right_on(device: torch.device) -> bool:
    """True where the kernels give what torch's operations give, tried on a few scores."""
    scores = torch.linspace(-8.0, 8.0, 3 * 70, device=device).view(3, 70)
    columns = torch.tensor([2, -1, 69], device=device)
    lse, of_label, total = statistics(scores, columns)
    expected = torch.softmax(scores, -1) - 0.25
    expected[0, 2] -= 0.5
    expected[2, 69] -= 0.5
    numbers = torch.stack([lse - scores.logsumexp(-1), total - scores.sum(-1)])
    label_errors = (of_label - scores[torch.arange(3, device=device), columns])[::2]
    turn_into_gradient(scores, lse, columns, 0.5, 0.25, None)
    rows, total = torch.eye(3, device=device), torch.ones(3, 3, device=device)
    add_rows(total, rows, torch.tensor([1, -1, 2], device=device))
    row_errors = total - 1 - rows[[1, 0, 2]] * torch.tensor([[1.0], [0.0], [1.0]], device=device)
    errors = [part.abs().max() for part in (numbers, label_errors, scores - expected, row_errors)]
    return all(float(error) < 1e-3 for error in errors) and bool(of_label[1].isinf())
