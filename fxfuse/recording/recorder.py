"""The mode that watches one run: every torch call, every module call, every size that Python looks at, onto a ``Trace``.

Comes in: the calls, as they are made on real tensors. Goes out: ``Recorder``, whose ``trace`` holds them.

A model of a thousand lanes makes ten thousand calls, so the common case (plain tensors and numbers in, one tensor out) is kept short.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from operator import is_
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxfuse.functional import autocast_to
from fxfuse.graph import Place
from fxfuse.models.containers import opened
from fxfuse.models.contents import Contents
from fxfuse.models.determinism import foreign_random_state
from fxfuse.models.internal_files import INTERNAL, is_internal
from fxfuse.private.autocast import any_autocast_enabled, autocast_on
from fxfuse.private.pytree import tree_flatten
from fxfuse.private.saved_hooks import saved_hooks
from fxfuse.private.torch_function import DisableTorchFunction
from fxfuse.private.transforms import transforming
from fxfuse.private.versions import version

from .casts import Unrepeatable, Watched, to_cast
from .fast_path import laid_out
from .handed_back import apart
from .kept_memory import KeptMemory
from .loose import Loose
from .moves import moves_noted
from .outside import Generators
from .ran import Ears, code_noted, runs_torch_only
from .sizes import SizeOf, TracedInt, plain
from .step_by_step import step_by_step
from .switches import Switches
from .torch_calls import ACTIONS, DATA_SHAPED, FROM_DATA, IN_PLACE, MAYBE_IN_PLACE, PLAIN, PROPERTIES
from .trace import MOST_NUMBERS, Assignment, Event, Frame, Ref, Touch, Trace, Value
from .unchecked import UNCHECKED

_UNTRACKED = "runs without gradient tracking (no_grad, or a custom autograd Function)"
_LASTING = "switches gradient tracking on for whoever called it (set_grad_enabled)"
_AUTOCAST = "switches autocast"
_TRANSFORM = "runs inside a transform of torch.func (vmap, grad and their like)"
_SAVED = "keeps what backward needs in its own way (saved_tensors_hooks, save_on_cpu or checkpoint)"
_ONE_TENSOR = tree_flatten(((torch.empty(0),), {}))[1]
_TENSOR = tree_flatten(torch.empty(0))[1]


class Recorder(TorchFunctionMode):
    """Watches one run. ``attributes`` maps ``id(tensor)`` to the path of every tensor that the model's modules hold."""

    def __init__(self, attributes: dict[int, str]) -> None:
        super().__init__()
        self.trace = Trace([], [], [], [])
        self.loose = Loose(self.trace.values)
        self.attributes = attributes
        self.known: dict[int, Ref] = {}  # by id of the tensor; the trace keeps them alive
        self.stack: list[int] = []
        self.sizes: list[Any] = []
        self.places: dict[tuple[str, int], Place] = {}
        self.autocast = autocast_on()
        self.trace.autocast = next(iter(self.autocast), None)
        self.kept: KeptMemory | None = None
        self.generators = Generators([])
        self.ears = Ears()
        self.switches = Switches(self.trace.switched_on)
        self.hooked: set[int] = set()  # ids of modules with hooks

    # -- values -------------------------------------------------------------------------------------------------------------------

    def add(self, tensor: Tensor, origin: str, name: str = "") -> Ref:
        with DisableTorchFunction():
            return self._add(tensor, origin, name)

    def _add(self, tensor: Tensor, origin: str, name: str = "") -> Ref:
        """``add`` where no mode and no subclass can get in between."""
        values = self.trace.values
        ref = Ref(len(values))
        try:
            storage = tensor.untyped_storage().data_ptr() or id(tensor)
        except (RuntimeError, NotImplementedError):
            storage = id(tensor)
        stride = tensor.stride() if tensor.layout is torch.strided and not tensor.is_nested else None
        values.append(Value(tensor, origin, name, storage, tuple(tensor.shape), stride))
        if origin == "attribute":
            self.loose.attribute(values[-1])
        self.known[id(tensor)] = ref
        return ref

    def number(self, tensor: Tensor) -> Ref:
        found = self.known.get(id(tensor))
        if found is not None:
            return found
        name = self.attributes.get(id(tensor))
        return self.add(tensor, "attribute", name) if name is not None else self.add(tensor, "constant")

    def describe(self, tree: Any, tensors: list[Tensor] | None = None) -> Any:
        """``tree`` with tensors as ``Ref`` and tracked sizes as expressions; the tensors are appended to ``tensors``."""
        if type(tree) in PLAIN:
            return tree
        if isinstance(tree, Tensor):
            if tensors is not None:
                tensors.append(tree)
            return self.number(tree)
        if isinstance(tree, TracedInt):
            return tree.expr if tree.log is self.sizes else plain(tree)
        if isinstance(tree, tuple):
            return tuple([item if type(item) in PLAIN else self.describe(item, tensors) for item in tree])
        if isinstance(tree, list):
            return [self.describe(item, tensors) for item in tree]
        if isinstance(tree, dict):
            return {key: self.describe(item, tensors) for key, item in tree.items()}
        if isinstance(tree, slice):
            if type(tree.start) in PLAIN and type(tree.stop) in PLAIN and type(tree.step) in PLAIN:
                return tree
            return slice(self.describe(tree.start), self.describe(tree.stop), self.describe(tree.step))
        return tree

    def outputs(self, tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return self.known.get(id(tree)) or self.add(tree, "made")
        if isinstance(tree, (tuple, list)):
            return [self.outputs(item) for item in tree]
        return tree

    # -- calls --------------------------------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        heard = self.ears.close()
        try:
            return self.meaning(func, args, kwargs)
        finally:
            if heard:
                self.ears.open()

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The call itself, which may run Python of the model's: ``apply_``, a backward pass."""
        self.ears.open()
        try:
            return func(*args, **kwargs)
        finally:
            self.ears.close()

    def meaning(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What a torch call, made by the frame around ``__torch_function__``, means to the record; and its result."""
        name = func.__name__
        action = ACTIONS.get(name)
        if action is None:
            if name != "__get__":
                return self.call(func, args, kwargs or {}, name)
            name = func.__self__.__name__
            action = PROPERTIES.get(name)
            if action == "shape":
                return torch.Size(self.sizes_of(args[0]))
            if action not in ("fact", "dtype", "gradient"):
                return self.call(func, args, kwargs or {}, name)
        kwargs = kwargs or {}
        if action == "size":
            return self.size(func, args, kwargs)
        if action == "open":
            open_function = step_by_step(func, args, kwargs)
            if open_function is None:
                return self.call(func, args, kwargs, name)
            with self:  # the mode is off here: with it on again, each step is a call of its own
                return self.run(open_function, args, kwargs)
        if action == "numel":
            return self.numel(args[0])
        if action == "layout":
            return self.layout(func, args, kwargs, name)
        if action == "gradient" and not is_internal(sys._getframe(2).f_code.co_filename):
            self.mark(f"asks whether a tensor tracks gradients ({name})", sys._getframe(2))
        if action == "read":
            self.event(func, args, kwargs, f"reads tensor data into Python ({name.strip('_')})")
            found = self.run(func, args, kwargs)
            for tensor in found if isinstance(found, tuple) else (found,):  # where(mask), nonzero(), unique()
                if isinstance(tensor, Tensor) and id(tensor) not in self.known:
                    self.add(tensor, "constant", name.strip("_"))
            return found
        elif action == "iterate" and args[0].dim() > 0:  # ``for row in x``
            return iter(self.call(Tensor.unbind, (args[0], 0), {}, "unbind"))
        elif action == "set":
            self.keep(args[:1])
            held = self.attributes.get(id(args[0]), "a tensor")
            self.event(func, args, kwargs, f"sets the {func.__self__.__name__} of {held}")
        elif action == "backward":
            if self.kept is not None:
                self.kept.before_backward()
            self.event(func, args, kwargs, "runs a backward pass")
        elif action == "dtype":
            self.trace.reads_dtype = True
            if name == "type" and (len(args) > 1 or kwargs):  # x.type(torch.float32), x.type("torch.FloatTensor")
                return self.call(Tensor.to, (args[0], func(*args, **kwargs).dtype), {}, "to")
        elif action == "tracking":
            at = self.stack[-1] if self.stack else -1
            self.switches.thrown(bool(args[0]), sys._getframe(2), at, len(self.trace.events))
        return self.run(func, args, kwargs)

    def call(self, func: Any, args: Any, kwargs: dict[str, Any], name: str) -> Any:
        """An operation. Runs with this mode off, as all of ``__torch_function__``."""
        known, attributes = self.known, self.attributes
        tensors: list[Tensor] = []
        described: list[Any] = []
        for arg in args:
            ref = known.get(id(arg))
            if ref is not None:
                described.append(ref)
                tensors.append(arg)
            elif (kind := type(arg)) in PLAIN:
                described.append(arg)
            elif kind is nn.Parameter and id(arg) in attributes:
                described.append(self._add(arg, "attribute", attributes[id(arg)]))
                tensors.append(arg)
            else:
                described.append(self.describe(arg, tensors))
        described_kwargs = self.describe(kwargs, tensors) if kwargs else {}
        if transforming():
            self.mark(_TRANSFORM, sys._getframe(1))
        self._check_saving(sys._getframe(1))
        if name[-1] == "_" or name in MAYBE_IN_PLACE or kwargs:
            self._before_write(name, args, kwargs, tensors)
        before = _versions(tensors)
        if name in UNCHECKED:
            UNCHECKED[name](*args, **kwargs)
        cast = Watched(lambda *a, **k: self.run(func, a, k), args, kwargs) if any_autocast_enabled() else None
        out = self.run(func, args, kwargs) if cast is None else cast.out
        mutated: tuple[int, ...] = ()
        after = _versions(tensors)
        if before != after:
            # Views share their base's version counter; the one that was written is the first argument (or, for out=, the keyword).
            changed = [tensor for tensor, old, new in zip(tensors, before, after, strict=True) if old != new]
            mutated = tuple(dict.fromkeys(known[id(tensor)].value for tensor in changed))
        poison = ""
        if kwargs and kwargs.get("out") is not None:
            poison = "writes through out="
        elif not torch.is_grad_enabled():
            poison = "" if self.loose.all(mutated) else self.loose.why_not(mutated, name)
            poison = poison if self.switches.untracked else _UNTRACKED
        else:
            for tensor in tensors:
                if type(tensor) is nn.Parameter and tensor.grad_fn is not None:
                    poison = "computes with a Parameter that is not a leaf"
        if name == "contiguous" and len(args) == 1 and not kwargs and out is args[0] and type(out) is Tensor:
            # Of more rows it may be a copy: a call either way. Under ``no_grad`` a call would cut its history off.
            out = out if self.switches.untracked else out.view_as(out)
        made: Any
        if type(out) is Tensor:
            made = known.get(id(out)) or self._add(out, "made")
        else:
            made = self.outputs(out)
            if not poison and not _only_tensors(out) and name != "__setitem__":
                poison = f"takes a Python value out of {func.__name__}"
        if self.switches.untracked or mutated or not tensors:
            self._note_loose(made, mutated, [known[id(tensor)].value for tensor in tensors])
        if name in FROM_DATA and type(out) is Tensor and not tensors[1:]:
            func, described, described_kwargs, poison = self._spelled_out(func, described, args, described_kwargs, out, poison)
        if name in ("as_strided", "as_strided_"):
            self.trace.strides.update(self.stack[-1:])
            if tensors and self.trace.values[known[id(tensors[0])].value].origin == "made":
                poison = poison or "reads memory by strides of a tensor that it computes (as_strided)"
        if name in DATA_SHAPED and not poison and DATA_SHAPED[name](args, kwargs):
            poison = f"makes a tensor whose size depends on the data ({name.strip('_')})"
        frame = self.stack[-1] if self.stack else -1
        place = self.place(sys._getframe(1))
        events = self.trace.events
        if cast is not None:
            self.trace.casts = True
            try:
                target = cast.target()
            except Unrepeatable:
                poison = poison or f"autocast casts inside of {name.strip('_')}, which a graph does not repeat"
            else:
                if target is not None:
                    described = [self._cast(arg, target, place) for arg in args]
                    described_kwargs = {key: self._cast(arg, target, place) for key, arg in kwargs.items()}
        if not self.switches.untracked or poison or mutated:
            untracked = self.switches.untracked and not poison
            events.append(Event(func, tuple(described), described_kwargs, made, mutated, place, frame, poison, untracked))
            return out
        # ``f(x)`` under ``no_grad`` is ``f(x).detach()``: a graph holds that, not the switch.
        results = [made] if isinstance(made, Ref) else made if isinstance(made, list) else []
        detached: list[Event] = []
        for index, ref in enumerate(results):
            with_gradient = self._with_gradient(ref, tensors) if isinstance(ref, Ref) else None
            if with_gradient is not None:
                results[index] = with_gradient
                if self.trace.values[with_gradient.value].storage == self.trace.values[ref.value].storage:
                    self.trace.untracked_views.add(ref.value)
                detached.append(Event(Tensor.detach, (with_gradient,), {}, ref, (), place, frame))
        if isinstance(made, Ref):
            made = results[0]
        events.append(Event(func, tuple(described), described_kwargs, made, (), place, frame, untracked=True))
        events.extend(detached)
        return out

    def _note_loose(self, made: Any, mutated: tuple[int, ...], arguments: list[int]) -> None:
        """Keep account of the memory that has no history."""
        if mutated and not self.switches.untracked:
            self.loose.written(mutated, arguments)
        for ref in (made,) if isinstance(made, Ref) else made if isinstance(made, list) else ():
            if isinstance(ref, Ref) and ref.value not in arguments:
                self.loose.made(self.trace.values[ref.value], arguments, self.switches.untracked)

    def _cast(self, tree: Any, dtype: torch.dtype, place: Place | None) -> Any:
        """``tree``, described, with each of its tensors cast as autocast does: a call of its own."""
        if isinstance(tree, (tuple, list)):
            return type(tree)([self._cast(item, dtype, place) for item in tree])
        if not isinstance(tree, Tensor) or not to_cast(tree, dtype):
            return self.describe(tree)
        made = self._add(tree.to(dtype), "made")
        frame = self.stack[-1] if self.stack else -1
        event = Event(autocast_to, (self.number(tree), dtype), {}, made, (), place, frame, untracked=self.switches.untracked)
        self.trace.events.append(event)
        return made

    def _with_gradient(self, ref: Ref, arguments: list[Tensor]) -> Ref | None:
        """A value for what an untracked call computes before it is detached; None where there is nothing to detach."""
        values = self.trace.values
        seen = values[ref.value]
        if not (seen.tensor.is_floating_point() or seen.tensor.is_complex()) or any(seen.tensor is tensor for tensor in arguments):
            return None
        is_view = any(values[self.known[id(tensor)].value].storage == seen.storage for tensor in arguments)
        # Not the storage of its detached self, unless that is a view: a write to the one is none to the other.
        values.append(Value(seen.tensor, seen.origin, seen.name, seen.storage if is_view else -len(values), seen.shape, seen.stride))
        return Ref(len(values) - 1)

    def _spelled_out(self, func: Any, described: list[Any], args: Any, kwargs: Any, out: Tensor, poison: str) -> tuple[Any, Any, Any, str]:
        """A tensor made of a numpy array: the same made of its numbers, which a graph can hold."""
        if not any(type(arg).__module__ == "numpy" for arg in args) or out.requires_grad or poison:
            return func, described, kwargs, poison
        if out.numel() > MOST_NUMBERS:
            return func, described, kwargs, f"makes a tensor of a numpy array of {out.numel():,} numbers"
        return torch.tensor, [out.tolist()], {"dtype": out.dtype, "device": out.device}, poison

    def mark(self, reason: str, frame: FrameType) -> None:
        """The call that runs now does what no graph repeats, beside its operations."""
        if self.stack and not self.trace.frames[self.stack[-1]].poison:
            found = self.trace.frames[self.stack[-1]]
            found.poison, found.place = reason, self.place(frame) or found.place

    def _check_saving(self, frame: FrameType) -> None:
        """A graph has no contexts: calls that switch such hooks stay as they are. What is called under them as a whole may be a region."""
        now = saved_hooks()
        for found in (self.trace.frames[index] for index in reversed(self.stack)):
            if found.saved_hooks == now:
                return
            if not found.poison:
                found.poison, found.place = _SAVED, self.place(frame) or found.place

    def layout(self, func: Any, args: Any, kwargs: Any, name: str) -> Any:
        """How a tensor lies in memory. Where inputs lie in rows, sizes say it all."""
        frame, tensor = sys._getframe(3), args[0]
        if not is_internal(frame.f_code.co_filename):
            self.trace.strides.update(self.stack[-1:])
            if name == "stride" and tensor.is_contiguous():
                sizes = self.sizes_of(tensor)
                steps: list[int] = []
                step: int = 1
                for size in reversed(sizes):
                    steps.insert(0, step)
                    step = size * step
                dim = args[1] if len(args) > 1 else kwargs.get("dim")
                return tuple(steps) if dim is None else steps[dim]
            if name == "stride":
                self.mark("reads the strides of a tensor that does not lie in rows", frame)
        return func(*args, **kwargs)

    def event(self, func: Any, args: Any, kwargs: Any, poison: str) -> None:
        """A call that is no operation, about to be made."""
        frame = self.stack[-1] if self.stack else -1
        place = self.place(sys._getframe(1))
        self.trace.events.append(Event(func, self.describe(args), self.describe(kwargs), None, (), place, frame, poison))

    def place(self, frame: FrameType | None) -> Place | None:
        """The innermost line, from ``frame`` outwards, that is neither torch's nor ours; None above the recorded call."""
        while frame is not None:
            code = frame.f_code
            if code is _ENTER_CODE:  # from here on outwards the module call has looked already
                return self.trace.frames[self.stack[-1]].place if self.stack else None
            file = code.co_filename
            internal = INTERNAL.get(file)
            if not (is_internal(file) if internal is None else internal):
                line = (file, frame.f_lineno)
                return self.places.get(line) or self.places.setdefault(line, Place(*line))
            if code is _RUN_CODE:
                return None
            frame = frame.f_back
        return None

    # -- what must be as it was -----------------------------------------------------------------------------------------------------

    def _before_write(self, name: str, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> None:
        writes = (name[-1:] == "_" and not name.endswith("__")) or name in IN_PLACE or kwargs.get("out") is not None
        writes = writes or name in ("batch_norm", "instance_norm")  # running statistics
        if not writes and name in MAYBE_IN_PLACE:
            flag = any(arg is True for arg in args) or bool(kwargs.get("inplace"))
            writes = flag or kwargs.get("max_norm") is not None or (name.startswith("embedding") and len(args) > 3 and args[3] is not None)
        if writes:
            self.keep(tensors)

    def keep(self, tensors: Any) -> None:
        """Before a call that may write into ``tensors``: keep what the inputs and the model hold in the same memory."""
        if self.kept is not None:
            for tensor in tensors:
                self.kept.before_write(self.trace.values[self.number(tensor).value].storage)

    def touch(self, path: str, name: str, write: bool, value: Any) -> None:
        """A watched attribute is read or written."""
        frame, place = (self.stack[-1] if self.stack else -1), self.place(sys._getframe(1))
        self.trace.touches.append(Touch(path, name, write, value, frame, len(self.trace.events), place))

    def assign(self, path: str, name: str, before: Tensor, value: Tensor) -> None:
        """A registered buffer is set to another tensor; ``before`` is what it was when the run began."""
        frame, place = (self.stack[-1] if self.stack else -1), self.place(sys._getframe(1))
        old, new = self.number(before).value, self.number(value).value
        self.trace.assigned.append(Assignment(path, name, old, new, frame, len(self.trace.events), place))

    # -- sizes --------------------------------------------------------------------------------------------------------------------

    def sizes_of(self, tensor: Tensor) -> tuple[int, ...]:
        number = self.number(tensor).value
        with DisableTorchFunction():
            shape = tuple(tensor.shape)
        self.note_comparisons()
        return tuple([TracedInt.make(size, SizeOf(number, dim), self.sizes) for dim, size in enumerate(shape)])

    def size(self, func: Any, args: Any, kwargs: Any) -> Any:
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        sizes = self.sizes_of(args[0])
        if dim is None:
            return torch.Size(sizes)
        return sizes[dim] if isinstance(dim, int) else func(*args, **kwargs)

    def numel(self, tensor: Tensor) -> int:
        total: int = 1
        for size in self.sizes_of(tensor):
            total = size * total
        return total

    def note_comparisons(self) -> None:
        """Comparisons are logged by the sizes themselves; give those since the last look their frame and line."""
        if self.sizes:
            frame, place = (self.stack[-1] if self.stack else -1), self.place(sys._getframe(1))
            self.trace.comparisons.extend((comparison, frame, place) for comparison in self.sizes)
            self.sizes.clear()

    # -- frames -------------------------------------------------------------------------------------------------------------------

    def enter(self, path: str, module: nn.Module, forward: Callable[..., Any], poison: str, /, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the ``forward`` of ``module``. Runs with this mode on."""
        heard = self.ears.close()
        try:
            return self.called(path, module, forward, poison, args, kwargs)
        finally:
            if heard:
                self.ears.open()

    def called(self, path: str, module: nn.Module, forward: Callable[..., Any], poison: str, args: Any, kwargs: Any) -> Any:
        """One call of ``module``, from ``enter``: its frame, and what its forward returns."""
        trace, known, stack = self.trace, self.known, self.stack
        ref = known.get(id(args[0])) if len(args) == 1 and not kwargs else None
        given: Contents | None = None
        if ref is not None:  # one tensor: the usual call
            leaves, spec = [ref], _ONE_TENSOR
        else:
            given = Contents((*args, *kwargs.values()))
            flat, spec = tree_flatten((args, kwargs))
            leaves = [self.describe(leaf) for leaf in flat]
        if transforming():
            self.mark(_TRANSFORM, sys._getframe(2))
            poison = poison or _TRANSFORM
        self._check_saving(sys._getframe(2))
        index = len(trace.frames)
        parent = stack[-1] if stack else -1
        if self.sizes:
            self.note_comparisons()
        frame = Frame(index, parent, path, module, leaves, spec, len(trace.events))
        frame.raw = (args, kwargs)
        frame.untracked, frame.saved_hooks = self.switches.untracked, saved_hooks()
        if not torch.is_grad_enabled() and not self.switches.untracked:
            frame.switched = _UNTRACKED
        elif autocast_on() != self.autocast:
            frame.switched = _AUTOCAST
        frame.place = self.place(sys._getframe(2))
        frame.poison = poison
        trace.frames.append(frame)
        if parent >= 0:
            trace.frames[parent].children.append(index)
        stack.append(index)
        tracking = torch.is_grad_enabled()
        own = module.__dict__
        before = list(own.values())
        first = len(trace.values)
        try:
            deaf = not poison and runs_torch_only(type(module))
            out = forward(*args, **kwargs) if deaf else self.run(forward, args, kwargs)
            out = laid_out(module, forward, args, kwargs, out)
            fresh = type(out) is Tensor and ((made := known.get(id(out))) is None or made.value >= first)  # the usual result
            closed = not fresh and (id(module) in self.hooked or frame.poison)
            if closed or (not fresh and any(e.poison for e in trace.events[frame.start :] if e.frame == index)):
                out = apart(out, lambda tensor: id(tensor) in known and known[id(tensor)].value < first)
            frame.sets_own = len(own) != len(before) or not all(map(is_, own.values(), before))
            if given is not None and given.held and (changed := given.changed()):
                frame.poison = frame.poison or f"changes the {changed} that it was given"
            if torch.is_grad_enabled() != tracking or self.switches.lasting:  # for whoever called it, too: only the calls do that
                for outer in stack:
                    trace.frames[outer].poison = trace.frames[outer].poison or (_LASTING if self.switches.lasting else _UNTRACKED)
                self.switches.lasting = False
        finally:
            if self.sizes:
                self.note_comparisons()
            stack.pop()
            frame.end = len(trace.events)
        ref = known.get(id(out))
        if ref is not None:
            frame.out, frame.out_spec = [ref], _TENSOR
        else:
            flat, frame.out_spec = tree_flatten(opened(out))
            frame.out = [self.describe(leaf) for leaf in flat]
        return out


_ENTER_CODE = Recorder.enter.__code__


def _versions(tensors: list[Tensor]) -> list[int]:
    """How often each tensor was written so far."""
    try:
        return [version(tensor) for tensor in tensors]
    except RuntimeError:  # inference tensors do not count
        return [0 if tensor.is_inference() else version(tensor) for tensor in tensors]


def _only_tensors(tree: Any) -> bool:
    if isinstance(tree, (tuple, list)):
        return all(_only_tensors(item) for item in tree)
    return tree is None or isinstance(tree, Tensor)


def run_watched(recorder: Recorder, model: nn.Module, args: Any, kwargs: Any) -> None:
    """``model(*args, **kwargs)`` under ``recorder``."""
    before = foreign_random_state()
    with moves_noted(recorder.trace), code_noted(recorder.trace, recorder.stack, is_internal, recorder.ears), recorder:
        model(*args, **kwargs)
    recorder.trace.draws = foreign_random_state() != before


_RUN_CODE = run_watched.__code__
