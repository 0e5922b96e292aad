"""Collectives of a sharded model that is being tried: before each of them the processes make sure that all are about to do the same.

Comes in: the group of the processes, and what this one is about to do. Goes out: nothing, or ``OutOfStep`` on every process where one of
them failed or took another way. So a process that raises in the middle of a forward or backward does not leave the others waiting in a
collective that it never reaches. Outside of such a trial nothing is asked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fxfuse.errors import FxfuseError

_trial: list[InStep] = []


class OutOfStep(FxfuseError):
    """Another process failed, or does something else; every process raises it at the same point."""


class InStep:
    """The processes of one group, in a trial."""

    def __init__(self, group: Any, device: torch.device) -> None:
        self.group, self.device = group, device
        self.broken = False

    def meet(self, what: str) -> None:
        """Go on once all processes are about to do ``what``. Raises ``OutOfStep`` on all where one of them is not, and ever after."""
        import torch.distributed as dist  # only who trains on several processes needs it

        if not self.broken:
            mine = torch.tensor([digest_of(what)], dtype=torch.int64, device=self.device)
            found = [torch.zeros_like(mine) for _ in range(dist.get_world_size(self.group))]
            dist.all_gather(found, mine, group=self.group)
            self.broken = len({int(each) for each in found}) > 1
        if self.broken:
            raise OutOfStep("the processes do not call the same collectives in the same order, or one of them failed")

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Within, every collective of this process's sharded regions waits until all processes have come to it."""
        _trial.append(self)
        try:
            yield
        finally:
            _trial.remove(self)


def about_to(what: str) -> None:
    """Called before each collective; does nothing outside of a trial."""
    if _trial:
        _trial[-1].meet(what)


def digest_of(text: str) -> int:
    """A number that tells texts apart, in 56 bits."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
