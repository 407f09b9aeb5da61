"""PEFT's trainable tokens around a partial input table: their rows in the place of the table's, looked up by full ids.

PEFT copies the rows of its tokens over those of the whole matrix, and looks ids up in the copy. Here the table looks up what is
not theirs, and their own rows come between.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanvocab.errors import BypassError
from leanvocab.partial.attachments import Weakly, put_attributes, stood_before
from leanvocab.partial.embedding import RemapEmbedding

LAYER, WRAPPER = "TrainableTokensLayer", "TrainableTokensWrapper"


def check_tokens(path: str, wrapper: nn.Module, table: nn.Module, has_output: bool) -> None:
    """Raises `BypassError` where trainable tokens at `path` cannot be served from a partial matrix."""
    if has_output:
        raise BypassError(
            f"{path}: {type(wrapper).__name__} (PEFT's trainable tokens) writes its rows over those of a matrix that the output "
            "layer holds too, which would score wrong rows of a partial one. Leave the output layer whole (an untied model, or "
            'output="full"), or train the rows of the vocabulary without PEFT'
        )
    if getattr(table, "max_norm", None) is not None or getattr(table, "scale_grad_by_freq", False):
        raise BypassError(
            f"{path}: {type(wrapper).__name__} (PEFT's trainable tokens) around a table with max_norm or scale_grad_by_freq is "
            "not served from a partial matrix; train the rows of the vocabulary without PEFT"
        )


def refuse_tokens_put_on_since(wrapper: nn.Module | None) -> None:
    """Raises `BypassError` where trainable tokens were put on a table that was partial already."""
    if type(wrapper).__name__ in (LAYER, WRAPPER):
        raise BypassError(
            f"{type(wrapper).__name__} (PEFT's trainable tokens) was put on a table that is partial already, and took its first "
            "rows from it by ids of the full vocabulary. Put the adapter on first and shrink after it"
        )


def serve_tokens(layer: nn.Module) -> None:
    """Puts the lookup of this room before PEFT's, where `layer` is one of trainable tokens around a partial input table."""
    if type(layer).__name__ == LAYER and isinstance(layer.base_layer, RemapEmbedding):
        put_attributes(layer, {"forward_adapters": _Lookup(Weakly(layer))})


class _Lookup:
    def __init__(self, layer: Weakly[nn.Module]):
        self.layer = layer

    def __call__(self, x: Tensor, active_adapters: Any, *args: Any, **kwargs: Any) -> Any:
        layer, usual = stood_before(self.layer, "forward_adapters")
        table: Any = layer.base_layer
        if layer.disable_adapters or not active_adapters or layer.merged or not isinstance(table, RemapEmbedding):
            return usual(x, active_adapters, *args, **kwargs)
        layer._check_overlapping_tokens(active_adapters)  # type: ignore[operator]
        found = [_positions(x, list(layer.token_indices[name])) for name in active_adapters]  # type: ignore[index]
        others = x
        for _, is_there in found:  # their rows are not the table's, which need not even have them
            others = torch.where(is_there, int(table.table.token_ids[0]), others)
        result = table(others)
        scale = layer._get_embed_scale()  # type: ignore[operator]
        for name, (positions, is_there) in zip(active_adapters, found, strict=True):
            rows = layer.trainable_tokens_delta[name].to(table.weight.device, table.weight.dtype)  # type: ignore[index]
            token_ids = list(layer.token_indices[name])  # type: ignore[index]
            padding = token_ids.index(table.padding_idx) if table.padding_idx in token_ids else None
            own = F.embedding(positions, rows, padding)
            own = own if scale is None else own * scale.to(own.dtype)
            result = torch.where(is_there.unsqueeze(-1), own, result)
        return result


def _positions(ids: Tensor, token_ids: list[int]) -> tuple[Tensor, Tensor]:
    """The position of each id among `token_ids`, any where it is not there, and whether it is."""
    tokens = torch.tensor(token_ids, device=ids.device)
    in_order, order = tokens.sort()
    at = torch.searchsorted(in_order, ids.contiguous()).clamp(max=len(token_ids) - 1)
    return order[at], in_order[at] == ids
