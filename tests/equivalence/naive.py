"""The specification, in a few lines: rows leave the table, and ids are remapped on their way into the lookup."""

import torch
from torch import Tensor, nn


def shrink_naively(model: nn.Module, table: nn.Embedding, token_ids: Tensor) -> nn.Parameter:
    """Keeps the rows `token_ids` (int64 [kept]) of `table` and of whatever is tied to it; returns them."""
    full, rows = table.weight, nn.Parameter(table.weight.detach()[token_ids])
    remap = torch.full((len(full),), -1)
    remap[token_ids] = torch.arange(len(token_ids))
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight is full:
            module.weight = rows
            if module.padding_idx is not None:
                module.padding_idx = int(remap[module.padding_idx]) if remap[module.padding_idx] >= 0 else None
            module.register_forward_pre_hook(lambda _, args: (remap[args[0]], *args[1:]))
    return rows


def merge_naively(full: Tensor, partial: Tensor, token_ids: Tensor) -> Tensor:
    """The full rows with the partial ones written over them: E[f⁻¹(i)] = E'[i]."""
    merged = full.detach().clone()
    merged[token_ids] = partial.detach()
    return merged
