"""Packs of which each process holds its own lanes: DTensors, ``Shard(0)`` over the lanes' dim of a device mesh.

Comes in: packed tensors, plain or DTensors. Goes out: the whole of one, on every process (``whole``), and ``LocalPack``, where a
program finds the lanes of its process. Works for DTensors of FSDP2 too.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from fxfuse.models.sharded import is_sharded, shared_as

from .in_step import about_to
from .traffic import moved

_thread = threading.local()


@contextmanager
def gathered_once() -> Iterator[None]:
    """Within, on this thread, each DTensor is gathered once, however many lanes are read. What is written into lanes meanwhile (running
    statistics) is afterwards in the DTensor."""
    outer: dict[Any, tuple[Tensor, Tensor]] | None = getattr(_thread, "wholes", None)
    wholes = _thread.wholes = {} if outer is None else outer
    try:
        yield
    finally:
        _thread.wholes = outer
        if outer is None:
            for tensor, full in wholes.values():
                _write_back(cast(Any, tensor), full)


def _write_back(tensor: Any, full: Tensor) -> None:
    with torch.no_grad():
        here, there = tensor.to_local(), cast(Any, shared_as(full, tensor)).to_local()
        if not torch.equal(here, there):
            here.copy_(there)


def whole(tensor: Tensor) -> Tensor:
    """All lanes of a pack, on every process, differentiable: all processes have to ask. A plain tensor is whole."""
    if not is_sharded(tensor):
        return tensor
    known: dict[Any, tuple[Tensor, Tensor]] | None = getattr(_thread, "wholes", None)
    key = (id(tensor), tensor.requires_grad and torch.is_grad_enabled())
    if known is not None and key in known:
        return known[key][1]
    about_to(f"weights {tensor.dtype} {tuple(tensor.shape)}")
    full: Tensor = cast(Any, tensor).full_tensor()
    moved("weights", full)
    if known is not None:
        known[key] = (tensor, full)  # keeps the tensor, and so its id, alive
    return full


class LocalPack:
    """Where a program finds this process's lanes of a packed tensor: ``tensor``, differentiable."""

    def __init__(self, owner: nn.Module, store: str, name: str) -> None:
        self.owner, self.store, self.name = owner, store, name

    @property
    def tensor(self) -> Tensor:
        """The lanes that lie here."""
        held = getattr(self.owner, self.store)[self.name]
        local: Tensor = held.to_local() if is_sharded(held) else held
        return local
