"""Sums of one shared linear map: ``conv(a) + conv(b) + conv(c)`` is ``conv(a + b + c)`` with the bias counted three times.

Comes in: a functional graph with normalized joins. Goes out: the same graph with such sums rewritten: one convolution instead of n. The
source is distributivity, as derived in the forum thread "Convolutional layers with shared weights for each input channel".
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.fx

from fxfuse.functional import drop_unused
from fxfuse.ops import Op, canonical

from .joins import SUM_OF, Node, argument, is_op, is_plain_add

# op -> the arguments that are part of the map; everything but the input
LINEAR_MAPS = frozenset("linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split())


def factor_shared_maps(graph: torch.fx.Graph) -> list[tuple[str, int, Any]]:
    """Rewrite in place; returns ``(op, number of branches, place)`` of each rewrite."""
    done: list[tuple[str, int, Any]] = []
    for node in reversed(list(graph.nodes)):
        terms = _terms(node)
        times = Counter(terms)
        groups: dict[Any, list[Node]] = {}
        for term in terms:
            if isinstance(term.target, Op) and term.target.name in LINEAR_MAPS and len(term.users) == 1 and times[term] == 1:
                rest = tuple(a for name, a in zip(term.target.names, term.args, strict=True) if name != "input")
                key = (term.target, str(rest), argument(term, "input").meta["shape"], argument(term, "input").meta["dyn"])
                groups.setdefault(key, []).append(term)
        rewritten = [group for group in groups.values() if len(group) > 1]
        if not rewritten:
            continue
        kept = list(terms)
        for group in rewritten:
            with graph.inserting_before(node):
                merged = _merge(graph, group)
            kept = [merged if term is group[0] else term for term in kept if term is group[0] or term not in group]
            assert isinstance(group[0].target, Op)
            done.append((group[0].target.name, len(group), group[0].meta.get("place")))
        if len(kept) == 1:
            node.replace_all_uses_with(kept[0])
        else:
            with graph.inserting_before(node):
                new = graph.call_function(SUM_OF, (kept,))
            new.meta.update(node.meta)
            node.replace_all_uses_with(new)
    drop_unused(graph)
    return done


def _terms(node: Node) -> list[Node]:
    if is_op(node, "sum_of"):
        terms = argument(node, "tensors")
    elif is_plain_add(node):
        terms = [argument(node, "input"), argument(node, "other")]
    else:
        return []
    return list(terms) if all(isinstance(t, Node) for t in terms) else []


def _merge(graph: torch.fx.Graph, group: list[Node]) -> Node:
    first = group[0]
    assert isinstance(first.target, Op)
    inputs = [argument(term, "input") for term in group]
    total = graph.call_function(SUM_OF, (inputs,))
    total.meta.update(inputs[0].meta, place=first.meta.get("place"), path=first.meta.get("path"), stride=None)
    args: dict[str, Any] = dict(zip(first.target.names, first.args, strict=True))
    args["input"] = total
    if isinstance(args.get("bias"), Node):
        op, mul_args = canonical(torch.mul, (args["bias"], len(group)), {})
        bias = graph.call_function(op, mul_args)
        bias.meta.update(args["bias"].meta, place=first.meta.get("place"), path=first.meta.get("path"))
        args["bias"] = bias
    merged = graph.call_function(first.target, tuple(args[name] for name in first.target.names))
    merged.meta.update(first.meta)
    return merged
