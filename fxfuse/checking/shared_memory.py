"""Which of several tensors lie in the same memory: who writes into one of them changes the others.

Comes in: tensors by name. Goes out: for each that shares memory with one before it, the first such one's name.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxfuse.private.storages import storage_key


def sharing(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name to name of the first tensor in the same memory. Parts of one storage that do not meet share nothing.

    Interleaved parts (two columns of one table) count as shared: what lies between the first and the last element is looked at.

    >>> x = torch.zeros(4, 3)
    >>> sharing({"x": x, "copy": x.clone(), "top": x[:2], "bottom": x[2:]})
    {'top': 'x', 'bottom': 'x'}
    >>> sharing({"top": x[:2], "bottom": x[2:]})
    {}
    """
    order = {name: number for number, name in enumerate(tensors)}
    spans: dict[int, list[tuple[int, int, str]]] = {}
    for name, tensor in tensors.items():
        if tensor.layout is torch.strided and tensor.numel():
            extent = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
            start = int(tensor.storage_offset()) * tensor.element_size()
            spans.setdefault(storage_key(tensor.untyped_storage()), []).append((start, start + int(extent) * tensor.element_size(), name))
    found: dict[str, str] = {}
    for each in spans.values():
        group: list[str] = []
        until = 0
        for start, end, name in [*sorted(each), (1 << 62, 0, "")]:
            if start >= until:  # all before lie apart from this one
                first = min(group, key=order.__getitem__, default="")
                found.update((other, first) for other in group if other != first)
                group = []
            group.append(name)
            until = max(until, end)
    return dict(sorted(found.items(), key=lambda pair: order[pair[0]]))
