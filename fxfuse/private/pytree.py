"""Containers taken apart into leaves and put together again: ``torch.utils._pytree``.

Private: the module as a whole. ``torch.fx``, ``torch.export`` and ``torch.func`` speak in its specs; ``torch.utils.pytree``, its public
successor, is not in every torch that fxfuse supports, and has specs of its own.
"""

from __future__ import annotations

from typing import Any

from torch.utils._pytree import (
    NO_SERIALIZED_TYPE_NAME_FOUND,
    SERIALIZED_TYPE_TO_PYTHON_TYPE,
    SUPPORTED_NODES,
    SUPPORTED_SERIALIZED_TYPES,
    TreeSpec,
    register_pytree_node,
    tree_flatten,
    tree_leaves,
    tree_map_only,
    tree_unflatten,
)

__all__ = [
    "SUPPORTED_NODES",
    "TreeSpec",
    "reads_plain_data",
    "register_pytree_node",
    "serialized_name",
    "serialized_type",
    "tree_flatten",
    "tree_leaves",
    "tree_map_only",
    "tree_unflatten",
]


def serialized_name(kind: type) -> str | None:
    """The name under which files know a class of containers; None where it has none.

    >>> from collections import OrderedDict
    >>> serialized_name(OrderedDict), serialized_name(set)
    ('collections.OrderedDict', None)
    """
    known = SUPPORTED_SERIALIZED_TYPES.get(kind)
    return None if known is None or known.serialized_type_name == NO_SERIALIZED_TYPE_NAME_FOUND else known.serialized_type_name


def serialized_type(name: str) -> Any:
    """The class that was registered under a name; None where none was."""
    return SERIALIZED_TYPE_TO_PYTHON_TYPE.get(name)


def reads_plain_data(kind: type) -> bool:
    """Is what a file says of such a container (its keys) read as JSON, without code of whoever registered it?"""
    return SUPPORTED_SERIALIZED_TYPES[kind].from_dumpable_context is None
