"""The gradient hooks that somebody registered on a tensor.

Private: ``Tensor._backward_hooks`` and ``_post_accumulate_grad_hooks``, dicts or None; the public API only adds hooks.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

_Store = dict[Any, Any] | None


def hook_stores(tensor: Tensor) -> tuple[_Store, _Store]:
    """The dicts themselves: of ``register_hook``, and of ``register_post_accumulate_grad_hook``."""
    return tensor._backward_hooks, getattr(tensor, "_post_accumulate_grad_hooks", None)


def has_gradient_hooks(tensor: Tensor) -> bool:
    """True where a backward would call a hook of this tensor."""
    return any(hook_stores(tensor))
