"""One number per storage, for as long as a reference (weak or not) to it is held; how many hold it; and whether somebody has a gradient.

Private: ``UntypedStorage._cdata``, ``torch._C._storage_Use_Count``, ``Tensor._use_count``. ``data_ptr()`` is 0 for every empty and every
meta storage.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch


def storage_key(storage: torch.UntypedStorage) -> int:
    """The address of the storage object itself, which all tensors and views on it share."""
    return int(storage._cdata)


def holders(tensor: torch.Tensor) -> int:
    """How many tensors hold the memory of ``tensor``: itself, views of it, ``tensor.detach()``, a numpy array.

    >>> x = torch.zeros(3)
    >>> before = holders(x)
    >>> view = x[1:]
    >>> before, holders(x)
    (1, 2)
    """
    return _count(tensor) - _count(torch.empty(1)) + 1


def _count(tensor: torch.Tensor) -> int:
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


def own_memory(gradient: torch.Tensor) -> torch.Tensor:
    """A hook of a tensor whose gradient is handed on in parts, each of which autograd then keeps as it is: the gradient, copied if anything
    else has it, or memory that it lies in (the caller of ``backward``, another tensor that is waiting for the same gradient).

    >>> x, given = torch.zeros(2, requires_grad=True), torch.ones(2)
    >>> whole = 1 * x
    >>> _ = whole.register_hook(own_memory)
    >>> whole.view(2).backward(given)
    >>> x.grad.data_ptr() == given.data_ptr()
    False
    """
    if gradient.layout is not torch.strided:
        return gradient
    if torch.compiler.is_compiling():  # compiled autograd: who has it is not to be seen, and a copy may be taken out of the graph
        return gradient * 1
    return gradient if _references(gradient) == _fewest() else gradient.clone()


def _references(gradient: torch.Tensor) -> tuple[int, ...]:
    """Nothing where it cannot be said, as of the tensors of ``vmap``, which have no memory."""
    if type(gradient) is not torch.Tensor or not hasattr(gradient, "_use_count"):
        return ()
    try:
        return int(gradient._use_count()), sys.getrefcount(gradient), _count(gradient)
    except RuntimeError:
        return ()


@cache
def _fewest() -> tuple[int, ...] | None:
    """What is counted in a hook, of a gradient that nobody else has."""
    found: list[tuple[int, ...]] = []

    def count(gradient: torch.Tensor) -> torch.Tensor:
        found.append(_references(gradient))
        return gradient

    with torch.inference_mode(False), torch.enable_grad():
        whole = torch.zeros(2, requires_grad=True) * 2
        whole.register_hook(count)  # type: ignore[no-untyped-call]
        (whole * 3).sum().backward()  # type: ignore[no-untyped-call]
    return found[0] or None


FRAMES: tuple[Callable[..., Any], ...] = (own_memory, _references, _count, _fewest.__wrapped__)  # what a hook runs
