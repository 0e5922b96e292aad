"""Packs whose members stay Parameters: the pack's gradient becomes theirs in parts, whose memory must be nobody else's.

Comes in: a packed tensor. Goes out: the same, with a gradient of its own.
"""

from __future__ import annotations

from torch import Tensor

from fxfuse.private.storages import own_memory


def in_own_parts(packed: Tensor) -> Tensor:
    """The pack, whose gradient becomes its members' in parts: these keep the memory, which must be nobody else's. Two packs that are added
    have one gradient, and a pack that is returned has its caller's.
    """
    if packed.requires_grad:
        packed.register_hook(own_memory)  # type: ignore[no-untyped-call]
    return packed


def in_rows(packed: Tensor) -> Tensor:
    """The pack, whose gradient is put in rows as a whole before it is taken apart: autograd would copy each part into its member's order.

    >>> import torch
    >>> members = [torch.zeros(2, 3, requires_grad=True) for _ in range(2)]
    >>> in_rows(torch.stack(members)).transpose(1, 2).backward(torch.ones(2, 3, 2))
    >>> members[0].grad.untyped_storage().data_ptr() == members[1].grad.untyped_storage().data_ptr()
    True
    """
    if packed.requires_grad:
        packed.register_hook(_rows)  # type: ignore[no-untyped-call]
    return packed


def _rows(gradient: Tensor) -> Tensor:
    """Contiguous, with the strides of rows in dims of size 1, too: DDP compares those with its buckets'."""
    return gradient.reshape(-1).view(gradient.shape)


def with_own_gradient(packed: Tensor) -> Tensor:
    """A pack with a gradient of its own where it is traced: times one, whose backward makes a tensor. Inductor takes out what is known as a
    copy, also where two of its results are one then.

    >>> import torch
    >>> first, second = (torch.zeros(2, requires_grad=True) for _ in range(2))
    >>> sum(with_own_gradient(torch.stack([one])) for one in (first, second)).sum().backward()
    >>> first.grad.data_ptr() == second.grad.data_ptr()
    False
    """
    return packed * 1
