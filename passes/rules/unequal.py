"""Lanes of unequal widths in one op (``passes.unequal`` finds them):

- linear layers with inputs of their own: inputs and weights filled up with zeros to the widest, one batched product. The inputs are laid
  end to end with one zero behind them, from which one gather takes each lane's row; weights are stored filled up.
- linear layers and convolutions on one shared input: one wide layer, weights stored row by row.
- look-ups: one table, its rows filled up with zeros (``rules.embedding``), and one gather that leaves out what filled them up;
- elementwise ops of what those give: the op on all of it.

Results of unequal widths lie end to end in one tensor; an op that needs them one by one gets them by one split.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F

from fxfuse.functional import autocast_to
from fxfuse.ops import Op

from ..bundle import Bundle, Node
from ..emit import Emitter
from ..unequal import CONVOLUTIONS, uncast
from ..writer import CannotVectorize, Packed
from .base import Rule, rank
from .embedding import embedding
from .linear import by_rows


def rule_of_widths(bundle: Bundle) -> Rule:
    """The rule for a bundle of unequal widths."""
    if bundle.name in CONVOLUTIONS:
        return _WIDE_CONVOLUTION
    if bundle.name == "embedding":
        return _LOOK_UP
    return _LINEAR if bundle.name == "linear" else _ELEMENTWISE


def _inputs(bundle: Bundle) -> list[Node]:
    return [member.all_input_nodes[0] for member in bundle.members]


def _operands(bundle: Bundle, name: str) -> list[Node] | None:
    """The lanes' own nodes for a tensor argument, before autocast's casts; None where it is left out."""
    assert bundle.op is not None
    column = bundle.op.names.index(name)
    return None if bundle.members[0].args[column] is None else [uncast(member.args[column]) for member in bundle.members]


def _cast(emitter: Emitter, bundle: Bundle, name: str, node: Node) -> Node:
    """What was laid out or packed, as autocast casts it."""
    assert bundle.op is not None
    given: Any = bundle.members[0].args[bundle.op.names.index(name)]
    return node if uncast(given) is given else emitter.call(autocast_to, node, given.args[1])


def _linear(emitter: Emitter, bundle: Bundle) -> tuple[Packed, str]:
    inputs, weights, biases = (_operands(bundle, name) for name in ("input", "weight", "bias"))
    assert inputs is not None
    assert weights is not None
    if inputs[0] is inputs[1]:
        weight, bias = _rows(emitter, bundle)
        return Packed(emitter.call(F.linear, emitter.single(_inputs(bundle)[0]), weight, bias), None), "wide_linear"
    most_out, most_in = (max(node.meta["shape"][dim] for node in weights) for dim in (0, 1))
    widths = [node.meta["shape"][-1] for node in inputs]
    x = emitter.front(emitter.fetch(inputs), len(inputs)) if len(set(widths)) == 1 else _filled(emitter, inputs, widths, most_in)
    x = _cast(emitter, bundle, "input", x)
    filled = _cast(emitter, bundle, "weight", emitter.filled_up(weights, (most_out, most_in), (1, 0)))
    bias = None
    if biases is not None:
        bias = emitter.call(torch.unsqueeze, _cast(emitter, bundle, "bias", emitter.filled_up(biases, (most_out,), (0,))), 1)

    def product(rows: Node) -> Node:
        return emitter.call(torch.bmm, rows, filled) if bias is None else emitter.call(torch.baddbmm, bias, rows, filled)

    out, lowering = by_rows(emitter, bundle, x, product), f"filled up to {most_in}x{most_out}"
    return (Packed(out, 0) if bundle.apart is None else Packed(_end_to_end(emitter, bundle, out, most_out), None)), lowering


def _rows(emitter: Emitter, bundle: Bundle) -> tuple[Node, Node | None]:
    """The lanes' weights and biases, row by row."""
    found: list[Node | None] = []
    widths = [member.meta["shape"][bundle.apart] for member in bundle.members]
    for name in ("weight", "bias"):
        nodes = _operands(bundle, name)
        if nodes is None:
            found.append(None)
            continue
        table = emitter.table(nodes)
        if isinstance(table, str):
            raise CannotVectorize(f"{bundle.name}: {table}")
        if table[1] != _begins(widths) or table[0].meta["val"].shape[0] != sum(widths):
            raise CannotVectorize(f"{bundle.name}: weights are packed in another order already")
        found.append(_cast(emitter, bundle, name, table[0]))
    weight, bias = found
    assert weight is not None
    return weight, bias


def _convolution(emitter: Emitter, bundle: Bundle) -> tuple[Packed, str]:
    op = bundle.op
    assert op is not None
    weight, bias = _rows(emitter, bundle)
    given = {"input": emitter.single(_inputs(bundle)[0]), "weight": weight, "bias": bias}
    args = tuple(given.get(name, value) for name, value in zip(op.names, bundle.members[0].args, strict=True))
    return Packed(emitter.respell(op, args), None), "wide_conv"


def _filled(emitter: Emitter, inputs: list[Node], widths: list[int], most: int) -> Node:
    """``[G, ..., most]``: each lane's input with zeros behind it."""
    source, starts = _laid_out(emitter, inputs, widths)
    end = int(source.meta["val"].shape[-1])
    columns = [start + column if column < width else end for start, width in zip(starts, widths, strict=True) for column in range(most)]
    with_zero = emitter.call(F.pad, source, (0, 1))
    index = emitter.constant(columns, emitter.device(inputs))
    dim = rank(inputs[0]) - 1
    taken = emitter.call(torch.index_select, with_zero, dim, index)
    return emitter.at(Packed(emitter.call(torch.unflatten, taken, dim, (len(inputs), most)), dim), 0)


def _laid_out(emitter: Emitter, inputs: list[Node], widths: list[int]) -> tuple[Node, list[int]]:
    """A tensor that holds all the inputs in its last dim, and where each begins."""
    bundle = emitter.bundles.end_to_end(inputs[0])
    if bundle is not None and bundle.apart == -1 and all(emitter.bundles.of[node] == bundle.index for node in inputs):
        begins = dict(zip(bundle.members, _begins(node.meta["shape"][-1] for node in bundle.members), strict=True))
        return emitter.values[bundle.index].node, [begins[node] for node in inputs]
    last = rank(inputs[0]) - 1
    sliced = all(isinstance(node.target, Op) and node.target.name == "slice_along" for node in inputs)
    if sliced and all(node.args[0] is inputs[0].args[0] and node.args[1] == last and node.args[4] == 1 for node in inputs):
        source = emitter.single(inputs[0].args[0])  # type: ignore[arg-type]
        return source, [range(source.meta["val"].shape[-1])[int(node.args[2])] for node in inputs]  # type: ignore[arg-type]
    joined = emitter.call(torch.cat, [emitter.single(node) for node in inputs], last)
    return joined, _begins(widths)


def _begins(widths: Iterable[int]) -> list[int]:
    return list(itertools.accumulate(widths, initial=0))[:-1]


def _end_to_end(emitter: Emitter, bundle: Bundle, out: Node, most: int) -> Node:
    """``[G, ..., most]`` -> ``[..., sum of the lanes' widths]``."""
    widths = [member.meta["shape"][-1] for member in bundle.members]
    last = len(out.meta["val"].shape) - 1
    row = emitter.call(torch.flatten, emitter.at(Packed(out, 0), last - 1), last - 1, last)
    columns = [lane * most + column for lane, width in enumerate(widths) for column in range(width)]
    return emitter.call(torch.index_select, row, last - 1, emitter.constant(columns, emitter.device(bundle.members)))


def _look_up(emitter: Emitter, bundle: Bundle) -> tuple[Packed, str]:
    found, lowering = embedding(emitter, bundle)
    assert isinstance(found, Packed)
    out = emitter.front(found, len(bundle.members))
    return Packed(_end_to_end(emitter, bundle, out, int(out.meta["val"].shape[-1])), None), f"{lowering}, rows filled up"


def _elementwise(emitter: Emitter, bundle: Bundle) -> Packed:
    op = bundle.op
    source = emitter.bundles.end_to_end(_inputs(bundle)[0])
    assert op is not None
    if source is None or source.apart is None or source.members != _inputs(bundle):
        raise CannotVectorize(f"{bundle.name} of lanes of unequal widths in another order")
    value = emitter.values[source.index].node
    args = tuple(value if isinstance(arg, Node) else arg for arg in bundle.members[0].args)
    return Packed(emitter.respell(op, args), None)


_LINEAR = Rule(("linear",), _linear, heavy=True)
_WIDE_CONVOLUTION = Rule(tuple(CONVOLUTIONS), _convolution, heavy=True)
_LOOK_UP = Rule(("embedding",), _look_up, heavy=True)
_ELEMENTWISE = Rule(("*",), _elementwise, lowering="pointwise, end to end")
