"""The batching rules: one file an op family. ``rule_of(bundle)`` finds the rule for a bundle.

Adding an op touches one file of this folder (and this list, where the file is new).
"""

from __future__ import annotations

from ..bundle import Bundle
from . import (
    along,
    attention,
    batch,
    batch_norm,
    bilinear,
    conv,
    elementwise,
    embedding,
    factories,
    fallback,
    fft,
    group_norm,
    indexing,
    items,
    joins,
    layer_norm,
    leading,
    linear,
    local_response_norm,
    loss,
    matmul,
    pad,
    prelu,
    random,
    recurrent,
    reduce,
    shape,
    slicing,
    state,
    weight_norm,
)
from .base import RULES, Rule
from .unequal import rule_of_widths

FAMILIES = (
    *(along, attention, batch, batch_norm, bilinear, conv, elementwise, embedding, factories, fallback, fft),
    *(group_norm, indexing, items, joins, layer_norm, leading, linear, local_response_norm, loss, matmul, pad),
    *(prelu, random, recurrent, reduce, shape, slicing, state, weight_norm),
)


def rule_of(bundle: Bundle) -> Rule | None:
    """The rule for the bundle's op: its own; the elementwise one where the operator's schema says so; else ``torch.vmap``."""
    if bundle.unequal:
        return rule_of_widths(bundle)
    found = RULES.get(bundle.name)
    if found is None and bundle.op is not None and bundle.op.pointwise and not bundle.op.random:
        return elementwise.POINTWISE
    return found if found is not None else fallback.rule_of_last_resort(bundle)


def has_rule(bundle: Bundle) -> bool:
    """True where lanes of this op can be computed as one."""
    return rule_of(bundle) is not None


def is_heavy(bundle: Bundle) -> bool:
    """True where the op carries parameters or is a product: worth joining inputs for."""
    found = rule_of(bundle)
    return found is not None and found.heavy


def is_view(bundle: Bundle) -> bool:
    """True where the op launches nothing."""
    found = rule_of(bundle)
    return found is not None and found.view
