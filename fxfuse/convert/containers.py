"""What a model returns, in containers that a file can name.

Comes in: a forward. Goes out: a forward that returns named tuples as plain tuples, unless their class was registered with a name for
files (``torch.utils._pytree``): a file cannot name the others, and a process that reads it need not have them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from fxfuse.private.pytree import serialized_name


def in_plain_tuples(forward: Callable[..., Any], named: set[str]) -> Callable[..., Any]:
    """``forward`` with its named tuples as tuples; the names of their classes are added to ``named``.

    >>> from collections import namedtuple
    >>> named = set()
    >>> in_plain_tuples(lambda x: {"y": namedtuple("Pair", "a b")(x, 2)}, named)(1), named
    ({'y': (1, 2)}, {'Pair'})
    """

    def plain(value: Any) -> Any:
        kind = type(value)
        if kind is dict:
            return {key: plain(item) for key, item in value.items()}
        if kind is list:
            return [plain(item) for item in value]
        if not isinstance(value, tuple):
            return value
        items = tuple(map(plain, value))
        if kind is tuple:
            return items
        if serialized_name(kind) is not None:
            return value
        named.add(kind.__name__)
        return items

    @functools.wraps(forward)
    def whole(*args: Any, **kwargs: Any) -> Any:
        return plain(forward(*args, **kwargs))

    return whole
