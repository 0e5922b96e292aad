"""One number per storage, for as long as a reference (weak or not) to it is held.

Private: ``UntypedStorage._cdata``. ``data_ptr()`` is 0 for every empty and every meta storage.
"""

from __future__ import annotations

import torch


def storage_key(storage: torch.UntypedStorage) -> int:
    """The address of the storage object itself, which all tensors and views on it share."""
    return int(storage._cdata)
