"""Hold two recorded runs against each other.

Comes in: two traces of one model, on other sizes or other data, and a frame of each. Goes out: the first place where they
differ (``Mismatch``), or the dims whose size differs between the runs (``dynamic``): those are free in the rewritten graph, all
others are fixed by a guard. A region is rewritten only from what two runs agree on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .graph import Place
from .sizes import SizeOf, SizeOp
from .trace import Event, Frame, Ref, Trace


@dataclass(frozen=True)
class Mismatch:
    """The first difference between two runs, as a sentence, and the event of the first run at which it shows."""

    reason: str
    place: Place | None
    event: int


class _Different(Exception):
    pass


class Unifier:
    """Compares frame ``first`` of one trace with frame ``second`` of another; ``values`` maps value numbers of the one to the other's."""

    def __init__(self, one: Trace, other: Trace) -> None:
        self.one, self.other = one, other
        self.values: dict[int, int] = {}

    def compare(self, first: Frame, second: Frame) -> Mismatch | None:
        """None where both frames did the same, else the first difference."""
        try:
            self.same(first.leaves, second.leaves)
        except _Different:
            return Mismatch("its inputs differ in structure between two runs", first.place, first.start)
        for left, right in zip(range(first.start, first.end), range(second.start, second.end), strict=False):
            a, b = self.one.events[left], self.other.events[right]
            reason = self.event(a, b)
            if reason:
                return Mismatch(reason, a.place, left)
        if first.end - first.start != second.end - second.start:
            shorter = min(first.end - first.start, second.end - second.start)
            index = min(first.start + shorter, first.end - 1)
            place = self.one.events[index].place if first.end > first.start else first.place
            return Mismatch("the number of operations differs between two runs", place, index)
        try:
            self.same(first.out, second.out)
        except _Different:
            return Mismatch("its outputs differ in structure between two runs", first.place, first.end - 1)
        return None

    def event(self, a: Event, b: Event) -> str:
        if a.func is not b.func and getattr(a.func, "__name__", 0) != getattr(b.func, "__name__", 1):
            return f"one run calls {a.func.__name__}, another {b.func.__name__}"
        try:
            self.same(a.args, b.args)
            self.same(a.kwargs, b.kwargs)
            self.same(a.out, b.out)
            self.same([Ref(v) for v in a.mutated], [Ref(v) for v in b.mutated])
        except _Different as difference:
            return f"{a.func.__name__} is called with other arguments in two runs{difference}"
        return ""

    def value(self, a: int, b: int) -> None:
        if a in self.values:
            if self.values[a] != b:
                raise _Different
            return
        left, right = self.one.values[a], self.other.values[b]
        if left.origin != right.origin and {left.origin, right.origin} != {"made", "input"}:
            raise _Different
        if left.origin == "attribute" and left.name != right.name:
            raise _Different(f": {left.name} against {right.name}")
        if left.origin == "constant" and left.tensor is not right.tensor:
            raise _Different(": a tensor made where recording cannot see it (nn.Parameter(...), from_numpy, ...)")
        if len(left.shape) != len(right.shape) or left.tensor.dtype != right.tensor.dtype:
            raise _Different(": tensors of another rank or dtype")
        self.values[a] = b

    def same(self, a: Any, b: Any) -> None:
        if isinstance(a, Ref) and isinstance(b, Ref):
            self.value(a.value, b.value)
        elif isinstance(a, SizeOf) and isinstance(b, SizeOf):
            self.value(a.value, b.value)
            if a.dim != b.dim:
                raise _Different
        elif isinstance(a, SizeOp) and isinstance(b, SizeOp):
            if a.op != b.op:
                raise _Different
            self.same(a.args, b.args)
        elif isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
            if len(a) != len(b):
                raise _Different(f": {len(a)} values against {len(b)}")
            for left, right in zip(a, b, strict=True):
                self.same(left, right)
        elif isinstance(a, dict) and isinstance(b, dict):
            if a.keys() != b.keys():
                raise _Different
            for key in a:
                self.same(a[key], b[key])
        elif isinstance(a, slice) and isinstance(b, slice):
            self.same((a.start, a.stop, a.step), (b.start, b.stop, b.step))
        elif a is not b:
            self.plain(a, b)

    @staticmethod
    def plain(a: Any, b: Any) -> None:
        if type(a) is not type(b):
            raise _Different(f": {a!r} against {b!r}"[:80])
        if isinstance(a, (torch.Generator, torch.device)) and a == b:
            return
        try:
            equal = bool(a == b)
        except Exception:  # numpy arrays and other foreign objects: only identity counts
            equal = False
        if not equal and not (isinstance(a, float) and a != a and b != b):
            raise _Different(f": {a!r} against {b!r}"[:80])

    def dynamic(self) -> dict[int, frozenset[int]]:
        """For each value of the first trace, the dims whose size differs between the runs."""
        found: dict[int, frozenset[int]] = {}
        for a, b in self.values.items():
            left, right = self.one.values[a].shape, self.other.values[b].shape
            if left != right:
                found[a] = frozenset(dim for dim in range(len(left)) if left[dim] != right[dim])
        return found
