"""One module call of a trace, as a functional FX graph.

Comes in: a ``Trace``, one of its frames, and which sizes were found to be free. Goes out: ``Lifted``: a graph whose nodes call ``Op``s
with canonical arguments, in which every write has become a new value, every repeated pure computation is one node, basic indexing
is a chain of ``select`` / ``slice_along`` / ``unsqueeze``, and constant sizes are numbers; or a ``Refusal``.

This file walks the events; below it are, layer by layer, ``closed_calls``, ``returned`` (results that share memory), ``assigning`` and
``updating`` (buffers), ``writes`` (in-place writes and views), ``indexing``, ``nodes``, ``free_sizes``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx

from fxfuse.functional import drop_unused, flagged, gradient_in_rows, op_of, own_leaf
from fxfuse.graph import Refusal, Store
from fxfuse.ops import op_name
from fxfuse.private.torch_function import DisableTorchFunction
from fxfuse.recording.attributes import touches_in
from fxfuse.recording.sizes import SizeOf, SizeOp
from fxfuse.recording.trace import Event, Frame, Key, Ref, Touch, Trace, refs_in

from .carried_flags import refuse_flags_without_history
from .closed_calls import GETITEM, ClosedCalls
from .lifted import Lifted, Refused, SizeDependent, Sizes
from .rows import layouts
from .switched_on import switched_on
from .updates import arguments, writes
from .updating import mark_unread
from .writes import RENEWING, SPLITS

_LEAF, _FLAGGED = op_of(own_leaf), op_of(flagged)
_IN_ROWS = op_of(gradient_in_rows)
_ROWS_OF_ITS_OWN = frozenset(("group_norm", "instance_norm"))  # ops that torch gives a copy in rows of what does not lie in rows


def lift(trace: Trace, frame: Frame, sizes: Sizes, opaque: frozenset[int]) -> Lifted | Refusal:
    """The functional graph of ``frame``; frames in ``opaque`` stay module calls. Fixes every size where a free one would be unsafe.

    ``sizes``: for each free size, the dims (by value) that have it.
    """
    fewer = [sizes[:i] + sizes[i + 1 :] for i in range(len(sizes))] if len(sizes) > 1 else []
    single = [[one] for one in sizes] if len(sizes) > 2 else []
    unsafe: SizeDependent | None = None
    try:
        for tried in (sizes, *fewer, *single, []):
            try:
                lifted = _Lifter(trace, frame, tried, opaque).run()
            except SizeDependent as reason:
                unsafe = unsafe or reason
                continue
            if unsafe is not None and not tried:
                lifted.specialised, lifted.place = unsafe.reason, unsafe.place
            return lifted
    except Refused as refused:
        return refused.refusal
    raise AssertionError("with every size fixed nothing depends on sizes")


class _Lifter(ClosedCalls):
    def run(self) -> Lifted:
        frame = self.frame
        if frame.poison:
            raise Refused(frame.poison, frame.place)
        for index, leaf in enumerate(frame.leaves):
            node = self.graph.placeholder(f"input_{index}")
            if isinstance(leaf, Ref) and leaf.value not in self.env:
                self._describe(node, leaf.value)
                self.env[leaf.value] = node
                self.inputs.add(leaf.value)
            elif self._free(leaf):
                raise SizeDependent("a size is passed into the region as a number", frame.place)
        self._comparisons()
        self._check_empty_calls()
        refuse_flags_without_history(self.trace, frame)
        index = frame.start
        while index < frame.end:
            event = self.trace.events[index]
            skip = self._opaque_call(event, index)
            if skip is not None:
                index = skip
                continue
            self.place, self.at = event.place, event.frame
            self.path = self.trace.frames[event.frame].path if event.frame >= 0 else ""
            self.untracked = event.untracked
            update = self.updates.get(index)
            with self._rows_of_its_own(event):
                if update is not None and update.kind != "write":
                    self._update(event, update)
                elif event.poison:
                    raise Refused(event.poison, event.place)
                else:
                    self._event(event)
            index += 1
        self._late_counts()
        self._renew_buffers()
        self._check_order()
        shared = self._shared(frame.out)
        stores, kept = self._stores()
        outputs = [shared[leaf.value] if isinstance(leaf, Ref) and leaf.value in shared else self._output(leaf) for leaf in frame.out]
        outputs += [self._output(leaf) for leaf in kept]
        self.graph.output(outputs)
        needed = layouts(self.trace, frame, self.viewed, self.torn)
        drop_unused(self.graph)
        mark_unread(self.graph, self.trace)
        return Lifted(
            self.graph, frame, self.constants, self.checks, self.dynamic, place=frame.place, random=self.random, factories=self.factories,
            layouts=needed, shapes={value: self.trace.values[value].shape for value in self.inputs}, sizes=self.sizes, stores=stores,
            tracking=switched_on(self.trace, frame, self.opaque),
            sets=frozenset((self._inside_path(t.path), t.name) for t in touches_in(self.trace, frame) if t.write),
        )  # fmt: skip

    def _stores(self) -> tuple[list[Store], list[Any]]:
        """The attributes that the frame sets, and all their leaves. What closed calls in it set, they set themselves."""
        last: dict[Key, Touch] = {}
        closed: dict[Key, dict[str, bool]] = {}  # closed calls that touch it, and whether one of them writes
        for touch in touches_in(self.trace, self.frame):
            self.place = touch.place
            named = f"{touch.path}.{touch.name}" if touch.path else f"self.{touch.name}"
            outermost = self._closed(touch.frame)
            if outermost >= 0:
                calls = closed.setdefault(touch.key, {})
                path = self.trace.frames[outermost].path
                calls[path] = calls.get(path, False) or touch.write
            elif not touch.write:
                if touch.key not in last:
                    raise Refused(f"reads {named}, which another call sets", touch.place)
            else:
                self._inside_path(touch.path)
                last[touch.key] = touch
            calls = closed.get(touch.key, {})
            if (calls and touch.key in last) or (len(calls) > 1 and any(calls.values())):
                raise Refused(f"sets {named} in one call and reads or sets it in another that stays as it is", touch.place)
        leaves: list[Any] = []
        for touch in last.values():
            if touch.leaves is None or self._changed_after(touch):
                raise Refused(f"forward changes {touch.path or 'self'}.{touch.name}", touch.place)
            leaves += touch.leaves
        return [Store(self._inside_path(touch.path), touch.name, touch.spec) for touch in last.values()], leaves

    def _changed_after(self, touch: Touch) -> bool:
        """May a container that was set have been filled further after this frame was over? It has been looked at when all was over."""
        frames = self.trace.frames
        own = {id(each) for each in touches_in(self.trace, self.frame)}
        others = [other for other in self.trace.touches if other.key == touch.key and id(other) not in own]
        return not touch.spec.is_leaf() and any(other.event >= frames[self.frame.index].end for other in others)

    def _inside_path(self, path: str) -> str:
        """The path of a module in the region. Refuses where it is outside."""
        own = self.frame.path
        if path != own and own and not path.startswith(f"{own}."):
            raise Refused(f"sets an attribute of {path or 'the model'}, which is outside", self.place)
        return path[len(own) :].removeprefix(".") if own else path

    def _event(self, event: Event) -> None:
        name = op_name(event.func)
        self._note_order(event, name)
        self._check_passed_on(event)
        written = writes(event)
        if name in RENEWING:
            raise Refused(f"{name} makes another tensor of one in place", event.place)
        if written and not event.mutated:
            raise Refused(f"changes {self.trace.values[written[0]].name or 'running statistics'} in forward ({name})", event.place)
        if name in ("batch_norm", "instance_norm", "group_norm"):
            given = arguments(event)
            if isinstance(given.get("input"), Ref) and given.get("training", given.get("use_input_stats", True)):
                self._more_than_one_value(name, given)
        if event.mutated:
            self._write_event(event, name)
            return
        same = self._is_itself(name, event)
        if same is not None:
            self.env[event.out.value] = self._read(same)
            self._note_view(event)
            return
        args, kwargs = self._argument(event.args), self._argument(event.kwargs)
        part = self._part(name, event.func, args, kwargs, event.out.value) if isinstance(event.out, Ref) else None
        if part is not None:
            self.env[event.out.value] = part
        elif name in SPLITS or name in ("unbind", "unsafe_unbind"):
            self._split(name, event, args, kwargs)
        elif name == "broadcast_tensors":
            raise Refused("broadcast_tensors has no functional form here", event.place)
        else:
            if name == "grad":  # lanes that share a pack share its history: none may free it
                kwargs = {**kwargs, "retain_graph": True} if len(args) < 4 else kwargs
                args = (*args[:3], True, *args[4:]) if len(args) > 3 else args
            out = self._call(event.func, args, kwargs, event.out)
            self._bind(event.out, out)
            if name == "grad":
                self._gradients_in_rows(event)
            elif name == "requires_grad_":
                self._flag(event.out.value, args[0], bool(kwargs.get("requires_grad", True) if len(args) < 2 else args[1]), out)
        self._note_view(event)

    @contextmanager
    def _rows_of_its_own(self, event: Event) -> Iterator[None]:
        """For a norm of columns of a result, a copy of them: torch normalizes and keeps a copy, so a caller may write to the result."""
        ref = arguments(event).get("input") if op_name(event.func) in _ROWS_OF_ITS_OWN else None
        if not isinstance(ref, Ref) or self.trace.values[ref.value].storage not in self.memory_of_results:
            yield
            return
        with DisableTorchFunction():
            in_rows = self.trace.values[ref.value].tensor.is_contiguous() and self._in_rows_at_all_sizes(ref.value)
        read = self._read(ref.value)
        if not in_rows:
            self.env[ref.value] = self._call(torch.clone, (read,), {"memory_format": torch.contiguous_format}, ref)
        yield
        self.env[ref.value] = read

    def _flag(self, value: int, before: torch.fx.Node, given: bool, out: torch.fx.Node) -> None:
        """``requires_grad_``: what comes after it reads the tensor with the flag, and no other tensor of those numbers has it."""
        seen = self.trace.values[value]
        with DisableTorchFunction():
            is_leaf = seen.tensor.is_leaf
        if value in self.inputs:
            self.env[value] = out
            out.meta["update"] = True
        elif seen.origin != "made":
            raise Refused(f"sets whether {seen.name or 'a constant'} needs a gradient", self.place)
        elif is_leaf or (given and self._of_inputs_alone(value)):
            on = switched_on(self.trace, self.frame, self.opaque).kind == "on"  # the caller may track nothing: no history to keep then
            node = self.graph.call_function(_LEAF if on else _FLAGGED, (before, given))
            self._describe(node, value)
            self.env[value] = node
            self.flagged[value] = (given,)

    def _of_inputs_alone(self, value: int) -> bool:
        """Has it a history only where the caller's inputs have one?"""
        sources: dict[int, set[int]] = {}
        for event in self.trace.events:
            read = {*refs_in(event.args), *refs_in(event.kwargs)}
            for made in refs_in(event.out):
                sources.setdefault(made, set()).update(read - {made})
        pending, seen = [value], {value}
        while pending:
            at = pending.pop()
            if at in self.inputs:
                continue
            if self.trace.values[at].origin != "made" and self.trace.values[at].tensor.requires_grad:
                return False
            more = sources.get(at, set()) - seen
            pending.extend(more)
            seen |= more
        return True

    def _gradients_in_rows(self, event: Event) -> None:
        """Results of ``torch.autograd.grad`` that lie in rows do so here."""
        for ref in event.out if isinstance(event.out, list) else [event.out]:
            if isinstance(ref, Ref) and isinstance(self.env.get(ref.value), torch.fx.Node):
                with DisableTorchFunction():
                    tensor = self.trace.values[ref.value].tensor
                    in_rows = tensor.layout is torch.strided and tensor.is_contiguous()
                if in_rows:
                    self.env[ref.value] = self._node(_IN_ROWS, (self.env[ref.value],), ref.value)

    def _bind(self, out: Any, node: Any) -> None:
        if isinstance(out, Ref):
            if out.value in self.env and self.env[out.value] is not node and self.parent.get(out.value) is None:
                # The call handed back one of its own arguments (contiguous() of a contiguous tensor): nothing new.
                return
            self.env[out.value] = node
        elif isinstance(out, list):
            for index, item in enumerate(out):
                if isinstance(item, (Ref, list)):
                    first = item.value if isinstance(item, Ref) else None
                    self._bind(item, self._node(GETITEM, (node, index), first))

    def _output(self, leaf: Any) -> Any:
        if isinstance(leaf, Ref):
            if leaf.value in self.renewed:  # the buffer itself, which holds its new contents by then
                return self.renewed[leaf.value]
            node = self._read(leaf.value)
            values, own = self.trace.values, node.meta.get("value")
            if node.op in ("placeholder", "get_attr") and own is not None and values[own].storage != values[leaf.value].storage:
                node = self._call(torch.clone, (node,), {}, leaf)  # ``x * 1``: a tensor of its own, which the caller may write to
            node = self._untracked(self._another(node, leaf.value), leaf.value)
            self._stride(node, leaf.value)
            return node
        if isinstance(leaf, (SizeOf, SizeOp)):
            return self._argument(leaf)
        if leaf is None or isinstance(leaf, (int, float, str, bool, complex, torch.dtype, torch.device)):
            return leaf
        raise Refused(f"returns a {type(leaf).__name__}, which fxfuse cannot take apart", self.frame.place)

    def _stride(self, node: torch.fx.Node, value: int) -> None:
        node.meta["out_stride"] = self.trace.values[value].order()
