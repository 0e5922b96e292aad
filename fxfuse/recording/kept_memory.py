"""What a recorded run may not change, although it writes there.

Comes in: a run's inputs, and the modules that share tensors with the user's model. Goes out: ``KeptMemory``: their values from before the
first write, to be put back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class KeptMemory:
    """What the run may not change although it writes there: the inputs, and tensors that the model shares with the user's model."""

    def __init__(self, inputs: list[Tensor], watched: list[Any]) -> None:
        self.inputs, self.watched = inputs, watched
        self.by_storage: dict[int, list[Tensor]] | None = None
        self.saved: list[tuple[Tensor, Tensor, Tensor, bool]] = []
        self.grads: list[tuple[Tensor, Tensor | None, Tensor | None]] = []

    def _tensors(self) -> list[Tensor]:
        held = [tensor for each in self.watched for store in (each.values.get("_parameters", {}), each.values) for tensor in store.values()]
        return list({id(tensor): tensor for tensor in (*self.inputs, *held) if isinstance(tensor, Tensor)}.values())

    def before_write(self, storage: int) -> None:
        """Keep what lies in this storage."""
        if self.by_storage is None:
            self.by_storage = {}
            for tensor in self._tensors():
                if tensor.layout is torch.strided:
                    self.by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
        for tensor in self.by_storage.pop(storage, ()):
            self.saved.append((tensor, tensor.data, _once(tensor.data).clone(), tensor.requires_grad))

    def before_backward(self) -> None:
        """Keep all gradients."""
        if not self.grads:
            for tensor in self._tensors():
                if tensor.is_leaf:
                    self.grads.append((tensor, tensor.grad, None if tensor.grad is None else tensor.grad.clone()))

    def restore(self) -> None:
        with torch.no_grad():
            for tensor, data, values, requires_grad in self.saved:
                _once(data).copy_(values)
                if tensor.data_ptr() != data.data_ptr() or tensor.shape != data.shape or tensor.stride() != data.stride():
                    tensor.data = data
                if tensor.requires_grad is not requires_grad and tensor.is_leaf:
                    tensor.requires_grad_(requires_grad)
            for tensor, grad, before in self.grads:
                if grad is not None and before is not None:
                    grad.copy_(before)
                tensor.grad = grad


def _once(tensor: Tensor) -> Tensor:
    """Each number of an expanded tensor once."""
    for dim, (size, step) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if step == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor
