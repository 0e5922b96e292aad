"""Which random numbers have a part in what a call gives.

Comes in: a run of a model, under ``FollowedDraws`` in the place of ``Derandomized``. Goes out: how many of the numbers that it drew reach
its results, or decided a branch. Two models that draw different amounts are equal all the same where the difference is thrown away.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fxfuse.models.determinism import Derandomized
from fxfuse.private.pytree import tree_leaves
from fxfuse.private.schemas import schema_of
from fxfuse.private.storages import storage_key


class FollowedDraws(Derandomized):  # type: ignore[no-untyped-call]
    """Derandomized, and each draw followed from op to op, by storage: whatever shares memory with a result counts as it.

    >>> with FollowedDraws() as random:
    ...     kept, thrown_away = torch.rand(3) * 2, torch.rand(5)
    >>> random.drawn, random.reaching([kept])
    (8, 3)
    """

    def __init__(self) -> None:
        super().__init__()
        self._sizes: list[int] = []  # numbers of each draw
        self._marks: dict[int, int] = {}  # of a storage: the draws that reached it, one bit each
        self._read = 0  # the draws that Python has looked at
        self._held: list[Any] = []  # so that no address is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        marks = 0
        for tensor in given:
            marks |= self._marks.get(self._key(tensor), 0)
        fresh = self.drawn - sum(self._sizes)
        if fresh:
            marks |= 1 << len(self._sizes)
            self._sizes.append(fresh)
        if marks:
            results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
            if not results:
                self._read |= marks
            written = given if any(a.alias_info is not None and a.alias_info.is_write for a in schema_of(func).arguments) else []
            for tensor in [*results, *written]:
                key = self._key(tensor)
                self._marks[key] = self._marks.get(key, 0) | marks
        return out

    def reaching(self, results: Iterable[Tensor]) -> int:
        """How many of the numbers drawn are in these tensors, or were read."""
        marks = self._read
        for tensor in results:
            marks |= self._marks.get(self._key(tensor), 0)
        return sum(size for number, size in enumerate(self._sizes) if marks >> number & 1)

    def _key(self, tensor: Tensor) -> int:
        held: Any = tensor.untyped_storage() if tensor.layout is torch.strided else tensor
        key = id(tensor) if held is tensor else storage_key(held)
        if key not in self._marks:
            self._held.append(held)
            self._marks[key] = 0
        return key
