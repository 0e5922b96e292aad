"""Losses inside lanes: the loss of every element, then its mean or sum over a lane's own elements."""

from __future__ import annotations

from typing import Any

import torch

from ..bundle import Bundle
from ..emit import Emitter
from ..writer import CannotVectorize, Packed
from .base import rank, rule, tensors
from .elementwise import aligned


@rule(
    "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits", "soft_margin_loss",
    "kl_div", "poisson_nll_loss", "gaussian_nll_loss",
    lowering="reduction",
)  # fmt: skip
def _loss(emitter: Emitter, bundle: Bundle) -> Packed:
    op = bundle.op
    assert op is not None
    args = tensors(emitter, bundle)
    column: dict[str, Any] = dict(zip(op.names, bundle.members[0].args, strict=True))
    packed = {name: value for name, value in args.items() if isinstance(value, Packed)}
    ranks = {name: rank(column[name]) for name in packed}
    reduction = args.get("reduction")
    if args.get("size_average") is not None or args.get("reduce") is not None or reduction not in ("none", "mean", "sum"):
        raise CannotVectorize(f"{bundle.name} with reduction {reduction}")
    if args.get("weight") is not None and bundle.name != "binary_cross_entropy_with_logits" and bundle.name != "binary_cross_entropy":
        raise CannotVectorize(f"{bundle.name} with weights")
    if len({column[name].meta["shape"] for name in ("input", "target") if name in packed}) > 1:
        raise CannotVectorize(f"{bundle.name} of tensors of different shapes")
    full = max(ranks.values())
    if any(value.dim is not None for value in packed.values()):  # losses do not broadcast: one tensor for all lanes is given to each
        lanes = len(bundle.members)
        packed = {n: v if v.dim is not None else Packed(emitter.front(v, lanes), 0) for n, v in packed.items()}
    nodes, lane = aligned(emitter, [(value, ranks[name]) for name, value in packed.items()], full)
    args.update(zip(packed, nodes, strict=True), reduction="none")
    # One target for all lanes: torch warns of losses that broadcast, or refuses them.
    pair = [name for name in ("input", "target") if name in packed]
    for name, other in zip(pair, reversed(pair), strict=True):
        if packed[name].dim is None and packed[other].dim is not None:
            args[name] = emitter.call("expand_as", args[name], args[other])
    elements = emitter.respell(op, tuple(args.values()))
    if reduction == "none":
        return Packed(elements, lane)
    own = tuple(d for d in range(full + 1) if d != lane)
    return Packed(emitter.call(torch.mean if reduction == "mean" else torch.sum, elements, own), 0)
