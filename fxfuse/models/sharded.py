"""Packs that are sharded over processes (FSDP2's DTensors): whole for as long as a checkpoint is written, and cut again when one is read.

Comes in: tensors, sharded or not. Goes out: whole ones (every process takes part), and shares of whole ones. A view of a lane cuts through
shards; nothing is computed on such views.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_sharded(tensor: Any) -> bool:
    """Is this a DTensor? (Asked by name: torch.distributed is not imported for it.)"""
    return any(base.__name__ == "DTensor" and base.__module__.startswith("torch.distributed") for base in type(tensor).__mro__)


def gathered(tensor: Tensor) -> Tensor:
    """The tensor that the processes hold together: a collective call where it is sharded, else the tensor itself.

    >>> import torch
    >>> gathered(torch.ones(2))
    tensor([1., 1.])
    """
    found: Tensor = tensor.detach().full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return found


def own_share(tensor: Tensor) -> Tensor:
    """What this process holds of a sharded tensor: the same memory; any other tensor as it is."""
    share: Tensor = tensor.detach().to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return share


def shared_as(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, equal in all processes, laid out over them as ``like`` is; no data is sent."""
    if is_sharded(tensor) or not is_sharded(like):
        return tensor if is_sharded(like) else gathered(tensor)
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = like
    return distribute_tensor(tensor.detach().to(sharded.device), sharded.device_mesh, sharded.placements, src_data_rank=None)
