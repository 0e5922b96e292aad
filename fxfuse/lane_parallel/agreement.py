"""All processes of a mesh come to one decision, also where one of them fails.

Comes in: what this process came to (an error, a text, its data). Goes out: the same answer on every process. Each call is a collective of
fixed size, so that a process which failed does not leave the others waiting: it says so, and all raise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fxfuse.distributed.in_step import digest_of
from fxfuse.errors import FxfuseError

_ROOM = 600  # bytes of a sentence that one process tells the others


class Processes:
    """The processes of a device mesh, of any number of dims."""

    def __init__(self, mesh: Any) -> None:
        self.device = torch.device(mesh.device_type)
        self.groups: list[dist.ProcessGroup] = [mesh.get_group(d) for d in range(mesh.ndim)]
        self.first = all(index == 0 for index in mesh.get_coordinate())

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Where the block raises on one process, all raise: that one its own error, the others what it said. No collectives in the block
        but those that all reach or none."""
        error: Exception | None = None
        try:
            yield
        except Exception as raised:  # whatever goes wrong here has to be known there
            error = raised
        said = self.failure("" if error is None else _sentence(error))
        if error is not None:
            raise error
        if said:
            raise FxfuseError(f"another process failed: {said}")

    def failure(self, said: str) -> str:
        """What the first process that has something to say says; the same on all of them, empty where none has."""
        told = torch.zeros(_ROOM + 1, dtype=torch.uint8, device=self.device)
        text = said.encode()[:_ROOM]
        if text:
            told[0] = 1
            told[1 : 1 + len(text)] = torch.tensor(list(text), dtype=torch.uint8, device=self.device)
        for group in self.groups:
            found = [torch.empty_like(told) for _ in range(dist.get_world_size(group))]
            dist.all_gather(found, told, group=group)
            told = next((each for each in found if int(each[0])), found[0])
        return bytes(told[1:].tolist()).rstrip(b"\0").decode(errors="ignore") if int(told[0]) else ""

    def alike(self, text: str) -> bool:
        """Have all processes this text? Every process gets the same answer."""
        odd = torch.tensor([0], dtype=torch.int64, device=self.device)
        digest = torch.tensor([digest_of(text)], dtype=torch.int64, device=self.device)
        for group in self.groups:
            found = [torch.zeros_like(digest) for _ in range(dist.get_world_size(group))]
            dist.all_gather(found, digest, group=group)
            odd += len({int(each) for each in found}) - 1
        for group in self.groups:
            dist.all_reduce(odd, group=group)
        return not int(odd)

    def of_first(self, make: Callable[[], bytes]) -> bytes:
        """What ``make`` gives on the first process, on all. Raises everywhere where it raises there."""
        data = b""
        with self.all_or_none():
            data = make() if self.first else b""
        size = torch.tensor([len(data)], dtype=torch.int64, device=self.device)
        self.send(size)
        content = torch.empty(int(size), dtype=torch.uint8, device=self.device)
        if self.first:
            content.copy_(torch.tensor(list(data), dtype=torch.uint8))
        self.send(content)
        return bytes(content.tolist())

    def send(self, tensor: Tensor) -> None:
        """Give ``tensor``, which is contiguous and of one shape everywhere, the values that the first process has, in place."""
        for group in self.groups:
            dist.broadcast(tensor, dist.get_global_rank(group, 0), group=group)


def _sentence(error: Exception) -> str:
    said = str(error).strip().partition("\n")[0]
    return said if isinstance(error, FxfuseError) else f"{type(error).__name__}: {said}"
