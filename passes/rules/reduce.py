"""Reductions, softmax and scans over the lanes' own dims."""

from __future__ import annotations

from typing import Any

from ..bundle import Bundle
from ..emit import Emitter, Packed
from .base import physical, rank, rule


@rule("sum", "mean", "amax", "amin", "prod", "var", "std", "logsumexp", "all", "any", "norm", "nansum", "nanmean", lowering="reduction")
def _reduce(emitter: Emitter, bundle: Bundle) -> Packed:
    op = bundle.op
    assert op is not None
    value = emitter.operand(bundle, "input")
    args: dict[str, Any] = {name: emitter.operand(bundle, name) for name in op.names}
    lanes_rank = rank(bundle.members[0].args[0])
    dims = args.get("dim")
    if dims is None or dims == ():
        dims = tuple(range(lanes_rank))
    listed = tuple(dims) if isinstance(dims, (tuple, list)) else (dims,)
    if value.dim is None:
        return Packed(emitter.respell(op, tuple(a.node if isinstance(a, Packed) else a for a in args.values())), None)
    keep = bool(args.get("keepdim", False))
    at = tuple(physical(d % max(lanes_rank, 1), value.dim) for d in listed)
    lane = value.dim if keep else value.dim - sum(1 for d in at if d < value.dim)
    if lanes_rank == 0:
        at = ()
    keywords = {k: v for k, v in args.items() if k not in ("input", "dim", "keepdim", "p", "opt_dtype") and v is not None}
    if bundle.name in ("all", "any", "prod"):
        node = value.node
        for d in sorted(at, reverse=True):
            node = emitter.call(bundle.name, node, d, keep)
        return Packed(node, lane)
    if bundle.name == "norm":
        return Packed(emitter.call("norm", value.node, args.get("p", 2), at, keep, **keywords), lane)
    if not at:
        return Packed(emitter.call("clone", value.node), lane)
    return Packed(emitter.call(bundle.name, value.node, at, keepdim=keep, **keywords), lane)


@rule("softmax", "log_softmax", "softmin", "cumsum", "cumprod", "normalize", lowering="along a dim")
def _along(emitter: Emitter, bundle: Bundle) -> Packed:
    op = bundle.op
    assert op is not None
    value = emitter.operand(bundle, "input")
    args = {name: emitter.operand(bundle, name) for name in op.names}
    dim = args["dim"]
    lanes_rank = rank(bundle.members[0].args[0])
    if dim is None:  # the implicit dim of F.softmax: 0 for ranks 0, 1 and 3, else 1
        dim = 0 if lanes_rank in (0, 1, 3) else 1
    args["input"], args["dim"] = value.node, physical(dim % lanes_rank, value.dim)
    return Packed(emitter.respell(op, tuple(args.values())), value.dim)
