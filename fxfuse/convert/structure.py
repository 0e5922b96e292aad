"""The containers of a call as plain data, so that a file can say how to take a call apart and put its result together.

Comes in: a pytree spec of tuples, lists and dicts. Goes out: nested lists that JSON takes; leaves in order; containers again.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from fxfuse.errors import ConvertError

_DICTS: tuple[type, ...] = (dict, OrderedDict)


def structure_of(spec: Any) -> Any:
    """``"*"`` for a leaf, ``["tuple", ...]``, ``["list", ...]``, ``["dict", [key, ...], ...]``; None where there are other containers.

    >>> from fxfuse.private.pytree import tree_flatten
    >>> structure_of(tree_flatten(((1, 2), {"x": [3]}))[1])
    ['tuple', ['tuple', '*', '*'], ['dict', ['x'], ['list', '*']]]
    """
    if spec.is_leaf():
        return "*"
    parts = [structure_of(child) for child in spec.children()]
    if None in parts:
        return None
    if spec.type in (tuple, list):
        return [spec.type.__name__, *parts]
    if spec.type in _DICTS and all(isinstance(key, str) for key in spec.context):
        return ["dict", list(spec.context), *parts]
    return None


def flattened(structure: Any, value: Any) -> list[Any]:
    """The leaves of a value of this structure. Raises ``ConvertError`` for another value."""
    if structure == "*":
        return [value]
    kind, *parts = structure
    if kind == "dict":
        keys, *parts = parts
        if not isinstance(value, dict) or set(value) != set(keys):
            raise ConvertError(f"the call does not fit the file: it takes the names {', '.join(keys) or 'of no keywords'}")
        items = [value[key] for key in keys]
    else:
        if not isinstance(value, list | tuple) or len(value) != len(parts):
            raise ConvertError(f"the call does not fit the file: it takes {len(parts)} values")
        items = list(value)
    return [leaf for part, item in zip(parts, items, strict=True) for leaf in flattened(part, item)]


def put_together(structure: Any, leaves: list[Any]) -> Any:
    """The value of this structure with these leaves."""
    return _put(structure, iter(leaves))


def _put(structure: Any, leaves: Any) -> Any:
    if structure == "*":
        return next(leaves)
    kind, *parts = structure
    if kind == "dict":
        keys, *parts = parts
        return {key: _put(part, leaves) for key, part in zip(keys, parts, strict=True)}
    items = [_put(part, leaves) for part in parts]
    return tuple(items) if kind == "tuple" else items
