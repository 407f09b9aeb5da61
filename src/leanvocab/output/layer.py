"""An output layer over a partial vocabulary: a smaller matrix, and logits that are as wide as ever.

`"frozen"`: the rows that are not kept do not train and are still in the softmax, so that the loss is the full model's.
`"restricted"`: the softmax is over the kept rows alone, which is another objective. Everything that is not a matrix over the
vocabulary, a bias for one, stays whole (docs/decisions/whole-tensors.md).
"""

import warnings
from typing import ClassVar

import torch
from torch import Tensor, nn

from leanvocab.errors import RESIZE_FIRST, BypassError, LeanVocabWarning, MissingTokenError
from leanvocab.output.frozen_rows import FrozenRows
from leanvocab.output.lazy_logits import LayerSnapshot, LazyLogits
from leanvocab.output.logit_operations import Elementwise
from leanvocab.output.loss import SoftmaxColumns
from leanvocab.output.projection import KeptRows
from leanvocab.partial.devices import autocast_dtype
from leanvocab.partial.missing import describe_missing
from leanvocab.partial.module import PartialModule


class RemapLinear(PartialModule, nn.Linear):
    """A linear layer over the rows of a partial vocabulary that scores all token ids.

    Input: hidden states [..., dim]; output: logits [..., full_size], which are computed when they are looked at, and never
    for a cross-entropy. `weight` is [len(vocabulary), dim]; `out_features` and the bias stay those of the full layer.
    Made by `switch_class`.

    A label that is no token id raises `IndexError`, and in the restricted mode one outside the vocabulary raises
    `MissingTokenError` in training mode: on CPU at once, elsewhere before the next optimizer step or forward.
    """

    own_attributes: ClassVar[tuple[str, ...]] = (
        *PartialModule.own_attributes,
        "frozen_rows",
        "_ids",
        "_ignore_index",
        "num_calls",
    )
    frozen_rows: FrozenRows | None  # once logits have been computed, in the frozen mode
    _ids: Tensor
    _ignore_index: int  # of the labels that were checked last on a device
    num_calls: int  # of forwards, which tells whether a loss went around the layer

    def settle_on_device(self) -> None:
        """Puts beside the weight what belongs on its device."""
        super().settle_on_device()
        device = torch.device("cpu") if self.weight.is_meta else self.weight.device
        self._bring_ids(device)
        frozen = self.__dict__.get("frozen_rows")
        self.frozen_rows = frozen if frozen is not None and frozen.device == device else None
        self.num_calls = self.__dict__.get("num_calls", 0)

    def drop_caches(self) -> None:
        self.frozen_rows = None

    def forward(self, input: Tensor) -> Tensor:
        return self._computed(input) if torch.compiler.is_compiling() else self._lazy(input)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _computed(self, input: Tensor) -> Tensor:
        """A compiled model gets the logits themselves: a compiler would look into what makes them lazy."""
        return self._lazy(input).compute()

    def _lazy(self, input: Tensor) -> LazyLogits:
        self.begin()
        self._refuse_zero3()
        self.num_calls += 1
        input = input.to(autocast_dtype(input.device) or input.dtype)
        elementwise = Elementwise(self.table.full_size)
        if self.bias is not None:
            elementwise = elementwise.plus(self.bias.to(input.dtype))
        snapshot = LayerSnapshot(
            self.table.name, self.rows, self._columns(input), self._check_labels, torch.is_grad_enabled()
        )
        return LazyLogits(input, snapshot, elementwise)

    def _refuse_zero3(self) -> None:
        """ZeRO-3 takes the rows away after this forward, before the loss, and cuts lazy logits off from the graph."""
        if self.training and torch.is_grad_enabled() and hasattr(self.weight, "ds_status"):
            raise BypassError(
                f'{self.table.name}: output="{self.table.output}" does not train under DeepSpeed\'s ZeRO-3, which takes an '
                "output layer's rows away before the loss is computed from them; train with ZeRO-2 or FSDP2, or, where the "
                'output layer is not tied to an input table, with shrink_(…, output="full")'
            )

    def error_of(self, position: int, token_id: int) -> IndexError:
        if not 0 <= token_id < self.table.full_size:
            return self._no_token_error(position, token_id, self._ignore_index)
        return MissingTokenError(describe_missing(self.table, token_id, f"flat position {position} of the labels"))

    def _columns(self, hidden: Tensor) -> SoftmaxColumns:
        if self.table.output == "restricted":
            kept = self._kept_rows(hidden.device)
            return SoftmaxColumns(lambda: kept, self.table.num_rows)
        frozen = self.frozen_rows
        if frozen is None or not frozen.fits(self.table, hidden.device, hidden.dtype):
            last = frozen if self.table.look_up_frozen is None else self.table.look_up_frozen.rows or frozen
            frozen = self.frozen_rows = FrozenRows(self.table, hidden.device, hidden.dtype, last)
        if not frozen.sizes.on_host:
            return SoftmaxColumns(frozen.whole, self.table.full_size, row_filter=frozen.filter)
        return SoftmaxColumns(frozen.whole, self.table.full_size, frozen.blocks, self._kept_rows(hidden.device))

    def _kept_rows(self, device: torch.device) -> KeptRows:
        if self._ids.device != device:  # some libraries move parameters one by one (FSDP)
            self._bring_ids(device)
        return KeptRows(self._ids, self.table.full_size)

    def _bring_ids(self, device: torch.device) -> None:
        with torch.inference_mode(False):  # training goes on with them
            self._ids = self.table.token_ids.to(device)

    def _check_labels(self, labels: Tensor, ignore_index: int) -> None:
        """Labels [n] in full ids: one that is none would be another token's, or an infinite loss."""
        counted = labels != ignore_index
        wrong = counted & ((labels < 0) | (labels >= self.table.full_size))
        if self.table.output == "restricted":
            missing = counted & (self._kept_rows(labels.device).columns_of(labels) < 0)
        else:
            missing = wrong
        if labels.device.type != "cpu" and self.training:  # nothing waits
            self._ignore_index = ignore_index
            self.missing.add(labels, missing)
            return
        if wrong.any():
            position = int(wrong.nonzero()[0])
            raise self._no_token_error(position, int(labels[position]), ignore_index)
        if self.table.output == "restricted":
            self._check_kept(labels, missing)

    def _no_token_error(self, position: int, label: int, ignore_index: int) -> IndexError:
        return IndexError(
            f"{self.table.name}: label {label} at flat position {position} is no token id: expected 0 … "
            f"{self.table.full_size - 1}, or {ignore_index}, which is ignored; were the labels made with another tokenizer?"
            f"{f' Or {RESIZE_FIRST}' if label > 0 else ''}"
        )

    def _check_kept(self, labels: Tensor, missing: Tensor) -> None:
        if missing.any():
            position = int(missing.nonzero()[0])
            if self.training:
                raise self.error_of(position, int(labels[position]))
            warnings.warn(
                f"{self.table.name}: {int(missing.sum()):,} labels are outside the partial vocabulary, the first of them "
                f'{self.table.vocabulary.describe(int(labels[position]))}: with output="restricted" they have no '
                "probability, and the loss is infinite",
                LeanVocabWarning,
                stacklevel=2,
            )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rows={self.table.num_rows}, output={self.table.output}"


RemapLinear.kind = RemapLinear
