"""The hooks that what autograd keeps goes through now: ``saved_tensors_hooks``, and with it ``save_on_cpu`` and ``checkpoint``.

Private: ``torch._C._autograd._top_saved_tensors_default_hooks``; the public context manager sets them and tells nobody.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def saved_hooks() -> Any:
    """The innermost pair of hooks, None where there is none.

    >>> pair = (lambda tensor: tensor, lambda tensor: tensor)
    >>> with torch.autograd.graph.saved_tensors_hooks(*pair):
    ...     saved_hooks() == pair
    True
    >>> saved_hooks() is None
    True
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


@contextmanager
def unseen_by_hooks() -> Iterator[None]:
    """Within, hooks that somebody else set see nothing of what autograd keeps: ``checkpoint`` counts it, ``save_on_cpu`` moves it.

    >>> seen = []
    >>> x = torch.ones(1, requires_grad=True)
    >>> with torch.autograd.graph.saved_tensors_hooks(lambda tensor: seen.append(tensor) or tensor, lambda tensor: tensor):
    ...     with unseen_by_hooks():
    ...         _ = x * x
    >>> seen
    []
    """
    if saved_hooks() is None:
        yield
    else:
        with torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            yield


def _as_it_is(tensor: Any) -> Any:
    return tensor
