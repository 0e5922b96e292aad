"""The names under which a module keeps its hooks, and the other things that every module has in its ``__dict__``.

Private: all of them, and ``hooks_for_all``, which says whether hooks for all modules are registered; the public API only adds hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules import module as _modules

__all__ = ["BOOKKEEPING", "CALL_HOOKS", "HOOK_DICTS", "has_hooks", "hooks_for_all"]

# Is a hook for the calls of all modules registered?
hooks_for_all: Callable[[], Any] = _modules._has_any_global_hook

# Hooks that run around a call of the module, and the marks that say how.
CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
HOOK_DICTS = (*CALL_HOOKS, "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
# What a module has that says nothing of what its forward computes, or that is compared wherever it matters.
BOOKKEEPING = frozenset(
    ("training", "_modules", "_parameters", "_buffers", "_non_persistent_buffers_set", "_is_full_backward_hook", *CALL_HOOKS)
)


def has_hooks(module: nn.Module) -> bool:
    """True where calling ``module`` also calls hooks that somebody registered on it."""
    return any(module.__dict__.get(name) for name in HOOK_DICTS)
