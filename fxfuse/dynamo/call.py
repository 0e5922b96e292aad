"""A compiled graph at run time: from dynamo's inputs to those of the rewritten graph.

Comes in: what the inner backend made of the rewritten graph, and the inputs of dynamo's graph at every call. Goes out: its results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from fxfuse.private.dynamo import run_as_they_are
from fxfuse.private.storages import FRAMES
from fxfuse.weights.late_writes import LateWrites, Writes, watch
from fxfuse.weights.shared import SharedPack

from .frozen_pack import FrozenPack

Pack = SharedPack | FrozenPack


class Call:
    """``compiled`` on the inputs numbered ``kept``, the packs of the inputs numbered with each, and the constants."""

    def __init__(
        self,
        compiled: Callable[..., Any],
        kept: Sequence[int],
        packs: Sequence[tuple[Pack, Sequence[int]]],
        constants: Sequence[Tensor],
        autocast: str | None,
        writes: bool = False,
    ) -> None:
        self.compiled, self.constants = compiled, tuple(constants)
        self.kept = tuple(kept)
        self.packs = [(pack, itemgetter(*members)) for pack, members in packs]
        self.written = [index for index, (pack, _) in enumerate(packs) if writes and pack.recipe.kind == "buffer"]
        self.autocast = autocast  # the kind of device whose autocast is spelled out in the graph

    def __call__(self, *inputs: Any) -> Any:
        """The results, as dynamo's graph gives them."""
        members = [(pack, select(inputs)) for pack, select in self.packs]
        packed = [pack.packed(each) for pack, each in members]
        given = [inputs[number] for number in self.kept]
        if self.autocast is None:  # a context takes a microsecond to enter, even if it does nothing
            out = self.compiled(*given, *packed, *self.constants)
        else:
            with without_autocast(self.autocast):
                out = self.compiled(*given, *packed, *self.constants)
        for index in self.written:
            pack, each = members[index]
            pack.write_back(each, packed[index])
        if torch.is_grad_enabled():
            watched = [(bound.writes, each) for pack, each in members if (bound := pack.bound(each)) is not None]
            if watched:
                watch(out, watched)
        return out


@cache
def leave_hooks_alone() -> None:
    """In a training step that is compiled as a whole, dynamo would compile each hook as a frame of its own."""
    run_as_they_are(LateWrites.__call__, LateWrites.note, Writes.note, *FRAMES)


def without_autocast(kind: str | None) -> AbstractContextManager[Any]:
    """No autocast on this kind of device; None: as it is."""
    return nullcontext() if kind is None else torch.autocast(kind, enabled=False)
