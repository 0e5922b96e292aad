"""One number per storage, for as long as a reference (weak or not) to it is held; and how many hold it.

Private: ``UntypedStorage._cdata``, ``torch._C._storage_Use_Count``. ``data_ptr()`` is 0 for every empty and every meta storage.
"""

from __future__ import annotations

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
