"""One vocabulary matrix in full with the modules that hold it, and the parameters in which it is held: in full, in part."""

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from leanvocab.choices import OutputMode
from leanvocab.files.row_store import put_rows, take_rows, zero_pages
from leanvocab.partial.gradient_hooks import give_hooks_back, serve_hooks
from leanvocab.partial.module import PartialModule
from leanvocab.partial.partial_table import PartialTable
from leanvocab.vocabulary.partial_vocabulary import PartialVocabulary

Lookup: TypeAlias = nn.Embedding | nn.EmbeddingBag  # modules that look rows up by ids
LOOKUPS = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class FullTable:
    """One vocabulary matrix to shrink and every module that holds it: input tables, output layers, or both where tied."""

    paths: tuple[str, ...]
    modules: tuple[Lookup | nn.Linear, ...]
    vocabulary: PartialVocabulary
    output: OutputMode | None = None  # what becomes of the scores, where an output layer holds it

    @property
    def name(self) -> str:
        return self.paths[0]

    @property
    def weight(self) -> nn.Parameter:
        return weight_of(self.modules[0])


def weight_of(module: nn.Module) -> nn.Parameter:
    """The weight as the parameter that it is; torch annotates it as a tensor."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def num_ids_of(module: nn.Module) -> int:
    """The number of ids that an embedding takes or a linear layer scores."""
    return int(module.num_embeddings if isinstance(module, LOOKUPS) else module.out_features)  # type: ignore[arg-type]


def ask(owner: Any, method: str) -> Any:
    """A model's answer to a method without arguments; None where it has no such method, or no answer."""
    try:
        return getattr(owner, method)()
    except (AttributeError, NotImplementedError, TypeError):
        return None


def has_forward_of_its_own(module: nn.Module) -> bool:
    """True where a forward was put on the instance, before the one of its class; accelerate's hooks aside, which call that."""
    forward = module.__dict__.get("forward")
    own = getattr(forward, "__func__", None)
    return forward is not None and not hasattr(module, "_hf_hook") and own is not type(module).forward


def partial_weight(full: nn.Parameter, table: PartialTable) -> nn.Parameter:
    """The kept rows of a full matrix, with their gradients."""
    partial = nn.Parameter(take_rows(full.detach(), table.token_ids), requires_grad=full.requires_grad)
    if full.grad is not None:
        dense = full.grad.to_dense() if full.grad.is_sparse else full.grad
        partial.grad = take_rows(dense, table.token_ids)
    partial.__dict__.update(full.__dict__)  # attributes that libraries put on parameters
    serve_hooks(partial, table, full)
    partial.__dict__["ds_shape"] = full.shape  # by this name peft asks for the whole shape of what is held in part
    return partial


def full_rows_of(module: PartialModule) -> tuple[Tensor, Tensor | None]:
    """All rows of a partial matrix, and the gradients of those that were kept if there are any: on the CPU, in memory that
    unused rows do not take."""
    partial, table = weight_of(module), module.table
    gradient = None
    if partial.grad is not None:
        gradient = zero_pages((table.full_size, partial.shape[1]), partial.dtype)
        put_rows(gradient, table.token_ids, partial.grad.to_dense() if partial.grad.is_sparse else partial.grad)
    return table.full_rows(partial), gradient


def full_weight(partial: nn.Parameter, rows: Tensor, gradient: Tensor | None, device: torch.device) -> nn.Parameter:
    """The parameter in the place of a partial one, on a device, of what `full_rows_of` gave."""
    full = nn.Parameter(rows.to(device), requires_grad=partial.requires_grad)
    if gradient is not None:
        full.grad = gradient.to(device)
    full.__dict__.update(partial.__dict__)  # attributes that libraries put on parameters
    give_hooks_back(partial, full)
    full.__dict__.pop("ds_shape", None)
    return full
