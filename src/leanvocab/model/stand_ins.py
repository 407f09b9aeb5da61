"""Methods that have to know of the partial vocabulary, of transformers' models and of adapters, while a model is shrunk.

They stand on the instance, before those of its class (docs/decisions/instance-attributes.md).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from leanvocab.errors import BypassError, ModelError
from leanvocab.partial.attachments import Weakly, method_before, put_attributes
from leanvocab.partial.module import PartialModule, partial_modules


def stood_before(held: Weakly[nn.Module], name: str) -> tuple[nn.Module, Callable[..., Any]]:
    """The module that a stand-in stands on, and the method that it stands before."""
    module = held()
    if module is None:
        raise ModelError(f"{name} was called of a shrunk model that nobody holds: keep the model in a variable")
    return module, method_before(module, name)


def _refuse_resize(held: Weakly[nn.Module], *args: Any, method: str, **kwargs: Any) -> Any:
    """Resizing would lay rows out from the partial matrix."""
    module, usual = stood_before(held, method)
    for holder in partial_modules(module).values():
        raise BypassError(
            f"{method}: {holder.table.name} is shrunk to a partial vocabulary, and would be resized from its "
            "partial rows; call merge_(model), resize, build a vocabulary of the new size and shrink again"
        )
    return usual(*args, **kwargs)


def _refuse_new_weights(held: Weakly[nn.Module], layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """New random weights would be those of the kept rows alone, with zeros for the row that has the partial id of padding."""
    _, usual = stood_before(held, "_init_weights")
    if isinstance(layer, PartialModule):
        layer.reset_parameters()
    return usual(layer, *args, **kwargs)


def _tie(held: Weakly[nn.Module], *args: Any, **kwargs: Any) -> Any:
    """Tying fits biases to the rows that a matrix has, and may tie what is not of this vocabulary to a partial matrix."""
    module, usual = stood_before(held, "tie_weights")
    shrunk, before = partial_modules(module), [(each, dict(each._parameters)) for each in module.modules()]
    vectors = [(each, each.data) for each in module.parameters() if each.ndim == 1]
    result = usual(*args, **kwargs)
    for vector, values in vectors:
        if len(vector) != len(values):
            vector.data = values
    weights = {id(parameters["weight"]) for each, parameters in before if isinstance(each, PartialModule)}
    for each, parameters in before:
        was, now = parameters.get("weight"), each._parameters.get("weight")
        if was is not now and (isinstance(each, PartialModule) or id(now) in weights):
            _undo(before)
            raise BypassError(
                f"tie_weights: {type(each).__name__} would be tied to another matrix than before, while {', '.join(shrunk)} "
                "are shrunk to a partial vocabulary; call merge_(model), tie, and shrink again"
            )
    return result


def _undo(before: list[tuple[nn.Module, dict[str, Any]]]) -> None:
    for module, parameters in before:
        module._parameters.clear()
        module._parameters.update(parameters)


def _full_num_parameters(
    held: Weakly[nn.Module], only_trainable: bool = False, exclude_embeddings: bool = False
) -> int:
    """The number of the full model's parameters, which transformers writes into a shard index."""
    module, usual = stood_before(held, "num_parameters")
    count: int = usual(only_trainable, exclude_embeddings)
    holders = {id(holder.weight): holder for holder in partial_modules(module).values()}
    for name, parameter in module.named_parameters():
        holder = holders.get(id(parameter))
        is_left_out = exclude_embeddings and isinstance(module.get_submodule(name.rpartition(".")[0]), nn.Embedding)
        if holder is not None and not is_left_out and (parameter.requires_grad or not only_trainable):
            count += (holder.table.full_size - holder.table.num_rows) * parameter.shape[1]
    return count


def _save_full(held: Weakly[nn.Module], *args: Any, **kwargs: Any) -> Any:
    """Completes a state dict that was gathered around our hooks, as DeepSpeed's ZeRO-3 does, and handed over to be saved."""
    module, usual = stood_before(held, "save_pretrained")
    if kwargs.get("state_dict") is not None:
        kwargs["state_dict"] = state_dict = dict(kwargs["state_dict"])
        for path, holder in partial_modules(module).items():
            table, rows = holder.table, state_dict.get(f"{path}.weight")
            if isinstance(rows, Tensor) and rows.shape[0] == table.num_rows < table.full_size:
                state_dict[f"{path}.weight"] = table.view_for(state_dict, rows)
    return usual(*args, **kwargs)


def _refuse_merge(held: Weakly[nn.Module], *args: Any, **kwargs: Any) -> Any:
    """Keeps an adapter from merging itself into a partial matrix: its update has full rows."""
    module, usual = stood_before(held, "merge")
    layer = module.base_layer
    if not isinstance(layer, PartialModule):
        return usual(*args, **kwargs)
    raise BypassError(
        f"{layer.table.name}: an adapter on a partial vocabulary matrix cannot be merged into it, since its update has all "
        "rows; call leanvocab.merge_(model) first, then merge the adapter"
    )


_STAND_INS: Mapping[str, Callable[..., Any]] = {
    "resize_token_embeddings": partial(_refuse_resize, method="resize_token_embeddings"),
    "resize_decoder_token_embeddings": partial(_refuse_resize, method="resize_decoder_token_embeddings"),
    "tie_weights": _tie,
    "_init_weights": _refuse_new_weights,
    "num_parameters": _full_num_parameters,
    "save_pretrained": _save_full,
}


def put_on(model: nn.Module) -> None:
    """Puts stand-ins on a shrunk model, and on the models and adapters within it that hold partial matrices."""
    for module in model.modules():
        refuse_merging(module)
        names = [name for name in _STAND_INS if hasattr(type(module), name)]
        if names and partial_modules(module):
            put_attributes(module, {name: partial(_STAND_INS[name], Weakly(module)) for name in names})


def refuse_merging(wrapper: nn.Module | None) -> None:
    """Makes an adapter on a partial matrix refuse to merge itself into it."""
    if isinstance(getattr(wrapper, "base_layer", None), PartialModule) and hasattr(wrapper, "merge"):
        assert wrapper is not None
        if getattr(wrapper.__dict__.get("merge"), "func", None) is not _refuse_merge:
            put_attributes(wrapper, {"merge": partial(_refuse_merge, Weakly(wrapper))})
