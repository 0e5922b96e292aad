"""``clip_grad_norm_`` where some gradients are sharded and others are not.

Comes in: Parameters, plain ones and DTensors of any meshes. Goes out: their gradients clipped in place, and the norm of all together.
``torch.nn.utils.clip_grad_norm_`` takes either kind, and not both in one list.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fxfuse.errors import ArgumentError
from fxfuse.models.sharded import is_sharded


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` for models after ``shard_lanes`` (with or without ``fully_shard``), and for any other.

    Every process calls it with its Parameters, and gets the norm that one process with the whole model would get: a 0-dim tensor.
    Gradients are scaled in place by ``min(1, max_norm / (norm + 1e-6))``. ``norm_type``: the p of the norm, ``math.inf`` for the largest
    absolute value. Raises ``RuntimeError`` for a norm that is not finite if ``error_if_nonfinite``, ``ArgumentError`` for another
    ``norm_type``.

    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> layer.weight.grad = torch.tensor([[3.0, 4.0]])
    >>> clip_grad_norm_(layer.parameters(), 1.0), layer.weight.grad.norm() < 1.0001
    (tensor(5.), tensor(True))
    """
    power = float(norm_type)
    if not power > 0:
        raise ArgumentError(f"clip_grad_norm_: norm_type must be a positive number, {norm_type!r} came")
    given = [parameters] if isinstance(parameters, Tensor) else [*parameters]
    gradients = [parameter.grad for parameter in given if parameter.grad is not None]
    with torch.no_grad():
        total = _norm(gradients, power)
        if error_if_nonfinite and not bool(torch.isfinite(total)):
            raise RuntimeError(f"the total norm of order {norm_type} of the gradients is {float(total)}, so that they cannot be clipped")
        scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        for gradient in gradients:
            local = _local(gradient)
            local.mul_(scale.to(local.device, local.dtype if local.is_floating_point() else scale.dtype))
    return total


def _norm(gradients: list[Any], power: float) -> Tensor:
    """The norm over all entries, wherever they lie."""
    if not gradients:
        return torch.tensor(0.0)
    device = _local(gradients[0]).device
    parts: list[Tensor] = []
    # One sum, or maximum, for each way in which gradients lie; processes come to them in the same order.
    keyed = [(_placed(gradient), gradient) for gradient in gradients]
    for placed in dict.fromkeys(key for key, _ in keyed):
        local = [_norm_here(_local(gradient), power).to(device) for key, gradient in keyed if key == placed]
        part = torch.linalg.vector_norm(torch.stack([each.to(_widest(local)) for each in local]), power)
        for group in _groups(placed):
            part = part if math.isinf(power) else part**power
            dist.all_reduce(part, dist.ReduceOp.MAX if math.isinf(power) else dist.ReduceOp.SUM, group=group)
            part = part if math.isinf(power) else part ** (1 / power)
        parts.append(part)
    total: Tensor = torch.linalg.vector_norm(torch.stack([part.to(_widest(parts)) for part in parts]), power)
    return total


def _norm_here(share: Tensor, power: float) -> Tensor:
    """Of a share of a gradient; a process may have none of it, of which torch refuses the largest value."""
    if not share.numel():
        return torch.zeros((), dtype=share.abs().dtype, device=share.device)
    norm: Tensor = torch.linalg.vector_norm(share, power)
    return norm


def _local(gradient: Any) -> Tensor:
    local: Tensor = gradient.to_local() if is_sharded(gradient) else gradient
    return local


def _placed(gradient: Any) -> tuple[Any, Any] | None:
    """How a gradient lies over processes; None: whole, and the same on all of them."""
    if not is_sharded(gradient):
        return None
    if any(placement.is_partial() for placement in gradient.placements):
        raise ArgumentError("clip_grad_norm_: a gradient is a sum that has not been taken over the processes yet")
    return gradient.device_mesh, tuple(gradient.placements)


def _groups(placed: tuple[Any, Any] | None) -> list[Any]:
    """The groups of processes over which entries are spread."""
    if placed is None:
        return []
    mesh, placements = placed
    return [mesh.get_group(dim) for dim, placement in enumerate(placements) if not placement.is_replicate()]


def _widest(tensors: list[Tensor]) -> torch.dtype:
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
