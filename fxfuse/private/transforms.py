"""Is this code run by a transform of ``torch.func`` (vmap, grad, functional_call inside one)?

Private: ``torch._C._are_functorch_transforms_active``. Tensors made inside a transform are dead outside of it; nothing public tells.
"""

from __future__ import annotations

import torch


def transforming() -> bool:
    """True inside ``torch.vmap``, ``torch.func.grad`` and their like.

    >>> transforming()
    False
    """
    return bool(torch._C._are_functorch_transforms_active())
