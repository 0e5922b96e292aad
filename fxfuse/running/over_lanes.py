"""One torch function over all lanes by ``torch.vmap``: what a graph calls where no rule of our own says how to batch an op.

Comes in: the function and where each of its arguments has the lane axis. Goes out: a callable that a ``torch.fx`` graph can hold and
print, and ``fxfuse.running.serialize`` can save; its results have the lane axis in front.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class OverLanes:
    """``func`` for all lanes at once. ``in_dims`` as in ``torch.vmap``, one per argument; the last arguments go by the names ``keywords``.

    >>> OverLanes(torch.dot, (0, None))(torch.eye(2), torch.tensor([3.0, 4.0]))
    tensor([3., 4.])
    """

    def __init__(self, func: Callable[..., Any], in_dims: tuple[Any, ...], keywords: tuple[str, ...] = ()) -> None:
        self.func, self.in_dims, self.keywords = func, in_dims, keywords
        owner = getattr(func, "__self__", None)  # Tensor.H.__get__ is a method of a property
        name = getattr(owner, "__name__", "") if func.__name__ == "__get__" else func.__name__
        self.__name__ = f"{name.strip('_')}_over_lanes"

    def __call__(self, *args: Any) -> Any:
        func, keywords = self.func, self.keywords
        positional = len(args) - len(keywords)

        def lane(*own: Any) -> Any:
            return func(*own[:positional], **dict(zip(keywords, own[positional:], strict=True)))

        return torch.vmap(lane, self.in_dims)(*args)
