"""Dropout and draws inside lanes: one call on the packed tensor. Every lane draws its own numbers; they differ from the loop's."""

from __future__ import annotations

import torch

from fxfuse.functional import dropout_each

from ..bundle import Bundle
from ..emit import Emitter
from ..writer import CannotVectorize, Packed
from .base import rank, rule, tensors, unpacked
from .elementwise import aligned
from .fold import fold, unfold


def _training(emitter: Emitter, bundle: Bundle) -> bool:
    assert bundle.op is not None
    return bool(emitter.operand(bundle, "training" if "training" in bundle.op.names else "train"))


def _own_probabilities(bundle: Bundle) -> bool:
    assert bundle.op is not None
    at = bundle.op.names.index("p")
    return any(member.args[at] != bundle.members[0].args[at] for member in bundle.members)


def _each(emitter: Emitter, bundle: Bundle, value: Packed, own: int) -> Packed:
    """Lanes with probabilities of their own; ``own``: how many dims of a lane have masks of their own."""
    assert bundle.op is not None
    at = bundle.op.names.index("p")
    keep = [1.0 - float(member.args[at]) for member in bundle.members]  # type: ignore[arg-type]
    scale = [1 / each if each else 0.0 for each in keep]
    given = [emitter.numbers(bundle, numbers).node for numbers in (keep, scale)]
    return Packed(emitter.call(dropout_each, emitter.front(value, len(bundle.members)), *given, 1 + own), 0)


@rule("dropout", "alpha_dropout", lowering="pointwise, own masks")
def _dropout(emitter: Emitter, bundle: Bundle) -> Packed:
    op = bundle.op
    assert op is not None
    value: Packed = emitter.operand(bundle, "input")
    if not _training(emitter, bundle):
        return value
    if _own_probabilities(bundle):
        return _each(emitter, bundle, value, rank(bundle.members[0]))
    if value.dim is None:  # lanes that drop out of one shared tensor draw a mask each
        value = Packed(emitter.front(value, len(bundle.members)), 0)
    return Packed(emitter.respell(op, (value.node, *bundle.members[0].args[1:])), value.dim)


@rule("dropout1d", "dropout2d", "dropout3d", "feature_dropout", "feature_alpha_dropout", lowering="channels, own masks")
def _channel_dropout(emitter: Emitter, bundle: Bundle) -> Packed:
    op = bundle.op
    assert op is not None
    value: Packed = emitter.operand(bundle, "input")
    if not _training(emitter, bundle):
        return value
    unbatched = len(bundle.members[0].meta["shape"]) == {"dropout1d": 2, "dropout3d": 4}.get(bundle.name)
    if _own_probabilities(bundle):
        return _each(emitter, bundle, value, 1 if unbatched else 2)
    if value.dim is None:
        value = Packed(emitter.front(value, len(bundle.members)), 0)
    # dropout2d takes three dims for [N, C, L]; the others take one dim less for one sample.
    if unbatched:
        return Packed(emitter.respell(op, (emitter.at(value, 0), *bundle.members[0].args[1:])), 0)
    node, place = fold(emitter, value)
    return unfold(emitter, emitter.respell(op, (node, *bundle.members[0].args[1:])), place, len(bundle.members))


@rule("rand_like", "randn_like", "randint_like", "bernoulli", "poisson", "rrelu", "drawn", lowering="pointwise, own draws")
def _drawn(emitter: Emitter, bundle: Bundle) -> Packed:
    """Random numbers in the shape of the lanes: every lane draws its own, also where the lanes share the tensor."""
    op = bundle.op
    assert op is not None
    args = tensors(emitter, bundle)
    first = op.names[0]  # "input", where a schema names it
    value: Packed = args[first]
    if any(isinstance(v, Packed) for name, v in args.items() if name != first):
        raise CannotVectorize(f"{bundle.name} with a second tensor")
    if value.dim is None and (bundle.name != "rrelu" or args["training"]):
        value = Packed(emitter.front(value, len(bundle.members)), 0)
    args[first] = value
    return Packed(emitter.respell(op, unpacked(args)), value.dim)


@rule("normal", lowering="own draws")
def _normal(emitter: Emitter, bundle: Bundle) -> Packed:
    """``torch.normal(mean, std)``: of tensors, one of them, or of numbers in a size."""
    op = bundle.op
    assert op is not None
    if "size" in op.names:
        return _drawn_in_size(emitter, bundle)
    args = tensors(emitter, bundle)
    given = dict(zip(op.names, bundle.members[0].args, strict=True))
    names = [name for name, value in args.items() if isinstance(value, Packed)]
    if all(args[name].dim is None for name in names):  # the lanes share mean and spread, not the numbers drawn
        args[names[0]] = Packed(emitter.front(args[names[0]], len(bundle.members)), 0)
    made, lane = aligned(emitter, [(args[name], rank(given[name])) for name in names], rank(bundle.members[0]))
    args.update(zip(names, made, strict=True))
    return Packed(emitter.respell(op, tuple(args.values())), lane)


@rule("multinomial", lowering="own draws")
def _multinomial(emitter: Emitter, bundle: Bundle) -> Packed:
    """One distribution for each row: the lanes are more rows."""
    op = bundle.op
    assert op is not None
    args = tensors(emitter, bundle)
    lanes = len(bundle.members)
    rows = emitter.front(args["input"], lanes)
    if rank(bundle.members[0]) == 1:
        return Packed(emitter.respell(op, (rows, *list(args.values())[1:]), zeros=False), 0)
    drawn = emitter.respell(op, (emitter.call(torch.flatten, rows, 0, 1), *list(args.values())[1:]), zeros=False)
    return Packed(emitter.call(torch.unflatten, drawn, 0, (lanes, -1)), 0)


@rule("randperm", lowering="own draws")
def _randperm(emitter: Emitter, bundle: Bundle) -> Packed:
    """The order of as many uniform numbers for each lane; in float64 two are never equal."""
    args = tensors(emitter, bundle)
    if bundle.members[0].meta["dtype"] is not torch.int64 or args.get("generator") is not None:
        raise CannotVectorize("randperm of another dtype, or with a generator")
    drawn = emitter.call(torch.rand, (len(bundle.members), args["n"]), dtype=torch.float64, device=args.get("device"))
    return Packed(emitter.call(torch.argsort, drawn, dim=1, stable=True), 0)


@rule("randn", "rand", "randint", lowering="own draws")
def _drawn_anew(emitter: Emitter, bundle: Bundle) -> Packed:
    return _drawn_in_size(emitter, bundle)


def _drawn_in_size(emitter: Emitter, bundle: Bundle) -> Packed:
    """A factory of random numbers, with the lanes in front of its size."""
    op = bundle.op
    assert op is not None
    args = tensors(emitter, bundle)
    size = args["size"]
    args["size"] = (len(bundle.members), *(size if isinstance(size, (tuple, list)) else (size,)))
    return Packed(emitter.respell(op, tuple(args.values())), 0)
