"""Linear and pointwise convolution are the same map: one spelling where a region has both.

Comes in: a functional graph. Goes out: the same graph, in which a convolution with kernel size 1 whose ``[M, C]`` also occurs as a
Linear is written as a Linear over the channels, between two permutations; permutations then move through elementwise ops and cancel. So
lanes written with ``Linear`` and lanes written with ``Conv1d(k=1)`` become one bundle. Source: the thread "Conv1d with kernel_size=1 vs
Linear".
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
import torch.nn.functional as F

from fxfuse.functional import drop_unused
from fxfuse.ops import Op, canonical

from .joins import Node, argument, is_op

LINEAR = canonical(F.linear, (torch.empty(0), torch.empty(0), None), {})[0]
PERMUTE = canonical(torch.permute, (torch.empty(0), (0,)), {})[0]


def is_pointwise_conv(node: Any) -> bool:
    """Kernel size 1, stride 1, no padding, one group, batched: a Linear over the channels."""
    if not any(is_op(node, name) for name in ("conv1d", "conv2d", "conv3d")):
        return False
    weight, x = argument(node, "weight"), argument(node, "input")
    return (
        all(k == 1 for k in weight.meta["shape"][2:])
        and len(x.meta["shape"]) == len(weight.meta["shape"])
        and argument(node, "groups") == 1
        and _all(argument(node, "stride"), 1)
        and (argument(node, "padding") in ("same", "valid") or _all(argument(node, "padding"), 0))
    )


def _all(value: Any, number: int) -> bool:
    return all(v == number for v in value) if isinstance(value, (tuple, list)) else value == number


def unify_pointwise(graph: torch.fx.Graph) -> int:
    """Rewrite in place; returns the number of convolutions rewritten."""
    linears = {_map_shape(node) for node in graph.nodes if is_op(node, "linear") and len(argument(node, "weight").meta["shape"]) == 2}
    convs = [node for node in graph.nodes if is_pointwise_conv(node)] if linears else []
    convs = [node for node in convs if _map_shape(node) in linears and argument(node, "weight").op == "get_attr"]
    for node in convs:
        _rewrite(graph, node)
    if convs:
        _move_permutations(graph)
        drop_unused(graph)
    return len(convs)


def _map_shape(node: Node) -> tuple[tuple[int, ...], bool]:
    return tuple(argument(node, "weight").meta["shape"][:2]), isinstance(argument(node, "bias"), Node)


def _rewrite(graph: torch.fx.Graph, node: Node) -> None:
    x, weight, bias = (argument(node, name) for name in ("input", "weight", "bias"))
    rank = len(x.meta["shape"])
    last = (0, *range(2, rank), 1)
    back = (0, rank - 1, *range(1, rank - 1))
    with graph.inserting_before(node):
        matrix = graph.get_attr(weight.target)
        matrix.meta.update(weight.meta, shape=tuple(weight.meta["shape"][:2]), own_shape=tuple(weight.meta["shape"]), stride=None)
        rows = _permuted(graph, x, last)
        out = graph.call_function(LINEAR, (rows, matrix, bias))
        _describe(out, node, last)
        result = _permuted(graph, out, back)
    result.meta.update({k: v for k, v in node.meta.items() if k == "out_stride"})
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _describe(made: Node, like: Node, dims: tuple[int, ...]) -> None:
    """``made`` has the shape of ``like``, permuted."""
    made.meta.update(like.meta, shape=tuple(like.meta["shape"][d] for d in dims), stride=None)
    made.meta["dyn"] = frozenset(i for i, d in enumerate(dims) if d in like.meta["dyn"])
    made.meta.pop("out_stride", None)


def _permuted(graph: torch.fx.Graph, node: Node, dims: tuple[int, ...]) -> Node:
    """``node.permute(dims)``, composed with the permutation that ``node`` itself may be; ``node`` where nothing moves."""
    source, dims = _through(node, dims)
    if dims == tuple(range(len(dims))):
        return source
    made = graph.call_function(PERMUTE, (source, dims))
    _describe(made, source, dims)
    return made


def _through(node: Node, dims: tuple[int, ...]) -> tuple[Node, tuple[int, ...]]:
    own = permutation(node)
    while own is not None:
        dims = tuple(own[d] for d in dims)
        node = node.all_input_nodes[0]
        own = permutation(node)
    return node, dims


def permutation(node: Node) -> tuple[int, ...] | None:
    """The dims of a node that only permutes its input, however it is spelled; None for any other."""
    if node.op != "call_function" or not isinstance(node.target, Op) or node.meta.get("shape") is None:
        return None
    rank = len(node.meta["shape"])
    dims = list(range(rank))
    if node.target.name == "permute":
        return tuple(argument(node, "dims"))
    if node.target.name in ("transpose", "t", "mT"):
        if rank < 2:
            return None
        first, second = (argument(node, "dim0"), argument(node, "dim1")) if node.target.name == "transpose" else (rank - 2, rank - 1)
        dims[first], dims[second] = dims[second], dims[first]
        return tuple(dims)
    if node.target.name == "movedim":
        return _movedim(rank, argument(node, "source"), argument(node, "destination"))
    return None


def _movedim(rank: int, source: Any, destination: Any) -> tuple[int, ...]:
    # sizes that name their dim show where each one goes
    moved = torch.empty(tuple(range(1, rank + 1)), device="meta").movedim(source, destination)
    return tuple(size - 1 for size in moved.shape)


def _move_permutations(graph: torch.fx.Graph) -> None:
    """Permutations go through elementwise ops of one tensor, towards the outputs, and cancel there."""
    for node in list(graph.nodes):
        own = permutation(node)
        if own is not None:
            with graph.inserting_before(node):
                composed = _permuted(graph, node.all_input_nodes[0], own)
            if composed is not node.all_input_nodes[0] and composed.all_input_nodes[0] is node.all_input_nodes[0]:
                continue
            _keep_stride(composed, node)
            node.replace_all_uses_with(composed)
        elif isinstance(node.target, Op) and node.target.pointwise and len(node.all_input_nodes) == 1:
            (operand,) = node.all_input_nodes
            dims = permutation(operand)
            if dims is None:
                continue
            inverse = tuple(dims.index(d) for d in range(len(dims)))
            with graph.inserting_before(node):
                inner = graph.node_copy(node, lambda n: n.all_input_nodes[0])
                _describe(inner, node, inverse)
                moved = graph.call_function(PERMUTE, (inner, dims))
                _describe(moved, inner, dims)
            _keep_stride(moved, node)
            node.replace_all_uses_with(moved)


def _keep_stride(made: Node, old: Node) -> None:
    if "out_stride" in old.meta:
        made.meta["out_stride"] = old.meta["out_stride"]
