"""Are these tensors alike those? In one call for all of them, which takes a tenth of a microsecond each; in Python it is half of one.

Private: ``torch._C._dynamo.guards.TensorGuards``, which dynamo asks at every call of a compiled model. It takes no import of dynamo.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch._C._dynamo.guards import TensorGuards


def never(*tensors: Any) -> bool:
    """Stands for a question that nobody has asked yet."""
    return False


def alike(tensors: Sequence[Any], strides: bool = False) -> Callable[..., bool]:
    """A function that is true of tensors of the same types, dtypes, devices, layouts, sizes and ``requires_grad``, whatever their strides;
    with ``strides``, of those of the same strides.

    It may also be false of such tensors, inside another mode of torch. ``never``, where one of ``tensors`` is no plain tensor.

    >>> import torch
    >>> same = alike([torch.zeros(2, 3), torch.zeros(4)])
    >>> same(torch.ones(2, 3), torch.ones(4)), same(torch.ones(2, 3), torch.ones(5))
    (True, False)
    >>> same = alike([torch.zeros(3, 3)], strides=True)
    >>> same(torch.ones(3, 3)), same(torch.ones(3, 3).t())
    (True, False)
    """
    if not tensors or any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors):
        return never
    guards = TensorGuards(
        *tensors,
        dynamic_dims_sizes=[list(tensor.shape) for tensor in tensors],  # type: ignore[misc]  # of each tensor
        dynamic_dims_strides=[list(tensor.stride()) if strides else [None] * tensor.dim() for tensor in tensors],  # type: ignore[misc]
    )
    check: Callable[..., bool] = guards.check
    return check
