"""A recorded program that follows a model to float64: for the comparison there.

Comes in: the graph of a program, in which ``torch.zeros(n, dtype=x.dtype)`` names the dtype of the recording. Goes out: a copy that makes
float64 where the making is exact either way: zeros, ones, infinities and other fills that no dtype rounds, casts of masks and
integers, and what autocast casts, which leaves float64 alone. A call whose dtype forward itself spells out gives the same values then.
Of a cast between floating dtypes one cannot see whether forward spelled out its dtype (``x.to(torch.float32)``) or followed another tensor
(``x.to(h.dtype)``): it stays, or follows with all that cast to the same dtype, as is asked for.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.fx

# What autocast casts stays as it is in float64, where autocast does nothing.
_EXACT = frozenset("autocast_to zeros ones zeros_like ones_like new_zeros new_ones eye empty empty_like new_empty".split())
_FILLED = frozenset("full full_like new_full".split())


def widened(graph: torch.fx.Graph, casts: torch.dtype | None = None) -> torch.fx.Graph:
    """A copy of ``graph`` whose factories make float64; with ``casts``, casts to that dtype do so too.

    >>> graph = torch.fx.Graph()
    >>> _ = graph.output(graph.call_function(torch.zeros, (2,), {"dtype": torch.float32}))
    >>> next(iter(widened(graph).nodes)).kwargs["dtype"]
    torch.float64
    """
    made = copy.deepcopy(graph)
    widen(made, casts)
    return made


def widen(graph: torch.fx.Graph, casts: torch.dtype | None = None) -> None:
    """``widened``, in place."""
    for node in graph.nodes:
        if node.op in ("call_function", "call_method") and (_exact(node) or _casts(node, casts)):
            node.args, node.kwargs = _double(tuple(node.args)), _double(dict(node.kwargs))


def _casts(node: torch.fx.Node, dtype: torch.dtype | None) -> bool:
    return dtype is not None and _name(node) == "to" and dtype in (*node.args, *node.kwargs.values())


def _name(node: torch.fx.Node) -> str:
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", ""))


def _exact(node: torch.fx.Node) -> bool:
    name = _name(node)
    if name in _EXACT:
        return True
    if name in _FILLED:
        value = node.kwargs.get("fill_value", node.args[-1])
        return isinstance(value, (int, float)) and (value != value or float(torch.tensor(value, dtype=torch.float16)) == value)
    if name == "to":
        source: Any = node.args[0]
        seen = source.meta.get("val") if isinstance(source, torch.fx.Node) else None
        return isinstance(seen, torch.Tensor) and not seen.dtype.is_floating_point and not seen.dtype.is_complex
    return False


def _double(arguments: Any) -> Any:
    return torch.fx.node.map_aggregate(
        arguments, lambda a: torch.float64 if isinstance(a, torch.dtype) and a.is_floating_point else a
    )
