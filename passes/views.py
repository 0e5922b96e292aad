"""Chains of views in the fewest calls.

Comes in: an emitted graph with meta tensors. Goes out: the same graph, in place, where a chain of transpose, permute, unsqueeze, squeeze
and the like is what it amounts to: at most one squeeze, one reordering and the unsqueezes. A view launches nothing, but each costs 2 to 5
us of Python, dispatch and autograd per call, which is what is left to save in a region of ten launches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx

Node = torch.fx.Node
# A view as the dims of its source in the order of the result; None is a new dim of size 1. Dims of size 1 that went are missing.
Dims = list[int | None]


def shorten_views(graph: torch.fx.Graph) -> None:
    """Rewrite every chain of dim views that fewer calls can make, in place."""
    for node in list(graph.nodes):
        if any(_dims(user) is not None for user in node.users) or _dims(node) is None:
            continue  # not the end of a chain
        root, calls = node, 0
        dims: Dims = list(range(_rank(node)))
        while (step := _dims(root)) is not None and (root is node or len(root.users) == 1):
            dims = [None if d is None else step[d] for d in dims]
            root, calls = root.all_input_nodes[0], calls + 1
        plan = _calls(dims, _rank(root))
        if len(plan) < calls:
            _replace(graph, node, root, plan)


def _replace(graph: torch.fx.Graph, node: Node, root: Node, plan: list[tuple[Callable[..., Any], tuple[Any, ...]]]) -> None:
    made = root
    with graph.inserting_before(node):
        for function, args in plan:
            value = function(made.meta["val"], *args)
            made = graph.call_function(function, (made, *args))
            made.meta.update({**node.meta, "val": value})
    node.replace_all_uses_with(made)


def _rank(node: Node) -> int:
    return len(node.meta["val"].shape)


def _calls(dims: Dims, rank: int) -> list[tuple[Callable[..., Any], tuple[Any, ...]]]:
    """The calls that make a view of these dims of a tensor of ``rank``."""
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
    kept = [d for d in dims if d is not None]
    gone = tuple(d for d in range(rank) if d not in kept)
    if gone:
        calls.append((torch.squeeze, (gone if len(gone) > 1 else gone[0],)))
    order = [sorted(kept).index(d) for d in kept]
    moved = [i for i, d in enumerate(order) if i != d]
    if len(moved) == 2:
        calls.append((torch.transpose, tuple(moved)))
    elif moved:
        calls.append((torch.permute, (tuple(order),)))
    calls.extend((torch.unsqueeze, (i,)) for i, d in enumerate(dims) if d is None)
    return calls


def _dims(node: Node) -> Dims | None:
    """The node as a view of dims, None where it is anything else."""
    if node.op != "call_function" or node.kwargs or not node.args or not isinstance(node.args[0], Node):
        return None
    source, value = node.args[0].meta.get("val"), node.meta.get("val")
    reader = _READERS.get(node.target)
    if reader is None or not isinstance(source, torch.Tensor) or not isinstance(value, torch.Tensor):
        return None
    return reader(source, *node.args[1:])


def _transpose(source: torch.Tensor, one: int, other: int) -> Dims:
    dims: Dims = list(range(source.dim()))
    dims[one], dims[other] = dims[other], dims[one]
    return dims


def _permute(source: torch.Tensor, order: Any) -> Dims:
    return [d % source.dim() for d in order]


def _movedim(source: torch.Tensor, start: Any, end: Any) -> Dims | None:
    if not isinstance(start, int) or not isinstance(end, int):
        return None
    dims: Dims = list(range(source.dim()))
    dims.insert(end % source.dim(), dims.pop(start % source.dim()))
    return dims


def _unsqueeze(source: torch.Tensor, dim: int) -> Dims:
    dims: Dims = list(range(source.dim()))
    dims.insert(dim % (source.dim() + 1), None)
    return dims


def _squeeze(source: torch.Tensor, dim: Any = None) -> Dims | None:
    if dim is None:
        return None  # which dims go is decided by the sizes of the call
    gone = [d % source.dim() for d in (dim if isinstance(dim, (tuple, list)) else (dim,))]
    return None if any(source.shape[d] != 1 for d in gone) else [d for d in range(source.dim()) if d not in gone]


def _unflatten(source: torch.Tensor, dim: int, sizes: Any) -> Dims | None:
    """Only where it splits off dims of size 1."""
    if not isinstance(sizes, (tuple, list)) or not all(isinstance(size, int) for size in sizes):
        return None
    wide = [i for i, size in enumerate(sizes) if size != 1]
    if len(wide) != 1:
        return None
    dim %= source.dim()
    inner: Dims = [None] * len(sizes)
    inner[wide[0]] = dim
    return [*range(dim), *inner, *range(dim + 1, source.dim())]


_READERS: dict[Any, Callable[..., Dims | None]] = {
    torch.transpose: _transpose,
    torch.permute: _permute,
    torch.movedim: _movedim,
    torch.unsqueeze: _unsqueeze,
    torch.squeeze: _squeeze,
    torch.unflatten: _unflatten,
}
