"""The peak of a training step, activations included: found by a step on tensors that have shapes and no memory.

The model itself runs, so that every architecture is answered by its own code, in a second or so. What PyTorch's operations
allocate is counted by storages that are alive; what kernels take inside is not (docs/decisions/a-step-without-memory.md).
"""

import contextlib
import copy
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from leanvocab.errors import ModelError, first_line
from leanvocab.model.full_table import LOOKUPS
from leanvocab.reports.memory_estimate import TrainingStep


@dataclass(frozen=True)
class PartialOutput:
    """A loss that is computed from the hidden states: they go into `layer`, and no logits come out of it."""

    layer: nn.Module
    loss_bytes: Callable[[int], int]  # of a number of tokens: what the loss holds at its peak


def peak_above_weights(
    module: nn.Module,
    step: TrainingStep,
    dtype_of: Callable[[Tensor], torch.dtype],
    *,
    mixed: bool = False,
    rows: Mapping[Tensor, int] | None = None,
    outputs: tuple[PartialOutput, ...] = (),
) -> int:
    """Bytes of activations and gradients at the peak of a forward and backward, beside parameters, buffers and states.

    `rows` are those of matrices that are partial. The model is copied without its values, and stays as it is.

    Raises:
        ModelError: the model asks for values that nobody knows, or wants other inputs.
    """
    live = _LiveBytes()
    try:
        with FakeTensorMode(), live, contextlib.ExitStack() as stack:
            twin, twins = _twin(module, dtype_of, rows or {}, live)
            stack.enter_context(
                warnings.catch_warnings(action="ignore")
            )  # of the model's code: it will say them in earnest
            _set_up(twin, step)
            if not step.on_cpu:
                stack.enter_context(_accelerator_kernels())
            context = torch.autocast("cpu", torch.bfloat16) if mixed else contextlib.nullcontext()
            return _run(twin, step, context, live, [(twins[id(each.layer)], each.loss_bytes) for each in outputs])
    except Exception as error:  # whatever a model's code raises that meets tensors without values
        raise ModelError(f"{type(error).__name__}: {first_line(error)}") from error


class _LiveBytes(TorchDispatchMode):
    """Bytes of storages that operations made and that are alive: now, and at their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Asked for a value: of masks, whether all of them count, which they do in a batch without padding.
        if func is torch.ops.aten._local_scalar_dense.default:
            return True
        if func is torch.ops.aten.nonzero.default:
            result = args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.int64)
        else:
            result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.add(value)
        return result

    def add(self, tensor: Tensor, *, counts: bool = True) -> None:
        """Notes the storage of a tensor."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known[key] = storage.nbytes() if counts else 0
            self.now += self._known[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key)

    def discount(self, tensors: Iterator[Tensor]) -> None:
        """Leaves tensors out that are counted elsewhere."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            self.now -= self._known[key]
            self._known[key] = 0

    def _gone(self, key: int) -> None:
        self.now -= self._known.pop(key)


@contextlib.contextmanager
def _accelerator_kernels() -> Iterator[None]:
    """Has operations that hold less on an accelerator than the CPU's kernels do hold as much as there.

    Functions are replaced, since a mode over functions is off in a backward, where checkpoints are computed again.
    """
    attend, drop = F.scaled_dot_product_attention, F.dropout

    def fused(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, **rest: Any
    ) -> Any:
        return attend(query, key, value, attn_mask, 0.0, **rest)

    def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(input, p, True)[0] if training and p > 0 else input

    F.scaled_dot_product_attention, F.dropout = fused, dropout  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.dropout = attend, drop


def _twin(
    module: nn.Module, dtype_of: Callable[[Tensor], torch.dtype], rows: Mapping[Tensor, int], live: _LiveBytes
) -> tuple[nn.Module, dict[int, nn.Module]]:
    """A copy with tensors that have no values, and the copy of each module by the module's id."""
    memo: dict[int, Any] = {}
    num_rows = {id(matrix): count for matrix, count in rows.items()}
    for parameter in module.parameters():
        shape = (num_rows.get(id(parameter), parameter.shape[0]), *parameter.shape[1:]) if parameter.ndim else ()
        values = torch.empty(shape, dtype=dtype_of(parameter), device="cpu")
        memo[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
    live.discount(value for value in memo.values() if isinstance(value, Tensor))
    twin = copy.deepcopy(module, memo)
    for each in twin.modules():
        if isinstance(each, LOOKUPS) and each.padding_idx is not None and each.padding_idx >= len(each.weight):
            each.padding_idx = len(each.weight) - 1
    return twin, {id(each): memo[id(each)] for each in module.modules()}


def _set_up(twin: Any, step: TrainingStep) -> None:
    twin.train()
    for each in twin.modules():
        if hasattr(getattr(each, "config", None), "use_cache"):
            each.config.use_cache = False
    if step.gradient_checkpointing:
        getattr(twin, "activation_checkpointing_enable", twin.gradient_checkpointing_enable)()


class _HiddenStates(Exception):  # noqa: N818 (no error: it ends a forward)
    """What went into an output layer that is partial: the loss is computed from it."""

    def __init__(self, hidden: Tensor, loss_bytes: Callable[[int], int], weight: Any):
        super().__init__("hidden states")
        self.hidden, self.loss_bytes, self.weight = hidden, loss_bytes, weight


def _run(twin: Any, step: TrainingStep, context: Any, live: _LiveBytes, outputs: list[tuple[nn.Module, Any]]) -> int:
    for layer, loss_bytes in outputs:

        def stop(module: Any, inputs: Any, loss_bytes: Any = loss_bytes) -> None:
            raise _HiddenStates(inputs[0], loss_bytes, module.weight)

        layer.register_forward_pre_hook(stop)
    live.peak = live.now
    inputs = _inputs(twin, step)
    try:
        with context:
            loss = twin(**inputs).loss
    except _HiddenStates as reached:
        hidden, gradient = _after_a_lean_loss(reached)
        hidden.backward(gradient)
    else:
        loss.backward()
    return live.peak


def _after_a_lean_loss(reached: _HiddenStates) -> tuple[Tensor, Tensor]:
    """The hidden states and their gradient, which is made beside the loss, as that of the rows is."""
    hidden, weight = reached.hidden, reached.weight
    reached.__traceback__ = None  # it holds on to the frames of the model's forward
    num_tokens = hidden.numel() // hidden.shape[-1]
    room = hidden.new_empty(reached.loss_bytes(num_tokens), dtype=torch.uint8)
    del room
    if weight.requires_grad:
        weight.grad = torch.empty_like(weight)
    return hidden, torch.empty_like(hidden)


def _inputs(twin: Any, step: TrainingStep) -> dict[str, Tensor]:
    config = twin.config
    ids = torch.zeros(step.batch_size, step.length, dtype=torch.int64, device="cpu")
    output = twin.get_output_embeddings() if hasattr(twin, "get_output_embeddings") else None
    if output is None:
        is_number = config.num_labels == 1
        labels = torch.zeros(step.batch_size, dtype=torch.float32 if is_number else torch.int64, device="cpu")
    elif config.is_encoder_decoder:
        labels = torch.zeros(step.batch_size, step.target_length or step.length, dtype=torch.int64, device="cpu")
    else:
        labels = ids
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
