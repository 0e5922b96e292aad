"""Tensors joined by ``torch.stack`` or ``torch.cat`` where the result lies in memory already: autograd's own record, and no copy.

Private: ``torch.utils._python_dispatch.TorchDispatchMode``, and how it is put on the stack of modes. Below autograd the join is answered
with a tensor that is given, so that its backward is that of the op, in C++, which takes half the time of an ``autograd.Function`` with
hundreds of inputs. It is pushed by itself: what ``with`` notes besides, for other modes, takes 2 us of 11.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode

_JOINS = (torch.ops.aten.stack.default, torch.ops.aten.cat.default)


class _Known(TorchDispatchMode):
    """Answers a join with ``result``."""

    def __init__(self, result: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.result = result

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.result if func in _JOINS else func(*args, **(kwargs or {}))


def joined(join: Callable[..., Any], tensors: Sequence[Tensor], memory: Tensor) -> Tensor:
    """``join(tensors)``, of which ``memory`` holds the numbers; differentiable. ``join`` is ``torch.stack`` or ``torch.cat``, along dim 0.

    >>> memory = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> parts = [memory[0].clone().requires_grad_(), memory[1].clone().requires_grad_()]
    >>> result = joined(torch.stack, parts, memory)
    >>> result.data_ptr() == memory.data_ptr(), (result * result).sum().backward(), parts[1].grad
    (True, None, tensor([6., 8.]))
    """
    _push_mode(_Known(memory.detach()))
    try:
        result: Tensor = join(tensors)
    finally:
        _pop_mode()
    return result
