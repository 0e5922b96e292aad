"""Trial runs call none of the user's hooks.

Comes in: a model. Goes out: ``hooks_silent``: a context in which its hooks do nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fxfuse.private.module_hooks import HOOK_DICTS
from fxfuse.private.tensor_hooks import hook_stores

from .module_tree import all_modules


def _no_hook(*args: Any, **kwargs: Any) -> None:
    return None


@contextmanager
def hooks_silent(model: nn.Module) -> Iterator[None]:
    """Hooks on the modules and Parameters of ``model`` do nothing inside: trial runs are none of theirs."""
    silenced: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
    for module in all_modules(model):
        stores = [module.__dict__.get(name) for name in HOOK_DICTS]
        for parameter in module._parameters.values():
            if parameter is not None:
                stores += hook_stores(parameter)
        for store in stores:
            if store and not any(store is known for known, _ in silenced):
                silenced.append((store, dict(store)))
                store.update(dict.fromkeys(store, _no_hook))
    try:
        yield
    finally:
        for store, kept in silenced:
            store.update(kept)
