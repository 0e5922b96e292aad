"""Hold two recorded runs against each other.

Comes in: two traces of one model, on other sizes or other data, and a frame of each. Goes out: the first place where they
differ (``Mismatch``), or the dims whose size differs between the runs (``dynamic``): those are free in the rewritten graph, all
others are fixed by a guard. A region is rewritten only from what two runs agree on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fxfuse.graph import Place
from fxfuse.private.transforms import of_a_transform

from .assigned import assigned_in
from .attributes import touches_in
from .sizes import SizeOf, SizeOp
from .trace import MOST_NUMBERS, Event, Frame, Ref, Trace


@dataclass(frozen=True)
class Mismatch:
    """The first difference between two runs, as a sentence, and the event of the first run at which it shows."""

    reason: str
    place: Place | None
    event: int


class _Different(Exception):
    pass


def _both_empty(one: torch.Tensor, other: torch.Tensor) -> bool:
    """``torch.Tensor()``, from which a ``cat`` grows: wherever they were made, there is nothing in them to differ."""
    return not one.numel() and one.shape == other.shape and not one.requires_grad and not other.requires_grad


def _same_numbers(one: torch.Tensor, other: torch.Tensor) -> bool:
    """``torch.FloatTensor([0.5])``, made anew in every run: as good as the numbers in it, where these do not change."""
    if type(one) is not torch.Tensor or type(other) is not torch.Tensor or one.numel() > MOST_NUMBERS or one.requires_grad:
        return False
    if of_a_transform(one) or of_a_transform(other):
        return False
    plain = one.layout is torch.strided and one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
    return plain and not one.is_complex() and torch.equal(one, other)


class Unifier:
    """Compares frame ``first`` of one trace with frame ``second`` of another; ``values`` maps value numbers of the one to the other's."""

    def __init__(self, one: Trace, other: Trace) -> None:
        self.one, self.other = one, other
        self.values: dict[int, int] = {}
        self.taken: dict[int, int] = {}  # the way back: two tensors of one run are never one tensor of the other

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
        return self.attributes(first, second)

    def attributes(self, first: Frame, second: Frame) -> Mismatch | None:
        """What both frames set on modules, and read of it."""
        ours, theirs = touches_in(self.one, first), touches_in(self.other, second)
        if [(t.key, t.write) for t in ours] != [(t.key, t.write) for t in theirs]:
            return Mismatch("it sets or reads other attributes in two runs", first.place, first.end - 1)
        for a, b in zip(ours, theirs, strict=True):
            try:
                self.same([a.leaves, a.frame - first.index], [b.leaves, b.frame - second.index])
                if a.spec != b.spec:
                    raise _Different
            except _Different as difference:
                return Mismatch(f"it sets self.{a.name} to another value in two runs{difference}", a.place, min(a.event, first.end - 1))
        return self.buffers(first, second)

    def buffers(self, first: Frame, second: Frame) -> Mismatch | None:
        """What both frames assign to registered buffers."""
        ours, theirs = assigned_in(self.one, first), assigned_in(self.other, second)
        for a, b in zip(ours, theirs, strict=False):
            try:
                if a.key != b.key:
                    raise _Different
                self.same([Ref(a.before), Ref(a.value), a.frame - first.index], [Ref(b.before), Ref(b.value), b.frame - second.index])
            except _Different as difference:
                return Mismatch(f"it sets self.{a.name} to another value in two runs{difference}", a.place, min(a.event, first.end - 1))
        if len(ours) != len(theirs):
            place = ours[len(theirs)].place if len(ours) > len(theirs) else first.place
            return Mismatch("it sets other buffers in two runs", place, first.end - 1)
        return None

    def event(self, a: Event, b: Event) -> str:
        if a.func is not b.func and getattr(a.func, "__name__", 0) != getattr(b.func, "__name__", 1):
            return f"one run calls {a.func.__name__}, another {b.func.__name__}"
        try:
            self.same(a.args, b.args)
            if a.kwargs or b.kwargs:
                self.same(a.kwargs, b.kwargs)
            self.same(a.out, b.out)
            if a.mutated or b.mutated:
                self.same([Ref(v) for v in a.mutated], [Ref(v) for v in b.mutated])
        except _Different as difference:
            return f"{a.func.__name__} is called with other arguments in two runs{difference}"
        return ""

    def value(self, a: int, b: int) -> None:
        """Value ``a`` of the one run is value ``b`` of the other, here as everywhere."""
        known = self.values.get(a)
        if known is not None:
            if known != b:
                raise _Different
            return
        left, right = self.one.values[a], self.other.values[b]
        if left.origin != right.origin and {left.origin, right.origin} != {"made", "input"}:
            raise _Different
        if left.origin == "attribute" and left.name != right.name:
            raise _Different(f": {left.name} against {right.name}")
        if left.origin == "constant" and left.tensor is not right.tensor and not _both_empty(left.tensor, right.tensor):
            if left.name:
                raise _Different(f": what {left.name}() gives depends on the data")
            if self.one.draws or self.other.draws or not _same_numbers(left.tensor, right.tensor):
                raise _Different(": a tensor made where recording cannot see it (nn.Parameter(...), from_numpy, ...)")
            left.numbers = True
        if len(left.shape) != len(right.shape) or left.tensor.dtype != right.tensor.dtype:
            raise _Different(": tensors of another rank or dtype")
        if self.taken.setdefault(b, a) != a:
            raise _Different(": two tensors in one run are one tensor in another")
        self.values[a] = b

    def same(self, a: Any, b: Any) -> None:
        kind = type(a)
        if kind is Ref and type(b) is Ref:
            if self.values.get(a.value) != b.value:
                self.value(a.value, b.value)
        elif (kind is tuple or kind is list or isinstance(a, (tuple, list))) and isinstance(b, (tuple, list)):
            if len(a) != len(b):
                raise _Different(f": {len(a)} values against {len(b)}")
            for left, right in zip(a, b, strict=True):
                self.same(left, right)
        elif isinstance(a, slice) and isinstance(b, slice):
            self.same((a.start, a.stop, a.step), (b.start, b.stop, b.step))
        elif isinstance(a, dict) and isinstance(b, dict):
            if a.keys() != b.keys():
                raise _Different
            for key in a:
                self.same(a[key], b[key])
        elif isinstance(a, SizeOf) and isinstance(b, SizeOf):
            self.value(a.value, b.value)
            if a.dim != b.dim:
                raise _Different
        elif isinstance(a, SizeOp) and isinstance(b, SizeOp):
            if a.op != b.op:
                raise _Different
            self.same(a.args, b.args)
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
        """For each value of the first trace, the dims whose size differs between the runs.

        Values of one row learn on the way in what order their dims lie in memory.
        """
        found: dict[int, frozenset[int]] = {}
        ones, others = self.one.values, self.other.values
        for a, b in self.values.items():
            left, right = ones[a].shape, others[b].shape
            if left != right:
                found[a] = frozenset([dim for dim in range(len(left)) if left[dim] != right[dim]])
                if any(left[dim] == 1 for dim in found[a]):
                    stride = others[b].stride
                    ones[a].more = (right, stride) if stride is not None else None
        return found


def interchangeable(one: Trace, other: Trace) -> Unifier | None:
    """How the runs correspond, where all that can be concluded from the one holds for the other; None where not.

    For runs in two modes of a model (train and eval). More than the steps must agree: every module call with its arguments and
    results, what keeps a call out of a graph (grad mode, data read by Python), and every comparison of sizes that becomes a guard.
    """
    if one.failure or other.failure or not one.frames or len(one.frames) != len(other.frames) or (one.reads_dtype, one.moves) != (
        other.reads_dtype,
        other.moves,
    ):
        return None
    unifier = Unifier(one, other)
    if unifier.compare(one.frames[0], other.frames[0]) is not None or len(one.comparisons) != len(other.comparisons):
        return None
    if any(a.poison != b.poison or a.frame != b.frame for a, b in zip(one.events, other.events, strict=True)):
        return None
    try:
        for a, b in zip(one.frames, other.frames, strict=True):
            if (a.path, a.parent, a.start, a.end, a.poison) != (b.path, b.parent, b.start, b.end, b.poison):
                return None
            if (a.in_spec is not b.in_spec and a.in_spec != b.in_spec) or (a.out_spec is not b.out_spec and a.out_spec != b.out_spec):
                return None
            unifier.same(a.leaves, b.leaves)
            unifier.same(a.out, b.out)
        for (c, at, _), (d, there, _) in zip(one.comparisons, other.comparisons, strict=True):
            if (c.op, c.result, at) != (d.op, d.result, there):
                return None
            unifier.same((c.left, c.right), (d.left, d.right))
    except _Different:
        return None
    return unifier
