"""Is a call an ordinary one, of numbers that are computed now, or is it traced, transformed, or without data?

Private: ``torch.utils._python_dispatch._get_current_dispatch_mode``, the innermost mode that sees every ATen call (a fake tensor mode, a
proxy mode, a counter).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .pytree import tree_leaves
from .transforms import in_dual_level, transforming


def without_numbers() -> bool:
    """Have tensors that are made now no numbers, as in a fake tensor mode?

    >>> without_numbers()
    False
    """
    return type(torch.empty(0)) is not torch.Tensor


def out_of_the_ordinary(args: Any, kwargs: Any) -> bool:
    """True while anything but the call itself goes on: nothing should be recorded, compared or timed then.

    >>> out_of_the_ordinary((torch.zeros(2),), {})
    False
    >>> out_of_the_ordinary((torch.zeros(2, device="meta"),), {})
    True
    >>> torch.vmap(lambda x: x + out_of_the_ordinary((x,), {}))(torch.zeros(1))
    tensor([1.])
    """
    if transforming() or in_dual_level() or torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[no-untyped-call,attr-defined]
        return True
    if _get_current_dispatch_mode() is not None:
        return True
    leaves = tree_leaves((args, kwargs))
    return any(isinstance(leaf, torch.fx.Proxy) or (isinstance(leaf, torch.Tensor) and leaf.is_meta) for leaf in leaves)
