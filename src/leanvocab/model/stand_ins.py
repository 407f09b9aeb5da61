"""Methods of a transformers model that have to know of the partial vocabulary, for as long as the model is shrunk.

They stand on the instance, before those of its class (docs/decisions/instance-attributes.md).
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from leanvocab.errors import BypassError
from leanvocab.partial.module import PartialModule


class _Method:
    """Stands before the method `name` of a model."""

    name: str

    def __init__(self, model: nn.Module):
        self.model = model

    @property
    def _of_class(self) -> Callable[..., Any]:
        method: Callable[..., Any] = getattr(type(self.model), self.name)
        return method


class _RefuseResize(_Method):
    """Resizing would lay rows out from the partial matrix."""

    name = "resize_token_embeddings"

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        table = next(module.table.name for _, module in _partial(self.model))
        raise BypassError(
            f"resize_token_embeddings: {table} is shrunk to a partial vocabulary, and would be resized from its partial "
            "rows; call merge_(model), resize, build a vocabulary of the new size and shrink again"
        )


class _FullNumParameters(_Method):
    """The number of the full model's parameters, which transformers writes into a shard index."""

    name = "num_parameters"

    def __call__(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        count: int = self._of_class(self.model, only_trainable, exclude_embeddings)
        if exclude_embeddings:
            return count
        weights = {id(module.weight): module for _, module in _partial(self.model)}
        absent = (
            (module.table.full_size - module.table.num_rows) * module.weight.shape[1]
            for module in weights.values()
            if module.weight.requires_grad or not only_trainable
        )
        return count + sum(absent)


class _SaveFull(_Method):
    """Completes a state dict that was gathered around our hooks, as DeepSpeed's ZeRO-3 does, and handed over to be saved."""

    name = "save_pretrained"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("state_dict") is not None:
            kwargs["state_dict"] = dict(kwargs["state_dict"])
            for path, module in _partial(self.model):
                _complete(kwargs["state_dict"], f"{path}.weight", module)
        return self._of_class(self.model, *args, **kwargs)


def _complete(state_dict: dict[str, Any], key: str, module: PartialModule) -> None:
    table, rows = module.table, state_dict.get(key)
    if isinstance(rows, Tensor) and rows.shape[0] == table.num_rows < table.full_size:
        state_dict[key] = table.view_for(state_dict, rows)


def _partial(model: nn.Module) -> Iterator[tuple[str, PartialModule]]:
    return ((path, module) for path, module in model.named_modules() if isinstance(module, PartialModule))


METHODS = (_RefuseResize, _FullNumParameters, _SaveFull)


def put_on(model: nn.Module) -> None:
    """Puts the methods on a shrunk model, and on the models within it that hold partial matrices."""
    for module in model.modules():
        if any(_partial(module)):
            for kind in METHODS:
                if hasattr(type(module), kind.name):
                    object.__setattr__(module, kind.name, kind(module))


def take_off(model: nn.Module) -> None:
    """The inverse of `put_on`."""
    for module in model.modules():
        for kind in METHODS:
            if isinstance(module.__dict__.get(kind.name), _Method):
                del module.__dict__[kind.name]
