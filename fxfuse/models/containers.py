"""Results in containers of the user's own: dataclasses and subclasses of dict, which pytree does not know.

Comes in: what a forward returned. Goes out: ``opened``: the same with every such container in a form that pytree takes apart, and from
which its ``tree_unflatten`` makes an object of the user's class again. Nothing is registered for the user's classes themselves.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from fxfuse.private import pytree


@dataclass
class Opened:
    """A container's class and what it holds, by name or key."""

    cls: type
    parts: dict[Any, Any]


def opened(value: Any) -> Any:
    """``value`` with the containers in it that pytree does not know as ``Opened``.

    >>> @dataclass
    ... class Output:
    ...     mean: float
    >>> leaves, spec = pytree.tree_flatten(opened([Output(0.5)]))
    >>> leaves, pytree.tree_unflatten([1.5], spec)
    ([0.5], [Output(mean=1.5)])
    """
    kind = type(value)
    if kind is tuple or kind is list:
        return kind([opened(item) for item in value])
    if kind is dict:
        return {key: opened(item) for key, item in value.items()}
    if kind in pytree.SUPPORTED_NODES or isinstance(value, type):
        return value
    if isinstance(value, dict):
        plain = not vars(value) if hasattr(value, "__dict__") else True
        return Opened(kind, {key: opened(item) for key, item in value.items()}) if plain else value
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        if all(hasattr(value, name) for name in names):
            names += [name for name in getattr(value, "__dict__", ()) if name not in names]  # set by __post_init__, or afterwards
            return Opened(kind, {name: opened(getattr(value, name)) for name in names})
    return value


def _closed(parts: list[Any], context: tuple[type, tuple[Any, ...]]) -> Any:
    """An object of the user's class, made as pickle makes one: ``__init__`` has run when the forward was recorded."""
    cls, keys = context
    made: Any = object.__new__(cls) if not issubclass(cls, dict) else cls.__new__(cls)
    if isinstance(made, OrderedDict):
        for key, part in zip(keys, parts, strict=True):
            OrderedDict.__setitem__(made, key, part)
    elif isinstance(made, dict):
        dict.update(made, zip(keys, parts, strict=True))
    else:
        for key, part in zip(keys, parts, strict=True):
            object.__setattr__(made, key, part)
    return made


pytree.register_pytree_node(
    Opened,
    lambda value: (list(value.parts.values()), (value.cls, tuple(value.parts))),
    lambda parts, context: _closed(list(parts), context),
)
