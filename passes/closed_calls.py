"""Calls of modules that stay calls: those with hooks, those that read data, those that write what no graph repeats.

Comes in: a frame that stays closed. Goes out: ``ClosedCalls``, a layer of the lifter that makes one module call of it, with all that the
module does at the next call left to the module; what the graph would have to know beforehand (whether it hands back the very tensor that
it was given, a number that Python goes on with, who else reads memory that it passed on) is refused.
"""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
import torch.fx

from fxfuse.functional import op_of
from fxfuse.private.module_hooks import has_hooks
from fxfuse.private.pytree import tree_unflatten
from fxfuse.recording.assigned import assigned_in
from fxfuse.recording.sizes import SizeOf, SizeOp
from fxfuse.recording.trace import Event, Frame, Ref, Trace

from .lifted import Refused, Sizes
from .returned import Returned
from .updates import writes

GETITEM = op_of(operator.getitem, "item")


class ClosedCalls(Returned):
    """Makes them."""

    def __init__(self, trace: Trace, frame: Frame, sizes: Sizes, opaque: frozenset[int]) -> None:
        super().__init__(trace, frame, sizes, opaque)
        self.passed_on: dict[int, str] = {}  # storages of which a closed call gave a view -> the module

    def _opaque_call(self, event: Event, index: int) -> int | None:
        """Where ``event`` belongs to a frame that stays closed: one module call for all of it, and the index after it."""
        outermost = self._closed(event.frame)
        if outermost < 0:
            return None
        called = self.trace.frames[outermost]
        self.place, self.path, self.at = called.place, called.path, called.parent
        prefix = f"{self.frame.path}." if self.frame.path else ""
        args, kwargs = tree_unflatten([self._argument(leaf) for leaf in called.leaves], called.in_spec)
        self._note_memory(called)
        self._check_results(called)
        node = self.graph.call_module(called.path[len(prefix) :] if prefix else called.path, tuple(args), dict(kwargs))
        node.meta.update(place=called.place, path=called.path, shape=None, dyn=frozenset())
        structure = tree_unflatten(list(range(len(called.out))), called.out_spec)
        made = [leaf for leaf in called.out if isinstance(leaf, Ref) and leaf.value not in self.env]
        self._bind_outputs(node, structure, called.out)
        for leaf in made if called.untracked else ():
            self.env[leaf.value] = self._call(torch.Tensor.detach, (self.env[leaf.value],), {}, leaf)
        return called.end

    def _note_memory(self, called: Frame) -> None:
        """What the call writes or assigns, and what memory it passes on."""
        values = self.trace.values
        written = {values[v].storage for e in self.trace.events[called.start : called.end] for v in writes(e)}
        assigned = {values[each.before].storage for each in assigned_in(self.trace, called)}
        self.changed_inside.update((storage, called.path) for storage in written | assigned)
        given = {values[leaf.value].storage for leaf in called.leaves if isinstance(leaf, Ref)}
        if written & given:
            raise Refused(f"{called.path or 'the model'} writes into a tensor that it was given", called.place)
        out = Counter(values[leaf.value].storage for leaf in dict.fromkeys(leaf for leaf in called.out if isinstance(leaf, Ref)))
        self.passed_on.update((storage, called.path) for storage, number in out.items() if number > 1 or storage in given)

    def _check_results(self, called: Frame) -> None:
        """Refuses what was a tensor of before, or a number, where the next call may give another.

        A module that only writes (a buffer of its own) gives the same at every call.
        """
        inside = self.trace.events[called.start : called.end]
        if not has_hooks(called.module) and called.poison.startswith("changes ") and not any(event.poison for event in inside):
            return
        for leaf in called.out:
            if isinstance(leaf, Ref) and leaf.value in self.env:
                raise Refused(f"{called.path or 'the model'}, a call of its own, hands back what it was given", called.place)
            if isinstance(leaf, (bool, int, float, complex, SizeOf, SizeOp)):
                raise Refused(f"{called.path or 'the model'}, a call of its own, gives a number that Python goes on with", called.place)

    def _check_empty_calls(self) -> None:
        """Refuses closed calls in which nothing was recorded: there is no step at whose place they could stay."""
        pending = list(self.frame.children)
        while pending:
            called = self.trace.frames[pending.pop(0)]
            if called.index not in self.opaque:
                pending += called.children
            elif called.start == called.end:
                raise Refused(f"{called.path}, a call of its own, runs no torch call that would say when", called.place)

    def _check_passed_on(self, event: Event) -> None:
        """Refuses a write into memory of which a closed call gave a view: who else reads it is not known."""
        for value in writes(event):
            module = self.passed_on.get(self.trace.values[value].storage)
            if module is not None:
                said = f"{event.func.__name__} writes into memory that {module or 'the model'}, a call of its own, passed on"
                raise Refused(said, event.place)

    def _bind_outputs(self, node: torch.fx.Node, structure: Any, leaves: list[Any]) -> None:
        if isinstance(structure, int):
            leaf = leaves[structure]
            if isinstance(leaf, Ref) and leaf.value not in self.env:
                self._describe(node, leaf.value)
                self.env[leaf.value] = node
        elif isinstance(structure, (tuple, list)):
            for position, part in enumerate(structure):
                self._bind_outputs(self._node(GETITEM, (node, position), None), part, leaves)
        elif isinstance(structure, dict):
            for key, part in structure.items():
                self._bind_outputs(self._node(GETITEM, (node, key), None), part, leaves)
        elif structure is not None:
            raise Refused(f"{self.path} returns a {type(structure).__name__}", self.place)
