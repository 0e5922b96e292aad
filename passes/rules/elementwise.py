"""Elementwise ops, known by their schema tag: the same op on the packed operands, aligned for broadcasting."""

from __future__ import annotations

from typing import Any

import torch

from fxfuse.functional import autocast_to, casting

from ..bundle import Bundle, Node
from ..emit import Emitter
from ..writer import CannotVectorize, Packed
from .base import Rule, rank, rule, shared, tensors, unpacked


def aligned(emitter: Emitter, operands: list[tuple[Packed, int]], out_rank: int) -> tuple[list[Any], int]:
    """Operands ``(value, lane rank)`` made to broadcast as the lanes' own do, and the lane axis of the result.

    Where all batched operands of full rank have their lanes at one place, nothing moves.
    """
    dims = {value.dim for value, r in operands if value.dim is not None and r == out_rank}
    low = any(value.dim is not None and r < out_rank for value, r in operands)
    lane = dims.pop() if len(dims) == 1 and not low else 0
    assert lane is not None
    made = []
    for value, r in operands:
        node = value.node
        if value.dim is None:
            missing = r - (out_rank - lane)
            made.append(emitter.call(torch.unsqueeze, node, missing) if missing > 0 else node)
            continue
        node = emitter.at(value, lane)
        for _ in range(out_rank - r):  # lane is 0 here: [G, ...] -> [G, 1, ..., ...]
            node = emitter.call(torch.unsqueeze, node, 1)
        made.append(node)
    return made, lane


def pointwise(emitter: Emitter, bundle: Bundle) -> Packed:
    """The op itself on the operands, aligned."""
    op = bundle.op
    assert op is not None
    operands = [(name, emitter.operand(bundle, name)) for name in op.names]
    column = dict(zip(op.names, bundle.members[0].args, strict=True))
    per_lane = {name for name, value in operands if isinstance(value, Packed) and not isinstance(column[name], Node)}
    if op.name == "clamp" and per_lane:  # takes two numbers or two tensors
        lanes = len(bundle.members)
        operands = [(n, emitter.numbers(bundle, [v] * lanes) if type(v) in (int, float) else v) for n, v in operands]
        per_lane.update(name for name, value in operands if name != "input" and value is not None)
    nodes: dict[str, Any] = {name: column[name] for name, value in operands if isinstance(value, Packed) and name not in per_lane}
    sizes = {name for name, node in nodes.items() if node.meta.get("shape") is None}  # numbers: x / x.shape[0]
    if any(name in sizes and value.dim is not None for name, value in operands):
        raise CannotVectorize(f"{bundle.name} uses sizes that differ from lane to lane")
    operands = [(name, value.node if name in sizes else value) for name, value in operands]
    nodes = {name: node for name, node in nodes.items() if name not in sizes}
    if any(isinstance(value, (list, tuple)) and any(isinstance(v, Packed) for v in value) for _, value in operands):
        raise CannotVectorize(f"{bundle.name} takes a list of tensors")
    tensor_operands = [(value, rank(nodes[name])) for name, value in operands if name in nodes]
    promoted = {name: node for name, node in nodes.items() if name not in ("condition", "mask")}
    dtypes = {node.meta["dtype"] for node in promoted.values()}
    # A zero-dimensional tensor counts less in promotion: one that all lanes share stays as it is.
    if len(dtypes) > 1 and any(r == 0 and value.dim is not None for value, r in tensor_operands):
        if len(promoted) != 2:
            raise CannotVectorize(f"{bundle.name} mixes dtypes with zero-dimensional tensors, whose promotion packing would change")
        stand_ins = [torch.empty([1] * rank(node), dtype=node.meta["dtype"]) for node in promoted.values()]
        common = torch.result_type(stand_ins[0], stand_ins[1])
        # A lane's number, of one dimension when packed, would count in full: it is cast to what the loop computes in.
        tensor_operands = [
            (Packed(emitter.call("to", value.node, common), value.dim) if r == 0 and value.dim is not None else value, r)
            for value, r in tensor_operands
        ]
    lane: int | None
    if all(value.dim is None for value, _ in tensor_operands) and not op.random:
        made, lane = [value.node for value, _ in tensor_operands], 0 if per_lane else None
    else:
        made, lane = aligned(emitter, tensor_operands, rank(bundle.members[0]))
    iterator = iter(made)
    args = [next(iterator) if name in nodes else value for name, value in operands]
    for position, (name, value) in enumerate(operands):
        if name in per_lane:
            behind = rank(bundle.members[0]) - (lane or 0)
            args[position] = emitter.call(torch.reshape, value.node, (-1, *([1] * behind))) if behind else value.node
    return Packed(emitter.respell(op, tuple(args)), lane)


POINTWISE = Rule(("*",), pointwise, lowering="pointwise")


# Elementwise by what they do, though no schema says so: Python functions, and overloads and compositions without the tag.
rule(
    "where", "threshold", "_threshold", "isclose", "complex", "polar", "long", "int", "short", "bool", "char", "byte", "cfloat", "cdouble",
    "special_expit", "special_exp2", "special_expm1", "special_erf", "special_erfc", "special_erfinv", "special_gammaln", "special_digamma",
    "special_logit", "special_log1p", "special_sinc", "special_round", "special_xlogy", "special_psi", "special_i0", "special_multigammaln",
    "imag", "conj", "conj_physical", "resolve_conj", "real", "get_real", "get_imag", "fill",
    lowering="pointwise",
)(pointwise)  # fmt: skip


@rule("clone", "detach", "zeros_like", "ones_like", "full_like", "to", "type_as", lowering="pointwise")
def _same_shape(emitter: Emitter, bundle: Bundle) -> Packed:
    op = bundle.op
    assert op is not None
    args = tensors(emitter, bundle)
    # A second tensor is there for its dtype and device alone.
    lanes = {name: value for name, value in args.items() if isinstance(value, Packed)}
    first = op.names[0]  # "input", where a schema names it
    unknown = sorted(set(lanes) - {first, "other"})
    if unknown:
        raise CannotVectorize(f"{bundle.name} reads {unknown[0]} from a tensor")
    return Packed(emitter.respell(op, unpacked(args)), lanes[first].dim)


@rule("bucketize", "searchsorted", lowering="pointwise")
def _searched(emitter: Emitter, bundle: Bundle) -> Packed:
    """Each number's place among boundaries that all lanes share."""
    assert bundle.op is not None
    args = tensors(emitter, bundle)
    at, table = ("input", "boundaries") if bundle.name == "bucketize" else ("input", "sorted_sequence")
    if not isinstance(args[at], Packed):
        raise CannotVectorize(f"{bundle.name} of one number")
    others = [value for name, value in args.items() if isinstance(value, Packed) and name != at]
    if not shared(*others) or rank(bundle.members[0].args[bundle.op.names.index(table)]) != 1:
        raise CannotVectorize(f"{bundle.name} with boundaries that differ from lane to lane or row to row")
    return Packed(emitter.respell(bundle.op, unpacked(args)), args[at].dim)


@rule("contiguous", view=True)
def _contiguous(emitter: Emitter, bundle: Bundle) -> Packed:
    # Layouts are ours to choose inside a region; the region's outputs get the strides of the original's.
    return emitter.operand(bundle, "input")  # type: ignore[no-any-return]


@rule("as_slot", lowering="pointwise")
def _as_slot(emitter: Emitter, bundle: Bundle) -> Packed:
    value, slot = emitter.operand(bundle, "value"), emitter.operand(bundle, "slot")
    shape = bundle.members[0].meta["shape"]
    node = emitter.front(value, len(bundle.members))
    extra = len(node.meta["val"].shape) - 1 - len(shape)
    for _ in range(extra):
        node = emitter.call(torch.squeeze, node, 1)
    for _ in range(-extra):
        node = emitter.call(torch.unsqueeze, node, 1)
    given, wanted = node.meta["val"].dtype, bundle.members[0].meta["dtype"]
    if given is not wanted:
        node = emitter.call(autocast_to if casting(given, wanted) is autocast_to else "to", node, wanted)
    if tuple(node.meta["val"].shape[1:]) != tuple(shape) or bundle.members[0].meta["dyn"]:
        target = emitter.front(slot, len(bundle.members))
        node = emitter.call("expand_as", node, target)
    return Packed(node, 0)
