"""Is this code run by a transform of ``torch.func`` (vmap, grad, functional_call inside one), or in forward-mode differentiation?

Private: ``torch._C._are_functorch_transforms_active``, ``torch._C._functorch.is_functorch_wrapped_tensor``,
``torch.autograd.forward_ad._current_level``. Tensors made inside a transform
are dead outside of it; nothing public tells.
"""

from __future__ import annotations

import torch


def transforming() -> bool:
    """True inside ``torch.vmap``, ``torch.func.grad`` and their like.

    >>> transforming()
    False
    """
    return bool(torch._C._are_functorch_transforms_active())


def in_dual_level() -> bool:
    """True within ``torch.autograd.forward_ad.dual_level()``, where any tensor may have a tangent.

    >>> with torch.autograd.forward_ad.dual_level():
    ...     in_dual_level()
    True
    """
    return bool(torch.autograd.forward_ad._current_level >= 0)


def of_a_transform(tensor: torch.Tensor) -> bool:
    """Was this tensor made inside a transform, which may be over by now? Its numbers cannot be read then.

    >>> of_a_transform(torch.zeros(2))
    False
    """
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))
