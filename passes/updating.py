"""Updates of buffers: running statistics repeated in place, other buffers written when all else has run.

Comes in: the updates that ``passes.updates`` found in a trace. Goes out: ``Updating``, a layer of the lifter that writes each as a node
with ``meta["update"]``; ``kwargs["after"]`` of such a node names what has to run before it; with ``meta["late"]``, all other nodes do. Also
``mark_unread``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.fx

from fxfuse.functional import cumulative_batch_norm, op_of
from fxfuse.graph import SizeCheck
from fxfuse.ops import Op, canonical, op_name
from fxfuse.recording.trace import Event, Frame, Ref, Trace, refs_in

from .lifted import Refused, Sizes
from .updates import Update, arguments, updates_of
from .writes import DETACH, Writes

_CUMULATIVE = op_of(cumulative_batch_norm)
# Arguments that have no derivative: compared with numbers, or looked at for their shape.
_WITHOUT_GRADIENT = {
    **dict.fromkeys(("hinge_embedding_loss", "cosine_embedding_loss"), ("target",)),
    **dict.fromkeys("zeros_like ones_like full_like empty_like rand_like randn_like".split(), ("input",)),
    **dict.fromkeys("new_zeros new_ones new_full new_empty".split(), ("input",)),
}


class Updating(Writes):
    """Writes updates of buffers."""

    def __init__(self, trace: Trace, frame: Frame, sizes: Sizes, opaque: frozenset[int]) -> None:
        super().__init__(trace, frame, sizes, opaque)
        self.updates = updates_of(trace)
        self.read_counters = {s for update in self.updates.values() if update.kind == "cumulative" for s in update.touches}
        self.renewable = {s for update in self.updates.values() if update.kind == "write" for s in update.touches}
        self.counts: dict[int, list[tuple[Event, Update]]] = {}  # by frame: counters that go up with the frame's statistics
        self.last_update: dict[int, torch.fx.Node] = {}  # by storage
        self.changed_inside: dict[int, str] = {}  # storages that closed modules write -> the module

    def _update(self, event: Event, update: Update) -> None:
        """Repeat an update in place. A counter that nobody reads goes up right after the statistics of its frame: with their lanes."""
        if update.kind == "part":
            return
        if update.kind == "count":
            if update.touches[0] in self.read_counters:
                self._repeat(event, update, canonical(torch.Tensor.add_, event.args, {}), ())
            else:
                self.counts.setdefault(event.frame, []).append((event, update))
            return
        given = arguments(event)
        if update.kind == "discarded":
            op, _ = canonical(event.func, event.args, event.kwargs)
            left = tuple(None if name in ("running_mean", "running_var") else value for name, value in given.items())
            self._more_than_one_value(op.name, given)
            self.env[event.out.value] = self._node(op, self._argument(left), event.out.value)
            return
        if update.kind == "cumulative":
            op, args = _CUMULATIVE, tuple(given[n] if n != "counter" else Ref(update.counter) for n in _CUMULATIVE.names)
        else:
            op, args = canonical(event.func, event.args, event.kwargs)
            op = replace(op, name=f"{op.name}_update")
        self._more_than_one_value(event.func.__name__, given)
        node = self._repeat(event, update, (op, args), ())
        self.env[event.out.value] = node
        for counted in self.counts.pop(event.frame, ()):
            self._repeat(*counted, canonical(torch.Tensor.add_, counted[0].args, {}), (node,))

    def _late_counts(self) -> None:
        """Counters of frames without statistics in the graph."""
        for event, update in [each for counts in self.counts.values() for each in counts]:
            self._repeat(event, update, canonical(torch.Tensor.add_, event.args, {}), ())

    def _closed(self, at: int) -> int:
        """The outermost call that stays closed around the call ``at``; -1 where none does."""
        outermost = -1
        while at >= 0 and at != self.frame.index:
            if at in self.opaque:
                outermost = at
            at = self.trace.frames[at].parent
        return outermost

    def _renew_buffers(self) -> None:
        """Write the last values of buffers that were written into them, when all that reads them has run."""
        if not self.renewed:
            return
        names = {self.trace.values[value].storage: self.trace.values[value].name for value in self.renewed}
        for event in self.trace.events[self.frame.start : self.frame.end]:
            if self._closed(event.frame) >= 0:
                for value in (*refs_in(event.args), *refs_in(event.kwargs)):
                    if self.trace.values[value].storage in names:
                        name, path = names[self.trace.values[value].storage], self.trace.frames[event.frame].path
                        raise Refused(f"changes {name} in forward, which {path} reads, a call that stays as it is", event.place)
        for copy, (of, event) in self.copied.items():
            node = self.env.get(copy)
            if not isinstance(node, torch.fx.Node) or op_name(event.func) != "contiguous":
                continue
            if self.trace.values[self._root(of)].storage in names:  # its backward may need what the buffer was
                node.target, node.args = canonical(torch.clone, (node.args[0],), {"memory_format": torch.contiguous_format})
        for value, held in self.renewed.items():
            last = self._read(value)
            if last is not held:
                self._renew(held, last, value)

    def _renew(self, held: torch.fx.Node, last: Any, value: int) -> None:
        op, args = canonical(torch.Tensor.copy_, (held, last), {})
        node = self.graph.call_function(op, args)
        self._describe(node, value)
        node.meta.update(update=True, late=True)

    def _repeat(self, event: Event, update: Update, call: tuple[Op, tuple[Any, ...]], after: tuple[torch.fx.Node, ...]) -> torch.fx.Node:
        """The call as a node, after those that touch the same buffers before it."""
        before = tuple(dict.fromkeys((*after, *(self.last_update[s] for s in update.touches if s in self.last_update))))
        node = self.graph.call_function(call[0], self._argument(call[1]), {"after": before} if before else {})
        self._describe(node, event.out.value)
        node.meta["update"] = True
        self.last_update.update(dict.fromkeys(update.touches, node))
        return node

    def _check_order(self) -> None:
        """A buffer that a closed module writes and the graph reads: which of the two comes first is not kept."""
        for value, node in self.env.items():
            module = self.changed_inside.get(self.trace.values[value].storage)
            if module is not None and isinstance(node, torch.fx.Node) and node.op == "get_attr":
                raise Refused(f"reads {self.trace.values[value].name}, which {module} changes", self.frame.place)

    def _more_than_one_value(self, name: str, given: dict[str, Any]) -> None:
        """Statistics of a single value raise in the original: guard that a free size does not lead there."""
        shape, value = self.trace.values[given["input"].value].shape, given["input"].value
        if name == "group_norm":
            fixed, dims = shape[1] // given["num_groups"], [0, *range(2, len(shape))]
        else:
            fixed, dims = 1, [*([0] if name == "batch_norm" else []), *range(2, len(shape))]
        free = [dim for dim in dims if dim in self.dynamic.get(value, ())]
        for dim in dims:
            fixed *= 1 if dim in free else shape[dim]
        most = max(free, key=lambda dim: shape[dim], default=None)
        if fixed == 1 and most is not None and shape[most] > 1:
            found = self._input_dim(value, most)
            if found is not None:
                self.checks.append(SizeCheck(*found, "!=", 1))


def reached_storages(trace: Trace) -> set[int] | None:
    """The memory from which a gradient can come: of what the model returns, and of all that this was computed from.

    None where the model returns things that are not looked into.
    """
    values, out = trace.values, trace.frames[0].out if trace.frames else []
    if not all(isinstance(leaf, (Ref, int, float, str, bool, type(None))) for leaf in out):
        return None
    reached = {values[leaf.value].storage for leaf in out if isinstance(leaf, Ref)}
    for event in reversed(trace.events):
        made = [v for v in (*refs_in(event.out), *event.mutated) if values[v].tensor.requires_grad]
        if any(values[v].storage in reached for v in made):
            reached.update(values[v].storage for v in (*refs_in(event.args), *refs_in(event.kwargs)))
    return reached


def _cuts(node: torch.fx.Node) -> bool:
    """Does no gradient go through it?"""
    return node.target == DETACH or (isinstance(node.target, Op) and node.target.name == "returned untracked_view")


def _with_gradient(node: torch.fx.Node) -> list[torch.fx.Node]:
    """The operands that may get a gradient from ``node``."""
    skipped = _WITHOUT_GRADIENT.get(node.target.name, ()) if isinstance(node.target, Op) else ()
    if not skipped:
        return node.all_input_nodes
    assert isinstance(node.target, Op)
    found: list[torch.fx.Node] = []
    torch.fx.node.map_arg([arg for name, arg in zip(node.target.names, node.args, strict=True) if name not in skipped], found.append)
    return found


def mark_unread(graph: torch.fx.Graph, trace: Trace) -> None:
    """Mark what no gradient reaches, so that it does not share a pack with what has one: it would get zeros instead of none.

    That is what is run for its updates only, what is used for its shape, for whole numbers (``argmax``) or for a comparison (the signs of
    ``hinge_embedding_loss``) alone, and what the module returns but nobody uses.
    """
    values = trace.values
    read: set[torch.fx.Node] = set()
    reached: set[torch.fx.Node] = set()
    if trace.reached is None:
        trace.reached = (reached_storages(trace),)
    (used,) = trace.reached

    def tracked(node: torch.fx.Node) -> bool | None:
        value = node.meta.get("value")
        return values[value].tensor.requires_grad if value is not None else None

    def could_have(node: torch.fx.Node) -> bool:
        """Would it have a gradient, if the inputs that had none in the recording had one?"""
        dtype, known = node.meta.get("dtype"), tracked(node)
        if known is not False:
            return bool(known)
        numbers = dtype is not None and (dtype.is_floating_point or dtype.is_complex)
        return numbers and not node.meta.get("untracked") and not any(tracked(operand) for operand in node.all_input_nodes)

    for node in reversed(graph.nodes):
        size = isinstance(node.target, Op) and node.target.name.startswith("size")
        if node.op == "output" or node in read:
            read.update(node.all_input_nodes)
        if node.op == "output":
            for given in node.all_input_nodes:
                known = given.meta.get("value")
                if used is None or known is None or values[known].storage in used or not tracked(given):
                    reached.add(given)
        elif node in reached and (tracked(node) is None or could_have(node)) and not size and not _cuts(node):
            reached.update(_with_gradient(node))
        if node.op == "call_function" and (node not in read or (could_have(node) and node not in reached)):
            node.meta["unread"] = True
