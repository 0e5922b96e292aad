"""Modules that are about to be rewritten, and the way back.

Comes in: modules before they are changed in place (``keep``), and tensors whose data will be replaced (``keep_data``). Goes out:
``restore``: class, attributes, registered tensors and children as they were, the same objects in the same order.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_CONTAINERS = (dict, OrderedDict, list, set)


class Undo:
    """What a rewrite in place has changed so far.

    >>> layer, undo = nn.Linear(2, 2), Undo()
    >>> undo.keep([layer])
    >>> layer.weight = None
    >>> undo.restore()
    >>> layer.weight.shape
    torch.Size([2, 2])
    """

    def __init__(self) -> None:
        self.kept: dict[int, tuple[nn.Module, type, dict[str, Any], list[tuple[Any, Any]]]] = {}
        self.data: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(self, modules: Iterable[nn.Module]) -> None:
        """Remember these as they are now; what is remembered already stays as it was remembered."""
        for module in modules:
            if id(module) not in self.kept:
                own = dict(module.__dict__)
                held = [(value, type(value)(value)) for value in own.values() if type(value) in _CONTAINERS]
                self.kept[id(module)] = (module, type(module), own, held)

    def keep_data(self, tensors: Iterable[Tensor]) -> None:
        """Remember where the data of these lie."""
        for tensor in tensors:
            self.data.setdefault(id(tensor), (tensor, tensor.data))

    def restore(self) -> None:
        """Put everything back, and forget it."""
        for module, cls, own, held in self.kept.values():
            object.__setattr__(module, "__class__", cls)
            module.__dict__.clear()
            module.__dict__.update(own)
            for container, before in held:
                container.clear()
                container.extend(before) if isinstance(container, list) else container.update(before)
        with torch.no_grad():
            for tensor, data in self.data.values():
                tensor.data = data
        self.kept, self.data = {}, {}
