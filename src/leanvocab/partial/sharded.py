"""Matrices whose rows are spread over processes (torch's DTensor, which FSDP2 makes of parameters): whole, and in shares."""

from typing import Any

import torch
from torch import Tensor, nn

from leanvocab.errors import CheckpointError


def is_sharded(tensor: Tensor) -> bool:
    """True where this process holds a share of the rows alone."""
    return hasattr(tensor, "full_tensor")


def is_sharding(module: nn.Module | None) -> bool:
    """True for a module that FSDP2 brings the rows of all processes to for its forward."""
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


def first_sharded(model: nn.Module) -> str | None:
    """The name of the first parameter of a model that is sharded; None where none is."""
    return next((name for name, parameter in model.named_parameters() if is_sharded(parameter)), None)


def whole(tensor: Tensor) -> Tensor:
    """All rows, on every process, each of which has to call this; a tensor that is not sharded as it is."""
    if not is_sharded(tensor):
        return tensor
    if tensor.is_meta:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    gathered: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return gathered


def share_of(full: Tensor, like: Tensor) -> Tensor:
    """This process's share of `full`, spread as `like` is; `full` itself where that is not sharded.

    Nothing is sent: every process has all of `full`, and moves its share alone to its device. Raises `CheckpointError` where
    rows are spread in another way than FSDP2 and tensor parallelism do.
    """
    if not is_sharded(like):
        return full
    from torch.distributed.tensor import DTensor, Replicate, Shard

    sharded: Any = like
    mesh, share = sharded.device_mesh, full
    for axis, placement in enumerate(sharded.placements):
        if type(placement) is Shard:
            shares = share.chunk(mesh.size(axis), placement.dim)
            rank = mesh.get_local_rank(axis)
            share = shares[rank] if rank < len(shares) else share.narrow(placement.dim, 0, 0)
        elif not isinstance(placement, Replicate):
            raise CheckpointError(
                f"a vocabulary matrix is spread over processes as {placement}, expected Shard or Replicate (FSDP2 with one "
                "dimension, or replicated); take the state dict within partial_state_dicts(model)"
            )
    if not sharded.is_meta:  # or else to be put in place of what has no memory yet, on the mesh's device
        share = share.to(sharded.to_local().device)
    return DTensor.from_local(share, mesh, sharded.placements, run_check=False, shape=full.shape, stride=full.stride())
