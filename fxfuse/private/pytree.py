"""Containers taken apart into leaves and put together again: ``torch.utils._pytree``.

Private: the module as a whole. ``torch.fx``, ``torch.export`` and ``torch.func`` speak in its specs; ``torch.utils.pytree``, its public
successor, is not in every torch that fxfuse supports, and has specs of its own.
"""

from __future__ import annotations

from torch.utils._pytree import (
    SUPPORTED_NODES,
    TreeSpec,
    register_pytree_node,
    tree_flatten,
    tree_leaves,
    tree_map_only,
    tree_unflatten,
)

__all__ = ["SUPPORTED_NODES", "TreeSpec", "register_pytree_node", "tree_flatten", "tree_leaves", "tree_map_only", "tree_unflatten"]
