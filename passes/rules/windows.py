"""Convolutions of lanes as windows and one batched product (im2col), for lanes too small for a grouped convolution to pay.

Comes in: lanes' inputs in front, ``[G, N, C, *S]``. Goes out: ``[G, N, *S_out, C * prod(kernel)]``, the windows of every position, from
``Tensor.unfold``: a view but for one copy. On the CPU a grouped convolution pays microseconds for each group, and three times that in its
backward; a batched product does not.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..bundle import Bundle, Node
from ..emit import Emitter


def geometry(bundle: Bundle) -> list[tuple[int, int, int, int, int]] | None:
    """``(kernel, stride, dilation, padding before, padding after)`` of each spatial dim; None where the convolution is of another kind."""
    op = bundle.op
    assert op is not None
    if bundle.name.startswith("conv_transpose"):
        return None
    given: dict[str, Any] = dict(zip(op.names, bundle.members[0].args, strict=True))
    kernel = tuple(given["weight"].meta["shape"][2:])
    if given["groups"] != 1:
        return None
    strides, dilations = (_each(given[name], len(kernel)) for name in ("stride", "dilation"))
    if strides is None or dilations is None:
        return None
    if given["padding"] == "same":
        totals = [dilation * (size - 1) for size, dilation in zip(kernel, dilations, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        paddings = _each(0 if given["padding"] == "valid" else given["padding"], len(kernel))
        if paddings is None:
            return None
        sides = [(padding, padding) for padding in paddings]
    rows = zip(kernel, strides, dilations, sides, strict=True)
    return [(size, stride, dilation, *side) for size, stride, dilation, side in rows]


def _each(value: Any, count: int) -> list[int] | None:
    """A number for each dim; None where they are not plain numbers."""
    values = list(value) if isinstance(value, (tuple, list)) else [value]
    values = values * count if len(values) == 1 else values
    return values if len(values) == count and all(type(number) is int for number in values) else None


def windows(emitter: Emitter, front: Node, dims: list[tuple[int, int, int, int, int]]) -> Node:
    """``[G, N, C, *S]`` -> ``[G, N, *S_out, C * prod(kernel)]``."""
    spatial = len(dims)
    if any(before or after for *_, before, after in dims):
        # Of several dims ``pad`` takes the last one first.
        padding = tuple(side for *_, before, after in reversed(dims) for side in (before, after))
        front = emitter.call(F.pad, front, padding)
    for index, (size, stride, dilation, _, _) in enumerate(dims):
        front = emitter.call("unfold", front, 3 + index, dilation * (size - 1) + 1, stride)
        if dilation > 1:
            front = emitter.call("__getitem__", front, (..., slice(None, None, dilation)))
    # [G, N, C, *S_out, *kernel]: channels to the kernels, which a weight has after its channels too.
    order = (0, 1, *range(3, 3 + spatial), 2, *range(3 + spatial, 3 + 2 * spatial))
    return emitter.call(torch.flatten, emitter.call(torch.permute, front, order), 2 + spatial)
