"""Methods that have to know of the partial vocabulary, of transformers' models and of adapters, while a model is shrunk.

They stand on the instance, before those of its class (docs/decisions/instance-attributes.md).
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from leanvocab.errors import BypassError, ModelError
from leanvocab.partial.attachments import Weakly, method_before, put_attributes
from leanvocab.partial.module import PartialModule, partial_modules


class _StandIn:
    """Stands before the method `name` of a module."""

    name: str

    def __init__(self, module: Weakly[nn.Module]):
        self._module = module

    @property
    def module(self) -> nn.Module:
        module = self._module()
        if module is None:
            raise ModelError(
                f"{self.name} was called of a shrunk model that nobody holds: keep the model in a variable"
            )
        return module

    @property
    def usual(self) -> Callable[..., Any]:
        method: Callable[..., Any] = method_before(self.module, self.name)
        return method


class _RefuseResize(_StandIn):
    """Resizing would lay rows out from the partial matrix."""

    name = "resize_token_embeddings"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for partial in partial_modules(self.module).values():
            raise BypassError(
                f"resize_token_embeddings: {partial.table.name} is shrunk to a partial vocabulary, and would be resized from its "
                "partial rows; call merge_(model), resize, build a vocabulary of the new size and shrink again"
            )
        return self.usual(*args, **kwargs)


class _FullNumParameters(_StandIn):
    """The number of the full model's parameters, which transformers writes into a shard index."""

    name = "num_parameters"

    def __call__(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        count: int = self.usual(only_trainable, exclude_embeddings)
        if exclude_embeddings:
            return count
        weights = {id(partial.weight): partial for partial in partial_modules(self.module).values()}
        absent = (
            (partial.table.full_size - partial.table.num_rows) * partial.weight.shape[1]
            for partial in weights.values()
            if partial.weight.requires_grad or not only_trainable
        )
        return count + sum(absent)


class _SaveFull(_StandIn):
    """Completes a state dict that was gathered around our hooks, as DeepSpeed's ZeRO-3 does, and handed over to be saved."""

    name = "save_pretrained"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("state_dict") is not None:
            kwargs["state_dict"] = dict(kwargs["state_dict"])
            for path, partial in partial_modules(self.module).items():
                _complete(kwargs["state_dict"], f"{path}.weight", partial)
        return self.usual(*args, **kwargs)


def _complete(state_dict: dict[str, Any], key: str, module: PartialModule) -> None:
    table, rows = module.table, state_dict.get(key)
    if isinstance(rows, Tensor) and rows.shape[0] == table.num_rows < table.full_size:
        state_dict[key] = table.view_for(state_dict, rows)


class _RefuseMerge(_StandIn):
    """Keeps an adapter from merging itself into a partial matrix: its update has full rows."""

    name = "merge"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layer = self.module.base_layer
        if not isinstance(layer, PartialModule):
            return self.usual(*args, **kwargs)
        raise BypassError(
            f"{layer.table.name}: an adapter on a partial vocabulary matrix cannot be merged into it, since its update has all "
            "rows; call leanvocab.merge_(model) first, then merge the adapter"
        )


def put_on(model: nn.Module) -> None:
    """Puts stand-ins on a shrunk model, and on the models and adapters within it that hold partial matrices."""
    for module in model.modules():
        refuse_merging(module)
        kinds = [kind for kind in (_RefuseResize, _FullNumParameters, _SaveFull) if hasattr(type(module), kind.name)]
        if kinds and partial_modules(module):
            held = Weakly(module)
            put_attributes(module, {kind.name: kind(held) for kind in kinds})


def refuse_merging(wrapper: nn.Module | None) -> None:
    """Makes an adapter on a partial matrix refuse to merge itself into it."""
    if isinstance(getattr(wrapper, "base_layer", None), PartialModule) and hasattr(wrapper, "merge"):
        assert wrapper is not None
        if not isinstance(wrapper.__dict__.get("merge"), _RefuseMerge):
            put_attributes(wrapper, {"merge": _RefuseMerge(Weakly(wrapper))})
