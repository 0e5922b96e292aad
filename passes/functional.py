"""Functions that stand for what Python does in place or in pieces, so that a graph can hold it.

Comes in: tensors. Goes out: new tensors; nothing is written in place. They are what the passes write into graphs besides torch's own
functions; ``op_of`` wraps one as an ``Op``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.fx

from .ops import Op


def drop_unused(graph: torch.fx.Graph) -> None:
    """Remove what nothing reads. Calls of closed modules stay: their hooks and state are somebody's business."""
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output", "call_module"))


def index_write(base: torch.Tensor, index: Any, value: Any) -> torch.Tensor:
    """``base`` with ``base[index] = value`` done on a copy.

    >>> index_write(torch.zeros(2, 2), (slice(None), 0), torch.ones(2))
    tensor([[1., 0.],
            [1., 0.]])
    """
    copy = base.clone()
    copy[index] = value
    return copy


def sum_of(tensors: list[torch.Tensor]) -> torch.Tensor:
    """``tensors[0] + tensors[1] + ...``, from left to right.

    >>> sum_of([torch.ones(2), torch.ones(2)])
    tensor([2., 2.])
    """
    return functools.reduce(torch.add, tensors)


def slice_along(tensor: torch.Tensor, dim: int, start: int, stop: int, step: int) -> torch.Tensor:
    """``tensor[start:stop:step]`` in dimension ``dim``.

    >>> slice_along(torch.arange(6), 0, 1, 6, 2)
    tensor([1, 3, 5])
    """
    return tensor[(slice(None),) * dim + (slice(start, stop, step),)]


def as_slot(value: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """``value`` broadcast and cast as ``slot[...] = value`` would: the shape and dtype of ``slot``.

    >>> as_slot(torch.ones(1, 1, 3, dtype=torch.float64), torch.zeros(2, 3)).shape
    torch.Size([2, 3])
    """
    while value.dim() > slot.dim() and value.shape[0] == 1:
        value = value.squeeze(0)
    return value.to(slot.dtype).expand_as(slot)


def take_lane(outputs: tuple[torch.Tensor, ...], dim: int, lane: int) -> tuple[torch.Tensor, ...]:
    """One lane of each of several outputs.

    >>> take_lane((torch.arange(2), torch.eye(2)), 0, 1)
    (tensor(1), tensor([0., 1.]))
    """
    return tuple([output.select(dim, lane) for output in outputs])


_WRAPPED: dict[Callable[..., Any], Op] = {}


def op_of(function: Callable[..., Any], name: str = "", pointwise: bool = False) -> Op:
    """``function`` as an ``Op``, its arguments in their own order.

    Torch's builtins have no signature to look at: wrap them with ``passes.ops.canonical`` instead.
    """
    op = _WRAPPED.get(function)
    if op is None:
        parameters = list(inspect.signature(function).parameters.values())
        names = tuple(p.name for p in parameters)
        op = Op(name or function.__name__, "fxfuse", names, tuple(p.default for p in parameters), frozenset(), pointwise, function)
        _WRAPPED[function] = op
    return op
