"""Pairs of runs: the same seed, data and settings, with leanvocab and without; what they hold and how they differ."""

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from doors.registry import Outcome, Verdict
from leanvocab.errors import LeanVocabError
from leanvocab.output.layer import RemapLinear
from leanvocab.reports import footprint

_UNCOMPARED = {"README.md", "training_args.bin"}  # cards are dated; arguments hold the folder's own path


@dataclass
class Run:
    """Results of one run: losses, tensors by name after merging, whatever else is to be equal, and what it held at a step."""

    losses: list[float] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)  # compared with ==: metrics, predictions as lists, trials
    folder: Path | None = None  # whose files are to be byte-identical
    held_bytes: int = 0  # weights, gradients and states at the largest step


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all tensors of a model, full ones while it is shrunk too."""
    return {name: each.detach().cpu().clone() for name, each in model.state_dict().items() if isinstance(each, Tensor)}


@contextlib.contextmanager
def held_bytes(run: Run, model: nn.Module) -> Iterator[None]:
    """Records weights of `model`, gradients and states of the optimizers that step on them, at the largest step."""

    def note(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        held = sum(footprint.held_bytes(model.parameters(), optimizer.state).values())
        run.held_bytes = max(run.held_bytes, held + sum(map(_frozen_nbytes, model.modules())))

    handle = register_optimizer_step_post_hook(note)
    try:
        yield
    finally:
        handle.remove()


def _frozen_nbytes(module: nn.Module) -> int:
    """Rows that do not train and are still in the softmax: no parameter, and held all the same."""
    if not isinstance(module, RemapLinear) or module.frozen_rows is None:
        return 0
    table = module.table
    if table.output != "frozen" or table.frozen_rows_on == "host":
        return 0
    return (table.full_size - table.num_rows) * module.weight.shape[1] * module.frozen_rows.sizes.held_dtype.itemsize


def compare(full: Run, lean: Run, left_out: int | None = None) -> Outcome:
    """Bits first; where any differs, by how much and where. `left_out` is the number of elements that are not held."""
    saved = (full.held_bytes - lean.held_bytes) / left_out if left_out else None
    findings = [*_compare_tensors(full, lean), *_compare_losses(full, lean), *_compare_rest(full, lean)]
    if not findings:
        return Outcome("identical", saved_per_element=saved)
    worst = max(difference for difference, _ in findings)
    verdict: Verdict = "close" if worst < 0.01 else "different"
    first = max(findings, key=lambda each: each[0])[1]
    return Outcome(verdict, f"{first} ({len(findings)} things differ)", worst, saved)


def _compare_tensors(full: Run, lean: Run) -> Iterator[tuple[float, str]]:
    for name in [*full.tensors, *(each for each in lean.tensors if each not in full.tensors)]:
        left, right = full.tensors.get(name), lean.tensors.get(name)
        if left is None or right is None or left.shape != right.shape or left.dtype != right.dtype:
            yield float("inf"), f"{name} is {_what(left)} and {_what(right)}"
        elif not torch.equal(_bits(left), _bits(right)):
            # A key's bias has no gradient but rounding, of which Adam makes steps: it says nothing about how far apart they are.
            difference = 0.0 if name.endswith("key.bias") else relative_difference(left, right)
            yield difference, f"{name} differs by {difference:.1e}"


def relative_difference(left: Tensor, right: Tensor) -> float:
    """Norm of the difference by the norm of the first; infinite where anything is not a number."""
    if left.is_complex() or not left.is_floating_point():
        left, right = left.to(torch.float64), right.to(torch.float64)
    difference = float((left.double() - right.double()).norm() / left.double().norm().clamp(min=1e-30))
    return difference if difference == difference else float("inf")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8) if tensor.numel() else tensor


def _what(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"


def _compare_losses(full: Run, lean: Run) -> Iterator[tuple[float, str]]:
    if len(full.losses) != len(lean.losses) or not full.losses:
        yield float("inf"), f"{len(full.losses)} losses and {len(lean.losses)}"
        return
    for step, (left, right) in enumerate(zip(full.losses, lean.losses, strict=True)):
        if not (math.isfinite(left) and math.isfinite(right)):
            yield float("inf"), f"loss {step}: {left!r} and {right!r}, expected numbers"
        elif left != right:
            yield abs(left - right) / max(abs(left), 1e-30), f"loss {step}: {left!r} and {right!r}"


def _compare_rest(full: Run, lean: Run) -> Iterator[tuple[float, str]]:
    for name in full.others.keys() | lean.others.keys():
        left, right = full.others.get(name), lean.others.get(name)
        if left == right:
            continue
        yield _numbers_differ(left, right), f"{name}: {str(left)[:80]} and {str(right)[:80]}"
    if full.folder is not None and lean.folder is not None:
        for name in differing_files(full.folder, lean.folder):
            yield _file_difference(full.folder / name, lean.folder / name), f"the file {name} differs"


def _numbers_differ(left: Any, right: Any) -> float:
    """The relative difference of numbers, or of lists of numbers by norm; infinite for anything else."""
    try:
        first, second = torch.tensor(left, dtype=torch.float64), torch.tensor(right, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        return float("inf")
    return relative_difference(first, second) if first.shape == second.shape else float("inf")


def differing_files(first: Path, second: Path) -> list[str]:
    """Files that are not byte for byte the same in both folders."""
    names = {str(path.relative_to(each)) for each in (first, second) for path in each.rglob("*") if path.is_file()}
    return sorted(
        name
        for name in names
        if Path(name).name not in _UNCOMPARED and _content(first / name, first) != _content(second / name, second)
    )


def _content(path: Path, root: Path) -> bytes | None:
    if not path.exists():
        return None
    content = path.read_bytes()
    if path.name == "trainer_state.json":  # its paths and its clock are the run's own
        state = json.loads(content.replace(str(root).encode(), b""))
        for entry in state["log_history"]:
            for clock in [key for key in entry if key.endswith(("runtime", "per_second"))]:
                del entry[clock]
        return json.dumps(state).encode()
    return content


def _file_difference(first: Path, second: Path) -> float:
    """By the numbers in both, where they hold as many; infinite where anything else differs."""
    if not (first.exists() and second.exists()):
        return float("inf")
    if first.suffix == ".safetensors":
        from safetensors.torch import load_file

        left, right = load_file(first), load_file(second)
        if left.keys() != right.keys():
            return float("inf")
        return max(relative_difference(left[name], right[name]) for name in left if not name.endswith("key.bias"))
    read: Callable[[Path], Any] = (
        functools.partial(torch.load, weights_only=False) if first.suffix in (".pt", ".bin", ".pth") else _read_text
    )
    both = [torch.utils._pytree.tree_flatten(read(path))[0] for path in (first, second)]
    numbers = [[each for each in leaves if isinstance(each, Tensor | float)] for leaves in both]
    others = [[each for each in leaves if not isinstance(each, Tensor | float)] for leaves in both]
    if others[0] != others[1] or len(numbers[0]) != len(numbers[1]):
        return float("inf")
    flat = [torch.cat([_plain(each).double().flatten() for each in leaves]) for leaves in numbers]
    return relative_difference(*flat) if flat[0].shape == flat[1].shape else float("inf")


def _plain(value: Any) -> Tensor:
    """A number, or a tensor, which torchao may have quantized."""
    return value.dequantize() if hasattr(value, "__tensor_flatten__") else torch.as_tensor(value)  # type: ignore[no-any-return]


def _read_text(path: Path) -> Any:
    return json.loads(_content(path, path.parents[1]) or b"") if path.suffix == ".json" else path.read_bytes()


def nothing_wrong(names: list[str]) -> Outcome:
    """Of a door that names itself what differs: identical where it names nothing."""
    return Outcome("different" if names else "identical", ", ".join(names), float("inf") if names else 0.0)


def refused(run: Callable[[], Any]) -> Outcome:
    """Runs what must be refused: the outcome is leanvocab's own error, by name, or "works" where nothing was raised."""
    try:
        run()
    except LeanVocabError as error:
        return Outcome("refused", f"{type(error).__name__}: {error}")
    return Outcome("works", "nothing was raised")


def one_thread(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same sums in the same order, whatever the machine."""

    @functools.wraps(function)
    def with_one(*args: Any, **kwargs: Any) -> Any:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_num_threads(before)

    return with_one
