"""``scaled_dot_product_attention``: the lanes are more entries of its batch.

``nn.MultiheadAttention`` needs no rule: recording opens it (``recording/step_by_step.py``) into its products, softmax and views.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..bundle import Bundle, Node
from ..emit import Emitter
from ..writer import CannotVectorize, Packed
from .base import rank, rule


@rule("scaled_dot_product_attention", heavy=True)
def _attention(emitter: Emitter, bundle: Bundle) -> tuple[Packed, str]:
    names = ("query", "key", "value", "attn_mask")
    nodes = {name: found[0] for name in names if (found := emitter.nodes(bundle, name)) is not None}
    values: dict[str, Packed] = {name: emitter.operand(bundle, name) for name in nodes}
    dropout = float(emitter.operand(bundle, "dropout_p"))
    rest = (dropout, bool(emitter.operand(bundle, "is_causal")))
    keywords = {name: given for name in ("scale", "enable_gqa") if (given := emitter.operand(bundle, name))}
    if any(isinstance(given, Packed) for given in keywords.values()):
        raise CannotVectorize("the scale of an attention is a tensor")
    if all(value.dim is None for value in values.values()) and not dropout:
        plain = [value.node for value in values.values()]
        out = emitter.call(F.scaled_dot_product_attention, *plain[:3], plain[3] if len(plain) > 3 else None, *rest, **keywords)
        return Packed(out, None), "one attention"
    lanes = len(bundle.members)
    wide = max(rank(node) for node in nodes.values())
    fold = wide >= 4 and _same_batch([nodes[name] for name in names[:3]], bool(keywords.get("enable_gqa")))
    query = _front(emitter, values["query"], nodes["query"], wide, lanes)
    sizes = [_size(emitter, query, dim, nodes["query"]) for dim in range(1, wide - 2)] if fold else []
    operands: list[Any] = []
    for name in names[:3]:
        front = query if name == "query" else _front(emitter, values[name], nodes[name], wide, lanes)
        operands.append(emitter.call(torch.flatten, front, 0, wide - 3) if fold else front)
    mask = None
    if "attn_mask" in nodes:
        mask = values["attn_mask"].node
        if values["attn_mask"].dim is not None or rank(nodes["attn_mask"]) > 2:
            mask = _front(emitter, values["attn_mask"], nodes["attn_mask"], wide, lanes)
            mask = _over_batch(emitter, mask, sizes) if fold else mask
    out = emitter.call(F.scaled_dot_product_attention, *operands, mask, *rest, **keywords)
    if fold:
        out = emitter.call(torch.unflatten, out, 0, (lanes, *sizes))
    return Packed(out, 0), "lanes in the batch"


def _same_batch(nodes: list[Node], grouped: bool) -> bool:
    """Do query, key and value have one batch, so that it can be made one dim with the lanes? Heads may differ where they are grouped."""
    first = nodes[0]
    until = rank(first) - (3 if grouped else 2)
    return all(rank(node) == rank(first) and _facts(node, until) == _facts(first, until) for node in nodes)


def _facts(node: Node, until: int) -> tuple[Any, ...]:
    return tuple(node.meta["shape"][:until]), frozenset(dim for dim in node.meta["dyn"] if dim < until)


def _front(emitter: Emitter, value: Packed, node: Node, wide: int, lanes: int) -> Node:
    """``[G, ...]`` with ones after the lane axis, up to ``wide`` dims of the lane's own."""
    front = emitter.front(value, lanes)
    for _ in range(wide - rank(node)):
        front = emitter.call(torch.unsqueeze, front, 1)
    return front


def _size(emitter: Emitter, node: Node, dim: int, own: Node) -> Any:
    """A size of ``[G, ...]``: a number where it is fixed, read at run time where it is free."""
    return emitter.call("size", node, dim) if dim - 1 in own.meta["dyn"] else int(node.meta["val"].shape[dim])


def _over_batch(emitter: Emitter, mask: Node, sizes: list[Any]) -> Node:
    """A mask ``[G, n, ..., h, L, S]``, whose batch dims may be 1, for each entry of the folded batch."""
    expanded = emitter.call("expand", mask, -1, *sizes, -1, -1, -1)
    return emitter.call(torch.flatten, expanded, 0, len(sizes))
