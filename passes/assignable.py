"""Which registered buffers that forward assigns can be values of a graph, whose last one is written into the registered tensor at the end.

Comes in: the assignments of a trace. Goes out: ``unfit_assignments``, those that cannot, each with the reason and the line, and
``tracked_values``. What is assigned has to be a tensor like the one before, of memory of its own, without a gradient history whatever
the caller's inputs have.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.graph import Place
from fxfuse.models.module_tree import named_modules
from fxfuse.ops import op_name
from fxfuse.private.torch_function import DisableTorchFunction
from fxfuse.recording.trace import Assignment, Frame, Key, Trace, refs_in

from .updates import plain_buffer, updates_of


def path_of(assignment: Assignment) -> str:
    """The buffer's path in the model."""
    return f"{assignment.path}.{assignment.name}" if assignment.path else assignment.name


def spelled(assignment: Assignment, frame: Frame) -> str:
    """The buffer as the code of a call spells it: ``self.center``, ``self.head.center``."""
    prefix = f"{frame.path}." if frame.path else ""
    return f"self.{path_of(assignment).removeprefix(prefix)}"


def unfit_assignments(trace: Trace) -> dict[Key, tuple[str, Place | None]]:
    """The buffers whose assignments have no form in a graph, each with the reason and the line; found once."""
    if trace.unfit is None:
        trace.unfit = {}
        judge = _Judge(trace) if trace.assigned else None
        for each in trace.assigned if judge is not None else ():
            reason = judge.reason(each) if judge is not None else ""
            if reason and each.key not in trace.unfit:
                trace.unfit[each.key] = f"forward assigns {spelled(each, trace.frames[each.frame])} {reason}", each.place
    return trace.unfit


def tracked_values(trace: Trace) -> set[int]:
    """The values that have a gradient history wherever an input or a weight has one; found once."""
    if trace.tracked is None:
        trace.tracked = _tracked_values(trace)
    return trace.tracked


def _tracked_values(trace: Trace) -> set[int]:
    values = trace.values
    found = {
        index
        for index, value in enumerate(values)
        if value.tensor.requires_grad or isinstance(value.tensor, nn.Parameter) or (value.origin == "input" and _inexact(value.tensor))
    }
    sharing: dict[int, list[int]] = {}
    for event in trace.events:
        if op_name(event.func) in ("detach", "detach_") or found.isdisjoint([*refs_in(event.args), *refs_in(event.kwargs)]):
            continue
        found.update(value for value in refs_in(event.out) if _inexact(values[value].tensor))
        if event.mutated and not event.untracked:
            if not sharing:
                for index, value in enumerate(values):
                    sharing.setdefault(value.storage, []).append(index)
            for written in event.mutated:
                found.update(sharing[values[written].storage] if _inexact(values[written].tensor) else ())
    return found


def _inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


class _Judge:
    """Says what keeps the numbers of an assigned tensor from standing in for it, in words that follow "assigns self.center"."""

    def __init__(self, trace: Trace) -> None:
        self.values, self.tracked = trace.values, tracked_values(trace)
        self.held = _held_memory(trace)
        self.last = {each.key: each for each in trace.assigned}
        self.given = Counter(self.values[each.value].storage for each in self.last.values())
        self.replaced = {self.values[each.before].storage for each in self.last.values()}
        self.inputs = {value.storage for value in self.values if value.origin == "input"}
        updates = updates_of(trace).values()
        self.updated = {storage for update in updates if update.kind != "write" for storage in update.touches}

    def reason(self, each: Assignment) -> str:
        """Empty where nothing does."""
        with DisableTorchFunction():
            return self._of_tensors(self.values[each.before].tensor, self.values[each.value].tensor) or self._of_memory(each)

    @staticmethod
    def _of_tensors(old: Tensor, new: Tensor) -> str:
        for fact in ("shape", "dtype", "device", "layout"):
            was, now = getattr(old, fact), getattr(new, fact)
            if was != now:
                return f"a tensor of {fact} {_short(now)}, which was {_short(was)}"
        if type(new) is not Tensor or not plain_buffer(old):
            return "what is no plain tensor, or was none"
        if new.requires_grad:
            return "a tensor with a gradient history; with detach(), or under no_grad, it has none"
        if _steps(old) != _steps(new):
            return f"a tensor of strides {new.stride()}, which had {old.stride()}"
        return ""

    def _of_memory(self, each: Assignment) -> str:
        old, new = self.values[each.before], self.values[each.value]
        if each.value in self.tracked:
            return "a tensor with a gradient history where the input or a weight has one; with detach(), or under no_grad, it has none"
        others = [name for name in self.held.get(old.storage, []) if name != path_of(each)]
        if others:
            return f"another tensor, and the one before shares its memory with {others[0]}"
        if new.storage in self.inputs:
            return "an input, or a view of one"
        if new.storage in self.held and new.storage not in self.replaced:
            return f"what shares its memory with {self.held[new.storage][0]}"
        if new.origin == "constant":
            return "a tensor made where recording cannot see it (nn.Buffer(...), from_numpy, ...)"
        if self.last[each.key] is each and self.given[new.storage] > 1:
            return "a tensor that another buffer is assigned, too, or a view of it"
        if old.storage in self.updated:
            return "another tensor, and updates the one before in place"
        return ""


def _held_memory(trace: Trace) -> dict[int, list[str]]:
    """The names of all tensors that modules hold, by their memory."""
    found: dict[int, list[str]] = {}
    with DisableTorchFunction():
        for path, module in named_modules(trace.frames[0].module):
            own = vars(module)
            for store in (own.get("_parameters", {}), own.get("_buffers", {}), own):
                for name, tensor in store.items():
                    if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                        found.setdefault(tensor.untyped_storage().data_ptr(), []).append(f"{path}.{name}" if path else name)
    return found


def _short(fact: Any) -> str:
    return str(list(fact)) if isinstance(fact, torch.Size) else str(fact)


def _steps(tensor: Tensor) -> list[int]:
    return [step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
