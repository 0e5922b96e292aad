"""Choose the regions: the smallest modules whose forward holds a loop.

Comes in: an ``Observation`` of a model. Goes out: ``Region``s (a module call, with its graph prepared and its lanes found), none inside
another, and a ``Refusal`` for each module call with something in it that could not be looked at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.fx
from torch import nn

from fxfuse.graph import Place, Refusal
from fxfuse.passes.assignable import unfit_assignments
from fxfuse.passes.assigning import assigning_calls
from fxfuse.passes.in_turn import in_turn
from fxfuse.passes.lift import lift
from fxfuse.passes.lifted import Lifted, Sizes
from fxfuse.passes.near_miss import near_misses
from fxfuse.passes.rules import is_heavy
from fxfuse.passes.updates import updates_of, writes
from fxfuse.passes.vectorize import Prepared, prepare
from fxfuse.private.module_hooks import has_hooks
from fxfuse.private.torch_function import DisableTorchFunction
from fxfuse.recording.fast_path import attends, holds_attention, in_rows_without_grad
from fxfuse.recording.observe import Observation
from fxfuse.recording.trace import Frame, Ref, Trace
from fxfuse.running.region import STATE

RENORMS = "max_norm renormalizes"
SINGLE_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class Region:
    """A module call that will be rewritten."""

    frame: Frame
    prepared: Prepared


def closed_frames(observation: Observation) -> frozenset[int]:
    """Module calls that stay as they are inside a region: hooks, or steps that a graph cannot repeat."""
    trace = observation.trace
    held = {value.storage: value.name for value in trace.values if value.origin == "attribute"}
    updates = updates_of(trace)
    for index, event in enumerate(trace.events):
        if index in updates:
            continue
        changed = next((held[trace.values[v].storage] for v in writes(event) if trace.values[v].storage in held), None)
        poison = event.poison or (f"changes {changed} in forward" if changed is not None else "")
        if changed is not None and event.func.__name__ in ("embedding", "embedding_bag"):
            poison = f"{RENORMS} {changed} in forward"
        if poison and event.frame >= 0:
            frame = trace.frames[event.frame]
            if not frame.poison:
                frame.poison, frame.place = poison, event.place
    unfit = unfit_assignments(trace)
    for each in trace.assigned:
        frame = trace.frames[each.frame]
        if each.key in unfit and not frame.poison:
            frame.poison, frame.place = unfit[each.key]
    for frame in trace.frames:
        if STATE in frame.module.__dict__:
            frame.poison = frame.poison or "it is fused already; fxfuse.unfuse(model) gives the model to fuse anew"
    for frame in reversed(trace.frames):  # the inner ones first: a call that stays must stay where the switch was thrown
        if frame.switched and frame.parent >= 0 and (frame.poison or has_hooks(frame.module)):
            outer = trace.frames[frame.parent]
            outer.poison, outer.place = outer.poison or frame.switched, outer.place if outer.poison else frame.place
    return frozenset(frame.index for frame in trace.frames if frame.poison or has_hooks(frame.module))


class RegionFinder:
    """Walks the module calls from the outside in. ``packed``: weights that are packed by now, each with its pack: only what lies in one
    pack is of one class (two layers of one shape, each in a pack, whose weights autocast casts alike).
    """

    def __init__(self, observation: Observation, min_lanes: int, merge: bool, packed: Mapping[str, str] | None = None) -> None:
        self.observation, self.min_lanes, self.merge, self.packed = observation, min_lanes, merge, packed or {}
        self.closed = closed_frames(observation)
        self.regions: list[Region] = []
        self.refusals: list[Refusal] = []
        self.rows: dict[int, list[bool]] = {}  # by frame: results that lie in rows where nobody asks for gradients

    def single_layers(self) -> list[Region]:
        """Calls of a Linear or a pointwise convolution outside of all regions, each a region of its own, to be spelled as the other."""
        frames = self.observation.trace.frames
        calls = Counter(frame.path for frame in frames)
        found: list[Region] = []
        for frame in frames:
            if type(frame.module) not in SINGLE_LAYERS or calls[frame.path] > 1 or frame.index in self.closed:
                continue
            if any(_nested(frame.path, region.frame.path) for region in self.regions):
                continue
            prepared = self.prepared(frame)
            if isinstance(prepared, Prepared):
                prepared.single = True
                found.append(Region(frame, prepared))
        return found

    def prepared(self, frame: Frame, kept: int = 0) -> Prepared | Refusal:
        """The graph of ``frame``, with its lanes found. A free size that keeps lanes apart is given up: the recorded one is guarded.
        So many sizes, from the first, are ``kept``.

        This is the one place that gives up a size that counts lanes: a loop over it takes the same steps at every larger size.
        """
        sizes = self.observation.sizes
        best = self._prepared(frame, sizes)
        index = len(sizes) - 1
        while isinstance(best, Prepared) and index >= kept and len(sizes) > 1:
            fewer = sizes[:index] + sizes[index + 1 :]
            other = self._prepared(frame, fewer)
            if isinstance(other, Prepared) and other.launches() < best.launches():
                best, sizes = other, fewer
            index -= 1
        return best

    def _prepared(self, frame: Frame, sizes: Sizes) -> Prepared | Refusal:
        trace = self.observation.trace
        lifted = lift(trace, frame, sizes, self.closed - {frame.index})
        if isinstance(lifted, Refusal):
            writing = _writing(trace) - {frame.index}
            again = lift(trace, frame, sizes, (self.closed | writing) - {frame.index}) if writing - self.closed else lifted
            if isinstance(again, Refusal):
                return lifted
            for index in writing - self.closed:
                trace.frames[index].poison, trace.frames[index].place = lifted.reason, lifted.place
            self.closed |= writing
            lifted = again
        fixed = self.observation.fixed.get(frame.index)
        if fixed is not None and not lifted.specialised:
            lifted.specialised, lifted.place = fixed.reason, fixed.place
        self._note_fast_path(frame, lifted)
        for node in lifted.graph.find_nodes(op="get_attr") if self.packed else ():
            node.meta["pack"] = self.packed.get(str(node.target))
        return prepare(lifted, self.min_lanes, self.merge)

    def _note_fast_path(self, frame: Frame, lifted: Lifted) -> None:
        """Mark the results that a call without grad lays out in another way."""
        if frame.raw is None or frame.untracked or not holds_attention(frame.module):
            return
        if frame.index not in self.rows:
            values = [self.observation.trace.values[leaf.value].tensor if isinstance(leaf, Ref) else None for leaf in frame.out]
            root = self.observation.trace.frames[0].module
            with DisableTorchFunction():
                strides = [value.stride() if value is not None and value.layout is torch.strided else None for value in values]
            try:
                self.rows[frame.index] = in_rows_without_grad(frame.module, *frame.raw, strides, root, self.observation.flags)
            except Exception:  # a model that runs with grad only
                self.rows[frame.index] = [False] * len(strides)
        (output,) = [node for node in lifted.graph.nodes if node.op == "output"]
        for node, rows in zip(output.args[0], self.rows[frame.index], strict=False):
            if rows and isinstance(node, torch.fx.Node):
                node.meta["rows_without_grad"] = True
        if attends(frame.module, self.observation.trace.frames[0].module, self.observation.flags):
            for leaf in output.args[0]:
                if isinstance(leaf, torch.fx.Node):
                    leaf.meta["no_empty"] = True

    def visit(self, index: int = 0) -> None:
        """Find the regions in the module call ``index`` and below."""
        frame = self.observation.trace.frames[index]
        if any(_nested(frame.path, region.frame.path) for region in self.regions):
            return
        found: Prepared | Refusal = Refusal(frame.poison, frame.place) if frame.poison else self.prepared(frame)
        if isinstance(found, Refusal):
            self._refuse(frame, found.reason, found.place)
            self._visit_children(frame)
            return
        self._tell([replace(idle, region=frame.path) for idle in found.idle])
        if found.worthwhile:
            inner = self._inner_frames(frame, found)
            if inner is None:
                self.regions.append(Region(frame, found))
                self._tell(near_misses(found.bundles, is_heavy, frame.path))
                self.refusals.extend(in_turn(found.bundles, frame.path))
                self._refuse_closed(frame)
                return
            for child in inner:
                self.visit(child)
        if not found.worthwhile:
            self._tell(near_misses(found.bundles, is_heavy, frame.path))
        self._refuse_closed(frame, RENORMS)
        for child in self._closed_below(frame):
            self.visit(child)

    def _tell(self, refusals: list[Refusal]) -> None:
        """Each sentence once: a call inside another is looked at again."""
        known = {(refusal.reason, refusal.place) for refusal in self.refusals}
        self.refusals.extend(refusal for refusal in refusals if (refusal.reason, refusal.place) not in known)

    def _visit_children(self, frame: Frame) -> None:
        for child in frame.children:
            self.visit(child)

    def _refuse(self, frame: Frame, reason: str, place: Place | None) -> None:
        # A layer of torch.nn that cannot be looked into is no region that anybody expects: only what calls other modules is one.
        if frame.children or not type(frame.module).__module__.startswith("torch."):
            self.refusals.append(Refusal(reason, place, frame.path))

    def _refuse_closed(self, region: Frame, only: str = "") -> None:
        """Modules inside a region that stay calls: one sentence for all that do so for one reason at one line.

        ``only``: how the reasons begin that are to be told.
        """
        groups: dict[tuple[str, Place | None], list[Frame]] = {}
        for index in self._closed_below(region):
            closed = self.observation.trace.frames[index]
            reason = closed.poison or "it has hooks, which only a call of the module itself runs"
            if not reason.startswith(only):
                continue
            groups.setdefault((reason.replace(f"{closed.path}.", "its "), closed.place), []).append(closed)
        for (reason, place), frames in groups.items():
            others = f" (and {len(frames) - 1} others)" if len(frames) > 1 else ""
            self.refusals.append(Refusal(f"{frames[0].path}{others} stays a call of its own: {reason}", place, region.path))

    def _inner_frames(self, frame: Frame, prepared: Prepared) -> list[int] | None:
        """The calls inside ``frame`` that hold all lane sets between them; None where ``frame`` itself is the smallest that does."""
        if prepared.factored:
            return None
        children: list[int] = []
        for component in prepared.bundles.components():
            frames = {m.meta["frame"] for i in component for m in prepared.bundles.classes[i].members}
            holders = {self._child_of(frame.index, at) for at in frames}
            if len(holders) > 1 or None in holders:
                return None
            (holder,) = holders
            if holder is not None and holder not in children:
                children.append(holder)
        if self.observation.trace.touches and any(isinstance(self.prepared(self._frame(child)), Refusal) for child in children):
            return None  # one that reads an attribute which the call around it sets
        return children

    def _frame(self, index: int) -> Frame:
        return self.observation.trace.frames[index]

    def _child_of(self, ancestor: int, at: int) -> int | None:
        """The direct child of ``ancestor`` that contains the call ``at``; None for ``ancestor`` itself."""
        frames = self.observation.trace.frames
        if at == ancestor:
            return None
        while frames[at].parent != ancestor:
            at = frames[at].parent
        return at

    def _closed_below(self, frame: Frame) -> list[int]:
        found: list[int] = []
        pending = list(frame.children)
        while pending:
            index = pending.pop(0)
            if index in self.closed:
                found.append(index)
            else:
                pending.extend(self.observation.trace.frames[index].children)
        return found


def _writing(trace: Trace) -> frozenset[int]:
    """The calls that themselves write or assign buffers, or write under ``no_grad``: most of it has a form as values, but not all."""
    updates = updates_of(trace)
    found = (e.frame for i, e in enumerate(trace.events) if (i in updates and updates[i].kind == "write") or (e.untracked and e.mutated))
    return frozenset(index for index in found if index >= 0) | assigning_calls(trace)


def _nested(path: str, other: str) -> bool:
    return path == other or not other or not path or path.startswith(other + ".") or other.startswith(path + ".")
