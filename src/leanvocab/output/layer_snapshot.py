"""An output layer as it was in one forward: what its logits are computed from, whenever somebody looks at them."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from leanvocab.errors import BypassError
from leanvocab.output.loss import SoftmaxColumns


@dataclass
class LayerSnapshot:
    """The kept rows as they were in the forward, and the columns of the softmax."""

    name: str
    weight: Tensor
    columns: SoftmaxColumns
    check_labels: Callable[[Tensor, int], None]  # of labels and the one that is ignored
    has_graph: bool
    _version_then: int = field(init=False)
    _rows_then: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._version_then = self.weight._version

    def keep_rows(self) -> None:
        """Copies the rows, which are about to change."""
        if self._rows_then is None and self.weight._version == self._version_then:
            self._rows_then = self.weight.detach().clone()

    @property
    def rows(self) -> Tensor:
        """The kept rows, as they were in the forward."""
        if self._rows_then is not None:
            return self._rows_then
        if self.weight.untyped_storage().size() == 0:
            raise BypassError(
                f"{self.name}: its rows were taken away after its forward, as ZeRO-3 and a shard of its own under FSDP2 do; "
                'keep the output layer in the root\'s shard, or leave it whole: output="full"'
            )
        if self.weight._version != self._version_then:
            raise BypassError(
                f"{self.name}: its rows were changed after the forward, and only then the logits were looked at; read "
                "outputs.logits before that, or change the rows by a torch.optim.Optimizer"
            )
        return self.weight
