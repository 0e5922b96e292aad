"""Models nested so deep that Python's limit of recursion is near.

Comes in: a model. Goes out: ``deeper``: a context in which the limit is as much higher as watching and copying such a model takes:
a few more frames for each module that is inside another one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

FRAMES = 16  # of copy.deepcopy, and of a watched call, per level


def depth(model: nn.Module) -> int:
    """How many modules are inside each other, at most.

    >>> depth(nn.Sequential(nn.Sequential(nn.ReLU())))
    3
    """
    deepest, pending, seen = 0, [(model, 1)], {id(model)}
    while pending:
        module, level = pending.pop()
        deepest = max(deepest, level)
        for child in module._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                pending.append((child, level + 1))
    return deepest


@contextmanager
def deeper(model: nn.Module) -> Iterator[None]:
    """Within, there are frames enough for ``model``. The limit is the whole process's, and is put back."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(before + FRAMES * depth(model))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)
