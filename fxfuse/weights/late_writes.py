"""Writes to members of a pack between forward and backward, which autograd finds by a version counter: of them as of Parameters apart.

Comes in: a buffer, the members that lie in it, and what a call on it gave. Goes out: before a backward from there takes what was saved of
the buffer, its counter has moved if a member's has. Each member has a counter of its own: ``.data =`` leaves it that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxfuse.private.compiled_backward import before_it_is_taken
from fxfuse.private.versions import version


class Writes:
    """How often the members of a buffer were written, as far as its own counter tells.

    >>> buffer = torch.zeros(2, 3)
    >>> members = [buffer[0].data, buffer[1].data]
    >>> writes, before = Writes(buffer, members), version(buffer)
    >>> _ = members[1].fill_(2)
    >>> version(buffer) == before, writes.note(members), version(buffer) > before
    (True, None, True)
    """

    def __init__(self, buffer: Tensor, members: Sequence[Tensor]) -> None:
        self.buffer = buffer
        self.versions = [*map(version, members)]

    def note(self, members: Sequence[Tensor]) -> None:
        """Count writes to the members as writes to the buffer."""
        now = [*map(version, members)]
        if now != self.versions:
            self.versions = now
            with torch.no_grad():
                self.buffer.view(-1)[:0].zero_()


class LateWrites:
    """A hook of what a call gave, that notes the writes since."""

    def __init__(self, watched: list[tuple[Writes, Sequence[Tensor]]]) -> None:
        self.watched = watched

    def __call__(self, gradients: Any = None) -> None:
        if torch.compiler.is_compiling():  # compiled autograd, by now, has taken what was saved: it was called before that
            return
        self.note()

    def note(self) -> None:
        """Before anything saved is taken."""
        for writes, members in self.watched:
            writes.note(members)


def watch(results: Iterable[Any], watched: list[tuple[Writes, Sequence[Tensor]]]) -> None:
    """Note writes to the members when a backward from one of the results begins."""
    late = LateWrites(watched)
    for node in {o.grad_fn for o in results if isinstance(o, Tensor) and o.grad_fn is not None}:
        node.register_prehook(late)
        before_it_is_taken(node, late.note)
