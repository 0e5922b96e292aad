"""What a model returns, in containers that a file can name.

Comes in: a forward. Goes out: a forward that returns named tuples as plain tuples, and dataclasses and dicts of a class as plain dicts,
unless their class was registered with a name for files (``torch.utils._pytree``): a file cannot name the others, and a process that reads
it need not have them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from fxfuse.private.pytree import serialized_name


def in_plain_containers(forward: Callable[..., Any], changed: dict[str, str]) -> Callable[..., Any]:
    """``forward`` with its containers of unknown classes as tuples and dicts; to ``changed`` is added what became of each class.

    >>> from collections import namedtuple
    >>> changed = {}
    >>> in_plain_containers(lambda x: {"y": namedtuple("Pair", "a b")(x, 2)}, changed)(1), changed
    ({'y': (1, 2)}, {'Pair': 'tuple'})
    """

    def plain(value: Any) -> Any:
        kind = type(value)
        if kind is list:
            return [plain(item) for item in value]
        if kind is tuple:
            return tuple(map(plain, value))
        if kind is dict:
            return {key: plain(item) for key, item in value.items()}
        if serialized_name(kind) is not None:
            return value
        if isinstance(value, tuple):
            changed[kind.__name__] = "tuple"
            return tuple(map(plain, value))
        if isinstance(value, dict):
            items = dict(value)
        elif dataclasses.is_dataclass(kind):
            items = {field.name: getattr(value, field.name) for field in dataclasses.fields(kind)}
        else:
            return value
        changed[kind.__name__] = "dict"
        return {key: plain(item) for key, item in items.items()}

    @functools.wraps(forward)
    def whole(*args: Any, **kwargs: Any) -> Any:
        return plain(forward(*args, **kwargs))

    whole.__dict__.pop("__signature__", None)  # a signature that a function was given has self in it: that of the method counts
    return whole
