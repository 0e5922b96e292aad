"""Reductions over the lanes' own dims; those that also return indices, and norms.

Comes in: the lane axis anywhere. Goes out: the lane axis where the reduction leaves it. Without dims a reduction is over all of a lane's
dims, which is a reduction of the packed tensor over all dims but one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..bundle import Bundle
from ..emit import Emitter
from ..writer import CannotVectorize, Packed
from .along import counted
from .base import rank, rule, tensors, unpacked

_FUNCTIONS: dict[str, Callable[..., Any]] = {"linalg_vector_norm": torch.linalg.vector_norm}


def _function(name: str) -> Any:
    return _FUNCTIONS.get(name) or (name if hasattr(torch.Tensor, name) else getattr(torch, name))


def own_dims(dims: Any, lane_rank: int, lane: int | None) -> tuple[int, ...]:
    """The dims to reduce, in the packed value; none given means all of the lane's own."""
    if dims is None or dims == ():
        dims = tuple(range(lane_rank))
    listed = tuple(dims) if isinstance(dims, (tuple, list)) else (dims,)
    return tuple(counted(d, lane_rank, lane) for d in listed) if lane_rank else ()


def lane_after(value: Packed, dims: tuple[int, ...], keep: bool) -> int | None:
    """Where the lane axis is when ``dims`` are gone."""
    return value.dim if keep or value.dim is None else value.dim - sum(1 for d in dims if d < value.dim)


def _operands(emitter: Emitter, bundle: Bundle) -> tuple[Packed, dict[str, Any], int]:
    args = tensors(emitter, bundle)
    value = next(iter(args.values()))
    if not isinstance(value, Packed):
        raise CannotVectorize(f"{bundle.name} of {type(value).__name__}")
    return value, args, rank(bundle.members[0].args[0])


@rule(
    "sum", "mean", "amax", "amin", "prod", "var", "std", "logsumexp", "all", "any", "nansum", "nanmean", "count_nonzero", "var_mean",
    "std_mean", "linalg_vector_norm",
    lowering="reduction",
)  # fmt: skip
def _reduce(emitter: Emitter, bundle: Bundle) -> Packed:
    assert bundle.op is not None
    value, args, lane_rank = _operands(emitter, bundle)
    if value.dim is None:
        return Packed(emitter.respell(bundle.op, unpacked(args)), None)
    keep = bool(args.get("keepdim", False))
    at = own_dims(args.get("dim"), lane_rank, value.dim)
    lane = lane_after(value, at, keep)
    keywords = {k: v for k, v in args.items() if k not in ("input", "x", "dim", "keepdim") and v is not None}
    if bundle.name in ("all", "any", "prod"):  # one dim at a time
        node = value.node
        dtype = keywords.get("dtype")
        for d in sorted(at, reverse=True):
            node = emitter.call(bundle.name, node, d, keep, **({} if dtype is None else {"dtype": dtype}))
        if not at:
            raise CannotVectorize(f"{bundle.name} of a single number")
        return Packed(node, lane)
    if not at:  # a lane is a single number: give it a dim to reduce
        value, at, keep, lane = Packed(emitter.call(torch.unsqueeze, emitter.at(value, 0), 1), 0), (1,), False, 0
    if bundle.name == "count_nonzero":
        return Packed(emitter.call("count_nonzero", value.node, at), lane)
    if bundle.name == "logsumexp":
        return Packed(emitter.call("logsumexp", value.node, at, keep), lane)
    if bundle.name == "linalg_vector_norm":
        order = keywords.pop("ord", 2)
        return Packed(emitter.call(torch.linalg.vector_norm, value.node, order, at, keep, **keywords), lane)
    return Packed(emitter.call(_function(bundle.name), value.node, at, keepdim=keep, **keywords), lane)


@rule("max", "min", lowering="reduction")
def _extreme(emitter: Emitter, bundle: Bundle) -> Packed:
    """``max(x)`` is ``amax`` over all dims, which shares its gradient among equal elements as it does; ``max(x, y)`` is elementwise."""
    assert bundle.op is not None
    if "other" in bundle.op.names:
        from .elementwise import pointwise

        return pointwise(emitter, bundle)
    value, args, lane_rank = _operands(emitter, bundle)
    if "dim" in args:
        return _with_indices(emitter, bundle)
    if value.dim is None:
        return Packed(emitter.respell(bundle.op, unpacked(args)), None)
    at = own_dims(None, lane_rank, value.dim)
    if not at:
        raise CannotVectorize(f"{bundle.name} of a single number")
    return Packed(emitter.call(torch.amax if bundle.name == "max" else torch.amin, value.node, at), lane_after(value, at, False))


def _with_indices(emitter: Emitter, bundle: Bundle) -> Packed:
    """Reductions along one dim; without it, ``argmax`` and the like take all of a lane's elements as one row."""
    op = bundle.op
    assert op is not None
    value, args, lane_rank = _operands(emitter, bundle)
    if any(isinstance(v, Packed) and v.dim is not None for k, v in args.items() if k != "input"):
        raise CannotVectorize(f"{bundle.name} with a second tensor that differs from lane to lane")
    if value.dim is None:
        return Packed(emitter.respell(op, unpacked(args)), None)
    if "dim" not in args:
        raise CannotVectorize(f"{bundle.name} of all elements shares its gradient among equal ones, which no packed form does")
    if lane_rank == 0:
        raise CannotVectorize(f"{bundle.name} of a single number")
    keep = bool(args.get("keepdim", False))
    if args["dim"] is None:
        if keep:
            raise CannotVectorize(f"{bundle.name} with keepdim and without a dim")
        rows = emitter.call("reshape", emitter.front(value, len(bundle.members)), (len(bundle.members), -1))
        args["input"], args["dim"], lane = Packed(rows, 0), 1, 0
    else:
        args["dim"] = counted(args["dim"], lane_rank, value.dim)
        after = lane_after(value, (args["dim"],), keep)
        assert after is not None
        lane = after
    questions = args.get("q")
    if isinstance(questions, Packed):
        lane += len(questions.node.meta["val"].shape)  # one result per question, in front
    return Packed(emitter.respell(op, unpacked(args)), lane)


rule(
    "median", "nanmedian", "mode", "kthvalue", "argmax", "argmin", "aminmax", "quantile", "nanquantile", lowering="reduction"
)(_with_indices)  # fmt: skip


@rule("norm", "linalg_norm", lowering="reduction")
def _norm(emitter: Emitter, bundle: Bundle) -> Packed:
    """Both names mean a vector norm unless a matrix norm is asked for by its name or by ``ord`` with two dims."""
    assert bundle.op is not None
    value, args, lane_rank = _operands(emitter, bundle)
    if value.dim is None:
        return Packed(emitter.respell(bundle.op, unpacked(args)), None)
    order, dims, keep = args.get("p", args.get("ord", 2)), args.get("dim"), bool(args.get("keepdim", False))
    given = 0 if dims is None or dims == () else len(dims) if isinstance(dims, (tuple, list)) else 1
    if bundle.name == "linalg_norm" and order is not None and (given == 2 or (given == 0 and lane_rank != 1)):
        raise CannotVectorize(f"linalg.norm of matrices of order {order}")
    if isinstance(order, str) and order != "fro":
        raise CannotVectorize(f"norm of order {order}")
    order = 2 if order is None or isinstance(order, str) else order
    at = own_dims(dims, lane_rank, value.dim)
    if not at:
        raise CannotVectorize("norm of a single number")
    node = emitter.call(torch.linalg.vector_norm, value.node, order, at, keep, dtype=args.get("dtype") or args.get("opt_dtype"))
    return Packed(node, lane_after(value, at, keep))
