"""Graphs as a compiler takes them best.

Comes in: a graph. Goes out: the same graph, in place, and whether it was changed. Op by op, ``baddbmm`` takes the time of ``bmm`` with an
addition. Inductor calls the products and writes what is elementwise: for ``baddbmm`` the bias is first copied to the size of the result,
while an addition becomes part of the kernel that follows. Three layers of 128 lanes with 32 units and 64 rows took 280 us with ``baddbmm``
and 180 us without, in training 956 and 862 (two cores); ``addmm`` shows no difference, from 8 to 512 rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.fx

from fxfuse.functional import WHOLE, product_and_bias


def biases_apart(graph: torch.fx.Graph) -> bool:
    """For a graph of any dtype: ``baddbmm`` as a function that looks at the dtype when it is traced.

    >>> graph = torch.fx.Graph()
    >>> bias, x, w = (graph.placeholder(name) for name in ("bias", "x", "w"))
    >>> _ = graph.output(graph.call_function(torch.baddbmm, (bias, x, w)))
    >>> biases_apart(graph), biases_apart(graph)
    (True, False)
    """
    found = [*_plain(graph)]
    for node in found:
        node.target = product_and_bias
    return bool(found)


def biases_apart_here(graph: torch.fx.Graph) -> bool:
    """For a graph that knows its dtypes (``meta["val"]``): as calls of torch alone, which AOTAutograd's cache asks for."""
    changed = False
    for node in [*_plain(graph)]:
        made = node.meta.get("val")
        if not isinstance(made, torch.Tensor) or made.dtype not in WHOLE:
            continue
        bias, left, right = node.args
        with graph.inserting_before(node):
            product = graph.call_function(torch.bmm, (left, right))
        product.meta = dict(node.meta)
        node.target, node.args = torch.add, (product, bias)
        changed = True
    return changed


def _plain(graph: torch.fx.Graph) -> Iterator[torch.fx.Node]:
    """Every ``baddbmm`` that adds its first argument as it is."""
    yield from (node for node in graph.find_nodes(op="call_function", target=torch.baddbmm) if len(node.args) == 3 and not node.kwargs)
