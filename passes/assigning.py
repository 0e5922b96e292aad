"""Registered buffers that forward assigns: values of the graph, the last of which is written into the registered tensor at the end.

Comes in: the assignments of a trace. Goes out: ``Assigning``, a layer of the lifter. In the original the name stands for a new tensor, and
the one before keeps its numbers. So the graph hands out a copy of the registered tensor where somebody could look at it after it is
overwritten: a backward pass, whoever called the module, another buffer that is given it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from fxfuse.ops import canonical
from fxfuse.recording.assigned import assigned_in
from fxfuse.recording.attributes import touches_in
from fxfuse.recording.trace import Assignment, Frame, Key, Trace, refs_in

from .assignable import path_of, spelled, tracked_values, unfit_assignments
from .lifted import Refused, Sizes
from .updates import plain_buffer
from .updating import Updating


class Assigning(Updating):
    """Writes what buffers are assigned."""

    def __init__(self, trace: Trace, frame: Frame, sizes: Sizes, opaque: frozenset[int]) -> None:
        super().__init__(trace, frame, sizes, opaque)
        self.assigned: dict[Key, Assignment] = {}  # the last of each buffer that the region itself assigns
        self.registered: dict[int, torch.fx.Node] = {}  # by value, what the region reads as it is held
        self.overwritten: set[int] = set()  # memory that somebody could look at after it is written
        inside = assigned_in(trace, frame) if trace.assigned else []
        if inside:
            self.assigned = {each.key: each for each in inside if self._closed(each.frame) < 0}
            self._check_assignments(inside)
            self.overwritten = self._looked_at()

    def _memory(self, tree: Any) -> set[int]:
        return {self.trace.values[value].storage for value in refs_in(tree)}

    def _handed_out(self) -> set[int]:
        """The memory of results, and of attributes that are set to be looked at."""
        stored = [touch.leaves for touch in touches_in(self.trace, self.frame) if touch.leaves is not None]
        return self._memory([self.frame.out, stored])

    def _looked_at(self) -> set[int]:
        """The memory of buffers of which copies are handed out: of those assigned, and of those that may share a pack with one."""
        values, tracked = self.trace.values, tracked_values(self.trace)
        found = self._handed_out() | {values[each.value].storage for each in self.assigned.values()}
        for event in self.trace.events[self.frame.start : self.frame.end]:
            given = [*refs_in(event.args), *refs_in(event.kwargs)]
            if not event.untracked and not tracked.isdisjoint(given):
                found.update(values[value].storage for value in given)
        dtypes = {values[each.before].tensor.dtype for each in self.assigned.values()}
        alike = {v.storage for v in values if v.origin == "attribute" and plain_buffer(v.tensor) and v.tensor.dtype in dtypes}
        return found & (alike - {storage for update in self.updates.values() if update.kind != "write" for storage in update.touches})

    def _check_assignments(self, inside: list[Assignment]) -> None:
        """Refuses where what is assigned, or was there before, is looked at from where it is no value of this graph."""
        values, unfit = self.trace.values, unfit_assignments(self.trace)
        out, elsewhere = self._handed_out(), self._elsewhere()
        memory: dict[Key, set[int]] = {}
        for each in self.trace.assigned:
            memory.setdefault(each.key, set()).update((values[each.before].storage, values[each.value].storage))
        for each in inside:
            if each.key in unfit:
                raise Refused(*unfit[each.key])
            name = spelled(each, self.frame)
            if each.key not in self.assigned:
                continue
            if self.frame.path and not f"{each.path}.".startswith(f"{self.frame.path}."):
                raise Refused(f"forward assigns {path_of(each)}, which is outside", each.place)
            if self._closed(each.frame) >= 0:
                raise Refused(f"forward assigns {name} in a call that stays as it is, too", each.place)
            if self.dynamic.get(each.value):
                raise Refused(f"forward assigns {name} a tensor whose size follows the input's", each.place)
            reader = next((elsewhere[storage] for storage in memory[each.key] if storage in elsewhere), None)
            if reader is not None:
                raise Refused(f"forward assigns {name}, whose very tensor {reader or 'the model'} reads or hands on", each.place)
        for each in self.assigned.values():
            if values[each.value].storage in out:
                raise Refused(f"forward assigns {spelled(each, self.frame)} a tensor that it hands out, too", each.place)

    def _elsewhere(self) -> dict[int, str]:
        """The memory that others see than this region: calls in it that stay as they are, and what runs before and after it. By whom.

        Other calls of the same module do what this one does.
        """
        frames = self.trace.frames
        others: dict[int, bool] = {-1: True}
        for frame in frames:  # the outer ones first
            ours = frame.index == self.frame.index or (frame.path == self.frame.path and others[frame.parent])
            others[frame.index] = False if ours else others[frame.parent] or self._closed(frame.index) >= 0
        found: dict[int, str] = {}
        for frame in frames:
            if others[frame.index]:
                found.update(dict.fromkeys(self._memory([frame.out, frame.leaves]), frame.path))
        for event in self.trace.events:
            if others[event.frame]:
                found.update(dict.fromkeys(self._memory([event.args, event.kwargs]), frames[event.frame].path if event.frame >= 0 else ""))
        return found

    def _outside(self, value: int) -> torch.fx.Node:
        node = super()._outside(value)
        self.registered[value] = node
        if self.trace.values[value].origin != "attribute" or self.trace.values[value].storage not in self.overwritten:
            return node
        op, args = canonical(torch.clone, (node,), {})
        copied = self.graph.call_function(op, args)
        self._describe(copied, value)
        self.env[value] = copied
        return copied

    def _registered(self, value: int) -> Any:
        if value not in self.env:
            self._read(value)
        return self.registered.get(value, self.env[value])

    def _renew_buffers(self) -> None:
        """Also the last values of buffers that were assigned, in place of what was written into the tensors before."""
        for each in self.assigned.values():
            self.renewed.pop(each.before, None)
        super()._renew_buffers()
        for each in self.assigned.values():
            self.place, self.at, self.path = each.place, each.frame, self.trace.frames[each.frame].path
            last = self._read(each.value)
            self._renew(self._registered(each.before), last, each.value)


def assigning_calls(trace: Trace) -> frozenset[int]:
    """The calls that assign buffers themselves."""
    return frozenset(each.frame for each in trace.assigned if each.frame >= 0)
