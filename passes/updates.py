"""Buffers that forward updates in a way that a graph can repeat: running statistics and counters, averages, codebooks.

Comes in: a ``Trace``. Goes out: which of its events are such updates (``updates_of``), and which values any event writes (``writes``):
``F.batch_norm`` writes its running statistics without telling autograd, so that no version counter shows it.

The statistics of a normalization, and counters, are updated in place as they were, once per call. Any other buffer that is written is a
value in the graph, which forward may read as often as it likes; its last one is written into the buffer when all else has run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxfuse.ops import canonical, op_name
from fxfuse.recording.trace import Event, Frame, Ref, Trace

from .writes import DRAWING, DRAWS, RENEWING

# Normalization that writes the running statistics it is given, where the argument named here is true.
_TRAINING = {
    "batch_norm": "training", "native_batch_norm": "training", "cudnn_batch_norm": "training", "instance_norm": "use_input_stats",
}  # fmt: skip
# Writes that have no form as values: the tensor has another shape, or random numbers, afterwards.
_NOT_WRITTEN = RENEWING | DRAWING | {f"{name}_" for name in DRAWS}
_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class Update:
    """One event to be repeated. ``touches``: the storages that it reads or writes, after which later ones of theirs have to come.

    ``count``: a counter goes up. ``statistics``: a normalization updates its running statistics. ``cumulative``: one whose momentum is one
    over ``counter``, which forward reads as a number. ``part``: that reading; nothing to repeat. ``discarded``: a normalization
    whose statistics nobody can see afterwards. ``write``: a write into a buffer that gets its last value at the end.
    """

    kind: Literal["count", "statistics", "cumulative", "part", "discarded", "write"]
    touches: tuple[int, ...] = ()
    counter: int = -1  # value


def plain_buffer(tensor: torch.Tensor) -> bool:
    """May its contents be copied into it, from a tensor without a history?"""
    plain = tensor.layout is torch.strided and 0 not in tensor.stride() and type(tensor) in (torch.Tensor, nn.Buffer)
    return plain and not isinstance(tensor, nn.Parameter) and not tensor.requires_grad


def _writes_its_first(event: Event) -> bool:
    """Does it write its first argument?"""
    return bool(event.args) and isinstance(event.args[0], Ref) and event.args[0].value in event.mutated


def arguments(event: Event) -> dict[str, Any]:
    """The arguments of an event by the names of its operator."""
    op, args = canonical(event.func, event.args, event.kwargs)
    return dict(zip(op.names, args, strict=True))


def writes(event: Event) -> tuple[int, ...]:
    """The values that an event writes, those included that no version counter shows."""
    flag = _TRAINING.get(op_name(event.func))
    if flag is None:
        return event.mutated
    given = arguments(event)
    hidden = [given.get(name) for name in _STATISTICS] if given.get(flag) else []
    return tuple(dict.fromkeys((*event.mutated, *(ref.value for ref in hidden if isinstance(ref, Ref)))))


def updates_of(trace: Trace) -> dict[int, Update]:
    """The updates among the events of a trace, by index; found once."""
    if trace.updates is None:
        trace.updates = _Finder(trace).found
    return trace.updates


class _Finder:
    def __init__(self, trace: Trace) -> None:
        self.trace, self.values = trace, trace.values
        self.found: dict[int, Update] = {}
        for index, event in enumerate(trace.events):
            name = event.func.__name__
            if (name in _TRAINING or name in ("add_", "__iadd__")) and not event.poison:
                self._look(index, event, name)
        if self.found:
            self._drop_what_others_touch()
        self._look_for_writes()

    def _look(self, index: int, event: Event, name: str) -> None:
        written = writes(event)
        if not written:
            return
        if name in ("add_", "__iadd__"):
            if self._counts(event):
                self.found[index] = Update("count", (self._storage(written[0]),))
            return
        op, _ = canonical(event.func, event.args, event.kwargs)
        given = arguments(event)
        statistics = [given[n] for n in _STATISTICS if n in given]
        if op.overload != "python" or not all(isinstance(s, Ref) for s in statistics) or set(written) != {s.value for s in statistics}:
            return
        origins = {self.values[value].origin for value in written}
        touches = tuple(self._storage(value) for value in written)
        if origins == {"attribute"}:
            self.found[index] = Update("statistics", touches)
            self._find_counter(index, event, touches)
        elif origins == {"made"}:
            self.found[index] = Update("discarded", touches)

    def _look_for_writes(self) -> None:
        """Writes into buffers that a graph can repeat as values. All those of one buffer, or none."""
        held = {seen.storage for seen in self.values if seen.origin == "attribute"}
        writers: dict[int, list[int]] = {}
        for index, event in enumerate(self.trace.events):
            if index not in self.found:
                for storage in dict.fromkeys(self._storage(value) for value in writes(event)):
                    if storage in held:
                        writers.setdefault(storage, []).append(index)
        if not writers or not self.trace.frames:
            return
        unfit = {storage for update in self.found.values() for storage in update.touches}
        names: dict[int, set[int]] = {}
        for value, seen in enumerate(self.values):
            if seen.origin == "attribute":
                names.setdefault(seen.storage, set()).add(value)
        # Only what is registered: plain attributes are nobody's state, and are not put back where a model is run for its figures.
        registered = {id(buffer) for module in self.trace.frames[0].module.modules() for buffer in module._buffers.values()}
        for storage, values in names.items():
            tensors = [self.values[value].tensor for value in values]
            if len(values) > 1 or not all(id(tensor) in registered and plain_buffer(tensor) for tensor in tensors):
                unfit.add(storage)
        for event in self.trace.events:
            written = writes(event)
            name = op_name(event.func)
            if event.poison or written != event.mutated or (written and (name in _NOT_WRITTEN or not _writes_its_first(event))):
                unfit.update(self._storages((event.args, event.kwargs)))
        for frame in self.trace.frames:  # its very memory is passed on; of the model's results the buffer itself may be one
            whole = {ref for ref in frame.out if isinstance(ref, Ref) and self.values[ref.value].origin == "attribute"}
            unfit.update(self._storages((frame.leaves, [leaf for leaf in frame.out if frame.parent >= 0 or leaf not in whole])))
        for storage in writers.keys() - unfit:
            self.found.update((index, Update("write", (storage,))) for index in writers[storage])

    def _counts(self, event: Event) -> bool:
        """``buffer += 1`` for a whole number that a module holds."""
        target = event.args[0]
        if not isinstance(target, Ref) or len(event.args) != 2 or event.kwargs or type(event.args[1]) is not int:
            return False
        value = self.values[target.value]
        tensor = value.tensor
        whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool)
        return value.origin == "attribute" and whole and not isinstance(tensor, nn.Parameter) and event.mutated == (target.value,)

    def _find_counter(self, index: int, event: Event, touches: tuple[int, ...]) -> None:
        """``momentum=None``: torch's own BatchNorm has counted and read the counter in the two events before."""
        frame = self.trace.frames[event.frame] if event.frame >= 0 else None
        if frame is None or type(frame.module).forward is not _BatchNorm.forward or getattr(frame.module, "momentum", 0) is not None:
            return
        read, count = self.trace.events[index - 1], self.found.get(index - 2)
        if index - 2 < frame.start or count is None or count.kind != "count" or read.func.__name__ != "__float__":
            return
        if read.args[0] != self.trace.events[index - 2].args[0] or self._called_again(frame):
            return
        self.found[index - 1] = Update("part", count.touches)
        self.found[index] = Update("cumulative", (*touches, *count.touches), read.args[0].value)

    def _called_again(self, frame: Frame) -> bool:
        """Is one module called several times by one forward? Its calls come one after the other: nothing is gained by opening it."""
        siblings = self.trace.frames[frame.parent].children if frame.parent >= 0 else []
        return any(self.trace.frames[i].module is frame.module and i != frame.index for i in siblings)

    def _storage(self, value: int) -> int:
        return self.values[value].storage

    def _drop_what_others_touch(self) -> None:
        """Leave out updates of what any other event or result of a module reads: repeated in place, they could come too early or late."""
        touched: dict[int, list[int]] = {}
        for index, update in self.found.items():
            for storage in update.touches:
                touched.setdefault(storage, []).append(index)
        dropped: set[int] = set()
        names: dict[int, set[int]] = {}
        for value, seen in enumerate(self.values):
            if seen.origin == "attribute" and seen.storage in touched:
                names.setdefault(seen.storage, set()).add(value)
        dropped.update(index for storage, held in names.items() if len(held) > 1 for index in touched[storage])
        for index, event in enumerate(self.trace.events):
            own = self.found[index].touches if index in self.found else ()
            for storage in self._storages((event.args, event.kwargs)):
                if storage in touched and storage not in own:
                    dropped.update(i for i in touched[storage] if self.found[i].kind != "discarded" or i < index)
        for frame in self.trace.frames:
            for storage in self._storages((frame.leaves, frame.out)):
                dropped.update(touched.get(storage, ()))
        while True:  # the parts of a cumulative average stand or fall together
            gone = {storage for index in dropped for storage in self.found[index].touches}
            more = {index for storage in gone for index in touched[storage]} - dropped
            if not more:
                break
            dropped |= more
        for index in dropped:
            del self.found[index]

    def _storages(self, tree: Any) -> list[int]:
        if isinstance(tree, Ref):
            return [self._storage(tree.value)]
        if isinstance(tree, (tuple, list)):
            return [storage for item in tree for storage in self._storages(item)]
        if isinstance(tree, dict):
            return self._storages(list(tree.values()))
        return []
