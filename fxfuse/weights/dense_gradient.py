"""Views that are looked up with ``sparse=True``: the loop of such lanes reads its tables as parts of a pack.

Comes in: a view. Goes out: the same view, whose gradient is dense before it becomes part of the pack's: autograd's views take no
sparse one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def dense_gradient(view: Tensor) -> Tensor:
    """The view; a sparse gradient of it goes on as a dense one.

    >>> pack = torch.zeros(2, 3, 4, requires_grad=True)
    >>> rows = torch.nn.functional.embedding(torch.tensor([2]), dense_gradient(pack[1]), sparse=True)
    >>> rows.sum().backward()
    >>> pack.grad[1].sum(1)
    tensor([0., 0., 4.])
    """
    if not view.requires_grad or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return view
    return _Dense.apply(view)  # type: ignore[no-any-return, no-untyped-call]


class _Dense(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(view: Tensor) -> Tensor:
        return view.view_as(view)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].to_dense() if grads[0].is_sparse else grads[0]
