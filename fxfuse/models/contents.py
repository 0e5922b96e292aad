"""What the lists, dicts and objects among the arguments of a call hold: a call that changes it does more than return tensors.

Comes in: the arguments, before the call. Goes out: ``Contents``, which tells afterwards whether anything was added, replaced or taken
out (a cache of keys and values, a list that layers append to), and puts it back. Tensors and modules are not looked into.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Iterable
from operator import is_
from typing import Any

import torch
from torch import nn

_PLAIN = frozenset((int, float, bool, str, bytes, complex, type(None), type(Ellipsis), slice, range, torch.dtype, torch.device, torch.Size))
_CLOSED = (torch.Tensor, nn.Module, type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType)
_MOST = 2000  # objects that are looked at, for one call


class Contents:
    """A snapshot.

    >>> seen, cache = [1], {"keys": [2]}
    >>> before = Contents((seen, cache))
    >>> cache["keys"].append(3)
    >>> before.changed()
    'list'
    >>> before.restore(); cache
    {'keys': [2]}
    """

    __slots__ = ("held",)

    def __init__(self, arguments: Iterable[Any]) -> None:
        self.held: list[tuple[Any, Any, list[Any]]] = []  # whose, what holds it (the thing itself, or its attributes), what it holds
        pending = [argument for argument in arguments if type(argument) not in _PLAIN]
        seen: set[int] = set()
        while pending and len(seen) < _MOST:
            thing = pending.pop()
            if type(thing) in _PLAIN or isinstance(thing, _CLOSED) or id(thing) in seen:
                continue
            seen.add(id(thing))
            if isinstance(thing, (tuple, frozenset)):
                pending.extend(thing)
            elif isinstance(thing, (list, dict, set, deque)):
                self._keep(thing, thing, pending)
            attributes = getattr(thing, "__dict__", None)
            if type(attributes) is dict:
                self._keep(thing, attributes, pending)

    def _keep(self, thing: Any, holder: Any, pending: list[Any]) -> None:
        items = _items(holder)
        self.held.append((thing, holder, items))
        pending.extend(holder.values() if isinstance(holder, dict) else items)

    def changed(self) -> str:
        """The type of the first thing that holds something else now; empty where none does."""
        for thing, holder, before in self.held:
            now = _items(holder)
            if len(now) != len(before) or not all(map(is_, now, before)):
                return type(thing).__name__
        return ""

    def restore(self) -> None:
        """Put everything back."""
        for _, holder, before in self.held:
            now = _items(holder)
            if len(now) != len(before) or not all(map(is_, now, before)):
                holder.clear()
                if isinstance(holder, dict):
                    holder.update(zip(before[::2], before[1::2], strict=True))
                elif isinstance(holder, set):
                    holder.update(before)
                else:
                    holder.extend(before)


def _items(holder: Any) -> list[Any]:
    """What a container holds, in order; of a dict keys and values in turn."""
    if isinstance(holder, dict):
        return [part for item in dict.items(holder) for part in item]
    return list(holder)
