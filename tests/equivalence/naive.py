"""The specification, in a few lines: rows leave the table, and ids are remapped on their way into the lookup."""

import torch
from torch import nn


def shrink_naively(table: nn.Embedding, token_ids: torch.Tensor) -> None:
    """Keeps the rows `token_ids` (int64 [kept]) of `table` in place; its own forward then sees partial ids."""
    remap = torch.full((table.num_embeddings,), -1)
    remap[token_ids] = torch.arange(len(token_ids))
    table.weight = nn.Parameter(table.weight.detach()[token_ids])
    if table.padding_idx is not None:
        table.padding_idx = int(remap[table.padding_idx])
    table.register_forward_pre_hook(lambda module, args: (remap[args[0]], *args[1:]))


def merge_naively(full: nn.Embedding, partial: nn.Embedding, token_ids: torch.Tensor) -> torch.Tensor:
    """The full rows of `full` with those of `partial` written over them: E[f⁻¹(i)] = E'[i]."""
    rows = full.weight.detach().clone()
    rows[token_ids] = partial.weight.detach()
    return rows
