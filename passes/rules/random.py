"""Dropout inside lanes: one dropout of the packed tensor. Every lane draws its own mask; the numbers differ from the loop's."""

from __future__ import annotations

from ..bundle import Bundle
from ..emit import CannotVectorize, Emitter, Packed
from .base import rule, tensors, unpacked
from .fold import fold, unfold


def _training(emitter: Emitter, bundle: Bundle) -> bool:
    assert bundle.op is not None
    return bool(emitter.operand(bundle, "training" if "training" in bundle.op.names else "train"))


@rule("dropout", "alpha_dropout", lowering="pointwise, own masks")
def _dropout(emitter: Emitter, bundle: Bundle) -> Packed:
    op = bundle.op
    assert op is not None
    value: Packed = emitter.operand(bundle, "input")
    if not _training(emitter, bundle):
        return value
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
    if value.dim is None:
        value = Packed(emitter.front(value, len(bundle.members)), 0)
    # dropout2d takes three dims for [N, C, L]; the others take one dim less for one sample.
    if len(bundle.members[0].meta["shape"]) == {"dropout1d": 2, "dropout3d": 4}.get(bundle.name):
        return Packed(emitter.respell(op, (emitter.at(value, 0), *bundle.members[0].args[1:])), 0)
    node, place = fold(emitter, value)
    return unfold(emitter, emitter.respell(op, (node, *bundle.members[0].args[1:])), place, len(bundle.members))


@rule("rand_like", "randn_like", "bernoulli", "rrelu", lowering="pointwise, own draws")
def _drawn(emitter: Emitter, bundle: Bundle) -> Packed:
    """Random numbers in the shape of the lanes: every lane draws its own, also where the lanes share the tensor."""
    op = bundle.op
    assert op is not None
    args = tensors(emitter, bundle)
    value: Packed = args["input"]
    if any(isinstance(v, Packed) for name, v in args.items() if name != "input"):
        raise CannotVectorize(f"{bundle.name} with a second tensor")
    if value.dim is None and (bundle.name != "rrelu" or args["training"]):
        value = Packed(emitter.front(value, len(bundle.members)), 0)
    args["input"] = value
    return Packed(emitter.respell(op, unpacked(args)), value.dim)


@rule("randn", "rand", lowering="own draws")
def _drawn_anew(emitter: Emitter, bundle: Bundle) -> Packed:
    op = bundle.op
    assert op is not None
    args = tensors(emitter, bundle)
    size = args["size"]
    args["size"] = (len(bundle.members), *(size if isinstance(size, (tuple, list)) else (size,)))
    return Packed(emitter.respell(op, tuple(args.values())), 0)
