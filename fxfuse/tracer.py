"""Record one real run of a model: every torch call, every module call, every size that Python looked at.

Comes in: a model (a private copy) and its inputs. Goes out: a ``Trace``. Any Python runs, because nothing is replaced by proxies: a
``TorchFunctionMode`` watches the real tensors of one eager call. Where Python reads data out of a tensor (``bool(t)``, ``.item()``), runs
without gradient tracking (a custom autograd Function, ``no_grad``) or otherwise does what a graph cannot repeat, the event is
marked (``Event.poison``): a region must not contain it.

A model of a thousand lanes makes ten thousand calls, so the common case (plain tensors and numbers in, one tensor out) is kept short.
"""

from __future__ import annotations

import os
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from operator import is_, itemgetter
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxfuse.private.autocast import any_autocast_enabled, autocast_on
from fxfuse.private.module_hooks import HOOK_DICTS, has_hooks
from fxfuse.private.pytree import tree_flatten
from fxfuse.private.tensor_hooks import hook_stores
from fxfuse.private.torch_function import DisableTorchFunction
from fxfuse.private.transforms import transforming
from fxfuse.private.versions import version

from .attributes import settle, watching
from .casts import Unrepeatable, Watched, casts_not_kept, to_cast
from .containers import opened
from .contents import Contents
from .determinism import foreign_random_state, preserved_state
from .graph import Place
from .idle_draws import idle_draws_unseen
from .moves import moves_noted
from .outside import Change, Generators, Globals, drawing, draws_itself, is_generator, line_of_attribute
from .passes.functional import autocast_to
from .ran import Ears, code_noted
from .sizes import SizeOf, TracedInt, plain
from .step_by_step import step_by_step
from .trace import MOST_NUMBERS, Event, Frame, Key, Ref, Touch, Trace, Value
from .unchecked import UNCHECKED
from .unregistered import hidden_parameters, unregistered

_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_INTERNAL: dict[str, bool] = {}  # file -> is it torch's, or ours?

# What a torch call means to the recorder, by the function's name. Every other name is an operation.
_ACTIONS: dict[str, str] = {
    # Facts which the guard checks at every call, or that say nothing of the data.
    **dict.fromkeys(
        "dim ndim ndimension device layout is_cuda is_cpu is_sparse "
        "is_quantized is_mkldnn is_meta is_mps is_mtia is_xpu is_signed is_nested is_inference is_conj is_neg get_device names has_names "
        "_backward_hooks is_sparse_csr is_ipu is_maia is_vulkan is_xla is_hpu is_distributed is_shared is_pinned "
        "__len__ set_grad_enabled".split(),
        "fact",
    ),
    **dict.fromkeys("requires_grad is_leaf grad_fn _is_view".split(), "gradient"),
    **dict.fromkeys("is_contiguous stride storage_offset".split(), "layout"),
    **dict.fromkeys("dtype type element_size itemsize nbytes is_floating_point is_complex finfo".split(), "dtype"),
    **dict.fromkeys(
        "__bool__ item tolist numpy __array__ __float__ __int__ __index__ __contains__ __complex__ equal allclose is_nonzero "
        "nonzero argwhere unique unique_consecutive masked_select data_ptr storage untyped_storage __repr__ __str__ __format__ "
        "_unique _unique2 unique_dim __dlpack__ bincount histc cpu_numpy".split(),
        "read",
    ),
    "multi_head_attention_forward": "open", "_set_grad_enabled": "tracking",
    "size": "size", "numel": "numel", "nelement": "numel", "__iter__": "iterate", "__set__": "set", "backward": "backward",
}  # fmt: skip
# Of the same name as a property and as a method: only the property is a plain fact.
_PROPERTIES = _ACTIONS | {"shape": "shape"}
_IN_PLACE = frozenset(f"__{sign}__" for sign in "setitem iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift".split())
_MAYBE_IN_PLACE = frozenset(
    name
    for name, function in vars(nn.functional).items()
    if {"inplace", "max_norm"} & {*getattr(getattr(function, "__code__", None), "co_varnames", ())}
)
_USUAL = frozenset(name for name, value in nn.Module().__dict__.items() if value == {} or value == set()) - {"_parameters", "_modules"}
_usual = itemgetter(*sorted(_USUAL))
_STORES = frozenset(nn.Module().__dict__)


def _has_mask(args: Any, kwargs: Any) -> bool:
    """Does an index hold a boolean tensor?"""
    index = args[1] if isinstance(args[1], (tuple, list)) else (args[1],)
    return any(isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8) for item in index)


def _has_tensor(args: Any, kwargs: Any) -> bool:
    return any(isinstance(arg, Tensor) for arg in (*args, *kwargs.values()))


# Calls whose result has another size on other data, where this is true of their arguments. (More such are among the reads above.)
_DATA_SHAPED: dict[str, Callable[[Any, Any], bool]] = {
    "__getitem__": _has_mask,
    "where": lambda args, kwargs: len(args) + len(kwargs) == 1,
    "one_hot": lambda args, kwargs: [*args[1:], *kwargs.values()][:1] in ([], [-1]),
    "repeat_interleave": lambda args, kwargs: isinstance(kwargs.get("repeats", args[1] if len(args) > 1 else None), Tensor),
    **dict.fromkeys(("arange", "range"), _has_tensor),
    **dict.fromkeys(("_pack_padded_sequence", "_pad_packed_sequence"), lambda args, kwargs: True),
}
# Calls that make a tensor of data.
_FROM_DATA = frozenset(("tensor", "as_tensor", "asarray", "new_tensor"))
_UNTRACKED = "runs without gradient tracking (no_grad, or a custom autograd Function)"
_AUTOCAST = "switches autocast"
_TRANSFORM = "runs inside a transform of torch.func (vmap, grad and their like)"
# Types of arguments that stand for themselves in the record.
_PLAIN = frozenset((int, float, bool, str, type(None), type(Ellipsis), complex, torch.dtype, torch.device))
_ONE_TENSOR = tree_flatten(((torch.empty(0),), {}))[1]
_TENSOR = tree_flatten(torch.empty(0))[1]


def _is_internal(file: str) -> bool:
    """Is this file torch's or ours, or no file at all?"""
    known = _INTERNAL.get(file)
    if known is None:
        known = _INTERNAL[file] = os.path.abspath(file).startswith((_TORCH, _HERE)) or file.startswith("<")
    return known


is_internal = _is_internal  # for graphs whose nodes say which lines they came from


def _no_hook(*args: Any, **kwargs: Any) -> None:
    return None


@contextmanager
def hooks_silent(model: nn.Module) -> Iterator[None]:
    """Hooks on the modules and Parameters of ``model`` do nothing inside: trial runs are none of theirs."""
    silenced: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
    for module in model.modules():
        stores = [module.__dict__.get(name) for name in HOOK_DICTS]
        for parameter in module._parameters.values():
            if parameter is not None:
                stores += hook_stores(parameter)
        for store in stores:
            if store and not any(store is known for known, _ in silenced):
                silenced.append((store, dict(store)))
                store.update(dict.fromkeys(store, _no_hook))
    try:
        yield
    finally:
        for store, kept in silenced:
            store.update(kept)


class Recorder(TorchFunctionMode):
    """Watches one run. ``attributes`` maps ``id(tensor)`` to the path of every tensor that the model's modules hold."""

    def __init__(self, attributes: dict[int, str]) -> None:
        super().__init__()
        self.trace = Trace([], [], [], [])
        self.attributes = attributes
        self.known: dict[int, Ref] = {}  # by id of the tensor; the trace keeps them alive
        self.stack: list[int] = []
        self.sizes: list[Any] = []
        self.places: dict[tuple[str, int], Place] = {}
        self.autocast = autocast_on()
        self.trace.autocast = next(iter(self.autocast), None)
        self.kept: _Kept | None = None
        self.generators = Generators([])
        self.ears = Ears()
        self.untracked = False  # inside of ``no_grad``
        self.in_function = False  # a custom autograd Function was seen, which switches tracking off unseen

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
        values.append(Value(tensor, origin, name, storage, tuple(tensor.shape)))
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
        if type(tree) in _PLAIN:
            return tree
        if isinstance(tree, Tensor):
            if tensors is not None:
                tensors.append(tree)
            return self.number(tree)
        if isinstance(tree, TracedInt):
            return tree.expr if tree.log is self.sizes else plain(tree)
        if isinstance(tree, tuple):
            return tuple([item if type(item) in _PLAIN else self.describe(item, tensors) for item in tree])
        if isinstance(tree, list):
            return [self.describe(item, tensors) for item in tree]
        if isinstance(tree, dict):
            return {key: self.describe(item, tensors) for key, item in tree.items()}
        if isinstance(tree, slice):
            if type(tree.start) in _PLAIN and type(tree.stop) in _PLAIN and type(tree.step) in _PLAIN:
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
        self.ears.close()
        try:
            return self.meaning(func, args, kwargs)
        finally:
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
        action = _ACTIONS.get(name)
        if action is None:
            if name != "__get__":
                return self.call(func, args, kwargs or {}, name)
            name = func.__self__.__name__
            action = _PROPERTIES.get(name)
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
        if action == "gradient" and not _is_internal(sys._getframe(2).f_code.co_filename):
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
            self.event(func, args, kwargs, f"sets the {func.__self__.__name__} of a tensor")
        elif action == "backward":
            if self.kept is not None:
                self.kept.before_backward()
            self.event(func, args, kwargs, "runs a backward pass")
        elif action == "dtype":
            self.trace.reads_dtype = True
            if name == "type" and (len(args) > 1 or kwargs):  # x.type(torch.float32), x.type("torch.FloatTensor")
                return self.call(Tensor.to, (args[0], func(*args, **kwargs).dtype), {}, "to")
        elif action == "tracking":
            self._tracking(bool(args[0]))
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
            elif (kind := type(arg)) in _PLAIN:
                described.append(arg)
            elif kind is nn.Parameter and id(arg) in attributes:
                described.append(self._add(arg, "attribute", attributes[id(arg)]))
                tensors.append(arg)
            else:
                described.append(self.describe(arg, tensors))
        described_kwargs = self.describe(kwargs, tensors) if kwargs else {}
        if transforming():
            self.mark(_TRANSFORM, sys._getframe(1))
        if name[-1] == "_" or name in _MAYBE_IN_PLACE or kwargs:
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
            poison = _UNTRACKED if mutated or not self.untracked else ""
        else:
            for tensor in tensors:
                if type(tensor) is nn.Parameter and tensor.grad_fn is not None:
                    poison = "computes with a Parameter that is not a leaf"
        made: Any
        if type(out) is Tensor:
            made = known.get(id(out)) or self._add(out, "made")
        else:
            made = self.outputs(out)
            if not poison and not _only_tensors(out) and name != "__setitem__":
                poison = f"takes a Python value out of {func.__name__}"
        if name in _FROM_DATA and type(out) is Tensor and not tensors[1:]:
            func, described, described_kwargs, poison = self._spelled_out(func, described, args, described_kwargs, out, poison)
        if name in ("as_strided", "as_strided_"):
            self.trace.strides.update(self.stack[-1:])
            if tensors and self.trace.values[known[id(tensors[0])].value].origin == "made":
                poison = poison or "reads memory by strides of a tensor that it computes (as_strided)"
        if name in _DATA_SHAPED and not poison and _DATA_SHAPED[name](args, kwargs):
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
        if not self.untracked or poison or mutated:
            events.append(Event(func, tuple(described), described_kwargs, made, mutated, place, frame, poison))
            return out
        # ``f(x)`` under ``no_grad`` is ``f(x).detach()``: a graph holds that, not the switch.
        results = [made] if isinstance(made, Ref) else made if isinstance(made, list) else []
        detached: list[Event] = []
        for index, ref in enumerate(results):
            with_gradient = self._with_gradient(ref, tensors) if isinstance(ref, Ref) else None
            if with_gradient is not None:
                results[index] = with_gradient
                detached.append(Event(Tensor.detach, (with_gradient,), {}, ref, (), place, frame))
        if isinstance(made, Ref):
            made = results[0]
        events.append(Event(func, tuple(described), described_kwargs, made, (), place, frame, untracked=True))
        events.extend(detached)
        return out

    def _cast(self, tree: Any, dtype: torch.dtype, place: Place | None) -> Any:
        """``tree``, described, with each of its tensors cast as autocast does: a call of its own."""
        if isinstance(tree, (tuple, list)):
            return type(tree)([self._cast(item, dtype, place) for item in tree])
        if not isinstance(tree, Tensor) or not to_cast(tree, dtype):
            return self.describe(tree)
        made = self._add(tree.to(dtype), "made")
        frame = self.stack[-1] if self.stack else -1
        self.trace.events.append(Event(autocast_to, (self.number(tree), dtype), {}, made, (), place, frame, untracked=self.untracked))
        return made

    def _with_gradient(self, ref: Ref, arguments: list[Tensor]) -> Ref | None:
        """A value for what an untracked call computes before it is detached; None where there is nothing to detach."""
        values = self.trace.values
        seen = values[ref.value]
        if not (seen.tensor.is_floating_point() or seen.tensor.is_complex()) or any(seen.tensor is tensor for tensor in arguments):
            return None
        is_view = any(values[self.known[id(tensor)].value].storage == seen.storage for tensor in arguments)
        # Not the storage of its detached self, unless that is a view: a write to the one is none to the other.
        values.append(Value(seen.tensor, seen.origin, seen.name, seen.storage if is_view else -len(values), seen.shape))
        return Ref(len(values) - 1)

    def _tracking(self, on: bool) -> None:
        """``no_grad`` and its like, about to switch. A switch inside of a custom autograd Function says nothing on what is around it."""
        if not torch.is_grad_enabled() and not self.untracked:
            self.in_function = True
        self.untracked = not on and not self.in_function

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

    def layout(self, func: Any, args: Any, kwargs: Any, name: str) -> Any:
        """How a tensor lies in memory. Where inputs lie in rows, sizes say it all."""
        frame, tensor = sys._getframe(3), args[0]
        if not _is_internal(frame.f_code.co_filename):
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
            internal = _INTERNAL.get(file)
            if not (_is_internal(file) if internal is None else internal):
                line = (file, frame.f_lineno)
                return self.places.get(line) or self.places.setdefault(line, Place(*line))
            if code is _RUN_CODE:
                return None
            frame = frame.f_back
        return None

    # -- what must be as it was -----------------------------------------------------------------------------------------------------

    def _before_write(self, name: str, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> None:
        writes = (name[-1:] == "_" and not name.endswith("__")) or name in _IN_PLACE or kwargs.get("out") is not None
        writes = writes or name in ("batch_norm", "instance_norm")  # running statistics
        if not writes and name in _MAYBE_IN_PLACE:
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
        self.ears.close()
        try:
            return self.called(path, module, forward, poison, args, kwargs)
        finally:
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
        index = len(trace.frames)
        parent = stack[-1] if stack else -1
        if self.sizes:
            self.note_comparisons()
        frame = Frame(index, parent, path, module, leaves, spec, len(trace.events))
        frame.raw = (args, kwargs)
        frame.untracked = self.untracked
        if not torch.is_grad_enabled() and not self.untracked:
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
        try:
            out = self.run(forward, args, kwargs)
            frame.sets_own = len(own) != len(before) or not all(map(is_, own.values(), before))
            if given is not None and given.held and (changed := given.changed()):
                frame.poison = frame.poison or f"changes the {changed} that it was given"
            if torch.is_grad_enabled() != tracking:  # for whoever called it, too: only the calls themselves do that
                for outer in stack:
                    trace.frames[outer].poison = trace.frames[outer].poison or _UNTRACKED
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


class _Kept:
    """What the run may not change although it writes there: the inputs, and tensors that the model shares with the user's model."""

    def __init__(self, inputs: list[Tensor], watched: list[_Watched]) -> None:
        self.inputs, self.watched = inputs, watched
        self.by_storage: dict[int, list[Tensor]] | None = None
        self.saved: list[tuple[Tensor, Tensor, Tensor, bool]] = []
        self.grads: list[tuple[Tensor, Tensor | None, Tensor | None]] = []

    def _tensors(self) -> list[Tensor]:
        held = [tensor for each in self.watched for store in (each.values.get("_parameters", {}), each.values) for tensor in store.values()]
        return list({id(tensor): tensor for tensor in (*self.inputs, *held) if isinstance(tensor, Tensor)}.values())

    def before_write(self, storage: int) -> None:
        """Keep what lies in this storage."""
        if self.by_storage is None:
            self.by_storage = {}
            for tensor in self._tensors():
                if tensor.layout is torch.strided:
                    self.by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
        for tensor in self.by_storage.pop(storage, ()):
            self.saved.append((tensor, tensor.data, _once(tensor.data).clone(), tensor.requires_grad))

    def before_backward(self) -> None:
        """Keep all gradients."""
        if not self.grads:
            for tensor in self._tensors():
                if tensor.is_leaf:
                    self.grads.append((tensor, tensor.grad, None if tensor.grad is None else tensor.grad.clone()))

    def restore(self) -> None:
        with torch.no_grad():
            for tensor, data, values, requires_grad in self.saved:
                _once(data).copy_(values)
                if tensor.data_ptr() != data.data_ptr() or tensor.shape != data.shape or tensor.stride() != data.stride():
                    tensor.data = data
                if tensor.requires_grad is not requires_grad and tensor.is_leaf:
                    tensor.requires_grad_(requires_grad)
            for tensor, grad, before in self.grads:
                if grad is not None and before is not None:
                    grad.copy_(before)
                tensor.grad = grad


def _once(tensor: Tensor) -> Tensor:
    """Each number of an expanded tensor once."""
    for dim, (size, step) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if step == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


class _Watched:
    """One module during a run: its forward reports to the recorder, its hooks are off; afterwards everything is as it was."""

    __slots__ = ("empty", "filled", "hooks", "module", "objects", "path", "values")

    def __init__(self, path: str, module: nn.Module, attributes: dict[int, str], generators: list[Any]) -> None:
        self.path, self.module = path, module
        own = module.__dict__
        self.values = dict(own)
        self.empty: list[Any] = []  # containers
        usual: frozenset[str] = frozenset()  # containers that every module has and that are empty in most
        if own.keys() >= _USUAL and not any(found := _usual(own)):
            usual = _USUAL
            self.empty.extend(found)
        self.filled: list[tuple[str, Any, Any]] = []  # containers, and copies of them
        self.hooks: list[str] = []
        self.objects: list[tuple[str, Any]] = []  # what may hold more than is compared here: objects, containers of containers
        for name, value in own.items():
            kind = type(value)
            if kind in _PLAIN or name in usual:
                continue
            if kind is OrderedDict or kind is dict or kind is set or isinstance(value, (list, dict, set, deque)):
                if not value:
                    self.empty.append(value)
                elif name in HOOK_DICTS:
                    self.hooks.append(name)
                else:
                    self.filled.append((name, value, kind(value) if kind in (dict, list, set) else list(_items(value))))
                    if name == "_parameters" or name == "_buffers":
                        for key, tensor in value.items():
                            if tensor is not None:
                                attributes.setdefault(id(tensor), f"{path}.{key}" if path else key)
            elif isinstance(value, Tensor):
                attributes.setdefault(id(value), f"{path}.{name}" if path else name)
            elif is_generator(value):
                generators.append(value)
            if name not in _STORES and not isinstance(value, (Tensor, nn.Module)):
                self.objects.append((name, value))

    def start(self, recorder: Recorder) -> None:
        own = self.module.__dict__
        for name in self.hooks:
            own[name] = type(own[name])()
        if not isinstance(self.module, torch.jit.ScriptModule):
            replaced = own.get("forward")
            forward = type(self.module).forward.__get__(self.module) if replaced is None else replaced
            poison = "" if replaced is None else "its forward was replaced on the instance"
            watched = own["forward"] = partial(recorder.enter, self.path, self.module, forward, poison)
            watched.__wrapped__ = forward  # type: ignore[attr-defined]  # for inspect.signature(self.forward)

    def stop(self) -> tuple[str, dict[str, Any]]:
        """Put everything back. What else than an attribute was changed (a container, a Parameter), or nothing; the attributes."""
        own, values = self.module.__dict__, self.values
        changed = ""
        attributes: dict[str, Any] = {}
        for name in self.hooks:
            own[name] = values[name]
        if "forward" in values:
            own["forward"] = values["forward"]
        else:
            own.pop("forward", None)
        if len(own) != len(values) or not all(map(is_, own.values(), values.values())):
            attributes.update((name, value) for name, value in own.items() if values.get(name, values) is not value)
            attributes.update((name, None) for name in values.keys() - own.keys())
            own.clear()
            own.update(values)  # also in their order
        if any(self.empty):
            for name, value in values.items():
                if any(value is container for container in self.empty) and value:
                    changed = _changed_name(name, value, ())
                    value.clear()
        for name, value, before in self.filled:
            if not _same_items(value, before):
                changed = _changed_name(name, value, before)
                value.clear()
                getattr(value, "extend" if isinstance(value, (list, deque)) else "update")(before)
        return changed, attributes


def _items(container: Any) -> Any:
    return container.items() if isinstance(container, dict) else container


def _same_items(container: Any, before: Any) -> bool:
    """Does ``container`` hold the very objects that it held?"""
    if len(container) != len(before):
        return False
    if type(before) is dict:  # as they lie, which is as they were unless something changed
        return all(map(is_, container, before)) and all(map(is_, container.values(), before.values()))
    if type(before) is set:
        return all(item in before for item in container)
    if isinstance(container, dict):
        return all(key is a and value is b for (key, value), (a, b) in zip(container.items(), before, strict=True))
    return all(map(is_, container, before))


def _changed_name(name: str, container: Any, before: Any) -> str:
    """Of what is registered (a Parameter, a buffer, a submodule) its own name."""
    if name not in ("_parameters", "_buffers", "_modules"):
        return name
    old = dict(before)
    return next((key for key in {**container, **old} if container.get(key, container) is not old.get(key, old)), name)


@contextmanager
def _watched(model: nn.Module, args: Any, kwargs: Any, keys: frozenset[Key]) -> Iterator[Recorder]:
    """Every module's forward reports to the recorder, and so do the attributes ``keys``; afterwards everything is as it was, and frames of
    changed modules are marked."""
    attributes: dict[int, str] = {}
    generators: list[Any] = []
    watched = [_Watched(path, module, attributes, generators) for path, module in model.named_modules()]
    hidden: dict[str, nn.Parameter] = {}
    if not any(has_hooks(module) for _, module in unregistered(model)):  # they run while recording, and a fused forward does not call them
        hidden = hidden_parameters(model)
        for path, parameter in hidden.items():
            attributes.setdefault(id(parameter), path)
    recorder = Recorder(attributes)
    recorder.trace.unregistered = frozenset(hidden)
    recorder.generators = Generators(generators)
    leaves = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    recorder.kept = _Kept(leaves, watched)
    objects: dict[int, tuple[Contents, list[tuple[str, str]]]] = {}  # by id: what it holds, and which attributes of which modules it is
    for each in watched:
        for name, value in each.objects:
            if id(value) not in objects:
                objects[id(value)] = (Contents((value,)), [])
            objects[id(value)][1].append((each.path, name))
    try:
        for each in watched:
            each.start(recorder)
        for leaf in leaves:
            if id(leaf) not in recorder.known:
                recorder.add(leaf, "input")
        with watching({each.path: each.module for each in watched}, keys, recorder.touch):
            yield recorder
    finally:
        stopped = {each.path: each.stop() for each in watched}
        recorder.kept.restore()
        final: dict[Key, Any] = {(path, name): value for path, (_, found) in stopped.items() for name, value in found.items()}
        recorder.trace.changed = set(final)
        explained = settle(recorder.trace, recorder.describe, final) if keys else set()
        changed = {path: name for path, name in final if (path, name) not in explained}
        changed.update((path, name) for path, (name, _) in stopped.items() if name)
        for contents, holders in objects.values():
            if contents.changed():
                contents.restore()
                changed.update(holders)
        if changed:
            _mark_changed(recorder.trace, changed)


def _mark_changed(trace: Trace, changed: dict[str, str]) -> None:
    """Close the calls of modules that the run changed: what they did to themselves, a graph does not repeat.

    A module that no call of its own changed was changed by one around it, or so it must be taken.
    """
    alone = {frame.path for frame in trace.frames if frame.sets_own}
    around: dict[str, str] = {}
    for path, name in changed.items():
        if path not in alone:
            parts = path.split(".") if path else []
            for length in range(len(parts)):
                around.setdefault(".".join(parts[:length]), f"{path}.{name}")
    for frame in trace.frames:
        found = changed.get(frame.path) or around.get(frame.path)
        if found and not frame.poison:
            name = found.removeprefix(f"{frame.path}.")
            frame.poison, frame.place = f"forward changes self.{name}", line_of_attribute(frame.module, name) or frame.place


def record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], keys: frozenset[Key] = frozenset()) -> Trace:
    """Run ``model(*args, **kwargs)`` once under watch. Leaves no trace: the values of parameters, buffers and inputs, random state,
    attributes, hooks and grad mode stay as they were. ``keys``: attributes whose every read and write is noted.

    A run that raises gives a ``Trace`` whose ``failure`` says why.
    """
    before = around = Globals(model)
    trace, generators = _recorded(model, args, kwargs, keys)
    if around.changes():  # a cache is filled once, and then it is read: that is the run that counts
        around = Globals(model)
        trace, generators = _recorded(model, args, kwargs, keys)
    changes = around.changes()
    if changes:
        before.restore()
    if generators is not None:
        changes += _draws(model, args, kwargs, generators)
    for change in changes:
        touched = [f for f in trace.frames if f.module is change.module or type(f.module) is change.kind] or trace.frames[:1]
        for frame in touched:
            if not frame.poison:
                frame.poison, frame.place = change.reason, change.place or frame.place
    return trace


def _recorded(model: nn.Module, args: Any, kwargs: Any, keys: frozenset[Key]) -> tuple[Trace, Generators | None]:
    """One run under watch, and the random generators, where it drew from any."""
    found = _recorded_once(model, args, kwargs, keys, late=True)
    return _recorded_once(model, args, kwargs, keys, late=False) if found[0].failure else found


def _recorded_once(model: nn.Module, args: Any, kwargs: Any, keys: frozenset[Key], late: bool) -> tuple[Trace, Generators | None]:
    moved, given = False, Contents((*args, *kwargs.values()))
    with _undisturbed(model, args, kwargs, keys, late) as recorder, recorder.generators.preserved():
        before = recorder.generators.states()
        try:
            _run(recorder, model, args, kwargs)
        except Exception as error:  # the user's model: anything can come
            recorder.trace.failure = f"{type(error).__name__}: {error}".splitlines()[0]
            if recorder.kept is not None and any(each.hooks for each in recorder.kept.watched):
                recorder.trace.failure += ", without its hooks, which do not run while it is recorded"
        finally:
            given.restore()
        moved = recorder.generators.states() != before
    return recorder.trace, recorder.generators if moved else None


@contextmanager
def _undisturbed(
    model: nn.Module, args: Any, kwargs: Any, keys: frozenset[Key] = frozenset(), late: bool = True
) -> Iterator[Recorder]:
    """``late``: random numbers that decide nothing are not drawn."""
    watched, modes = _watched(model, args, kwargs, keys), (torch.enable_grad(), torch.inference_mode(False))
    with preserved_state(model), watched as recorder, modes[0], modes[1], casts_not_kept(), idle_draws_unseen(late):
        yield recorder


def _draws(model: nn.Module, args: Any, kwargs: Any, generators: Generators) -> list[Change]:
    """Where the model draws from them."""

    def again() -> None:
        with suppress(Exception):  # it is recorded as a failure already
            model(*args, **kwargs)

    with _undisturbed(model, args, kwargs), generators.preserved():
        return drawing(generators, lambda file: _is_internal(file) or draws_itself(file), again)


def _run(recorder: Recorder, model: nn.Module, args: Any, kwargs: Any) -> None:
    before = foreign_random_state()
    with moves_noted(recorder.trace), code_noted(recorder.trace, recorder.stack, _is_internal, recorder.ears), recorder:
        model(*args, **kwargs)
    recorder.trace.draws = foreign_random_state() != before


_RUN_CODE = _run.__code__
