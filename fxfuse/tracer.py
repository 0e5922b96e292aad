"""Record one real run of a model: every torch call, every module call, every size that Python looked at.

Comes in: a model (a private copy) and its inputs. Goes out: a ``Trace``. Any Python runs, because nothing is replaced by proxies: a
``TorchFunctionMode`` watches the real tensors of one eager call. Where Python reads data out of a tensor (``bool(t)``, ``.item()``), runs
without gradient tracking (a custom autograd Function, ``no_grad``) or otherwise does what a graph cannot repeat, the event is
marked (``Event.poison``): a region must not contain it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from .determinism import preserved_state
from .graph import Place
from .sizes import SizeOf, TracedInt
from .trace import Event, Frame, Ref, Trace, Value

_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_INTERNAL: dict[str, bool] = {}

# Calls that return facts which the guard checks at every call, or that say nothing of the data.
_METADATA = frozenset(
    "dim ndim ndimension device layout is_cuda is_cpu is_floating_point is_complex requires_grad is_contiguous is_leaf is_sparse "
    "is_quantized is_mkldnn is_meta is_mps is_mtia is_xpu is_signed is_nested is_inference is_conj is_neg get_device names has_names "
    "_backward_hooks grad_fn is_sparse_csr _is_view is_ipu is_maia is_vulkan is_xla is_hpu is_distributed is_shared is_pinned".split()
)
_DTYPE_FACTS = frozenset("dtype type element_size itemsize nbytes is_floating_point is_complex finfo".split())
_DATA_READS = frozenset(
    "__bool__ item tolist numpy __array__ __float__ __int__ __index__ __contains__ __complex__ equal allclose is_nonzero "
    "nonzero argwhere unique unique_consecutive masked_select data_ptr storage untyped_storage __repr__ __str__ __format__ "
    "_unique _unique2 unique_dim __dlpack__ bincount histc cpu_numpy".split()
)
_HOOK_DICTS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_OWN_FIELDS = frozenset((*_HOOK_DICTS, "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_state_dict_hooks", "forward"))


def has_hooks(module: nn.Module) -> bool:
    """True where calling ``module`` also calls hooks that somebody registered on it."""
    return any(module.__dict__.get(name) for name in _HOOK_DICTS)


def user_place() -> Place | None:
    """The innermost line on the stack that is neither torch's nor ours; None above the recorded call."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        internal = _INTERNAL.get(file)
        if internal is None:
            path = os.path.abspath(file)
            internal = _INTERNAL[file] = path.startswith((_TORCH, _HERE)) or file.startswith("<")
        if not internal:
            return Place(file, frame.f_lineno)
        if frame.f_code is _RUN_CODE:
            return None
        frame = frame.f_back
    return None


class Recorder(TorchFunctionMode):
    """Watches one run. ``attributes`` maps ``id(tensor)`` to the path of every tensor that the model's modules hold."""

    def __init__(self, attributes: dict[int, str]) -> None:
        super().__init__()
        self.trace = Trace([], [], [], [])
        self.attributes = attributes
        self.known: dict[int, int] = {}
        self.stack: list[int] = []
        self.sizes: list[Any] = []
        self.autocast = self._autocast()

    @staticmethod
    def _autocast() -> bool:
        return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")

    # -- values -------------------------------------------------------------------------------------------------------------------

    def add(self, tensor: torch.Tensor, origin: str, name: str = "") -> int:
        number = len(self.trace.values)
        with torch._C.DisableTorchFunction():
            try:
                storage = tensor.untyped_storage().data_ptr() or id(tensor)
            except (RuntimeError, NotImplementedError):
                storage = id(tensor)
            self.trace.values.append(Value(tensor, origin, name, storage, tuple(tensor.shape)))
        self.known[id(tensor)] = number
        return number

    def number(self, tensor: torch.Tensor) -> int:
        found = self.known.get(id(tensor))
        if found is not None:
            return found
        name = self.attributes.get(id(tensor))
        return self.add(tensor, "attribute", name) if name is not None else self.add(tensor, "constant")

    def describe(self, tree: Any) -> Any:
        """``tree`` with tensors as ``Ref`` and tracked sizes as expressions."""
        if isinstance(tree, torch.Tensor):
            return Ref(self.number(tree))
        if isinstance(tree, TracedInt):
            return tree.expr
        if isinstance(tree, tuple):
            return tuple([self.describe(item) for item in tree])
        if isinstance(tree, list):
            return [self.describe(item) for item in tree]
        if isinstance(tree, dict):
            return {key: self.describe(item) for key, item in tree.items()}
        if isinstance(tree, slice):
            return slice(self.describe(tree.start), self.describe(tree.stop), self.describe(tree.step))
        return tree

    def outputs(self, tree: Any) -> Any:
        if isinstance(tree, torch.Tensor):
            found = self.known.get(id(tree))
            return Ref(found if found is not None else self.add(tree, "made"))
        if isinstance(tree, (tuple, list)):
            return [self.outputs(item) for item in tree]
        return tree

    # -- calls --------------------------------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        if name == "__get__":
            name = func.__self__.__name__
            if name == "shape":
                return torch.Size(self.sizes_of(args[0]))
            if name in _DTYPE_FACTS:
                self.trace.reads_dtype = True
                return func(*args)
            if name in _METADATA:
                return func(*args)
        elif name == "size":
            return self.size(func, args, kwargs)
        elif name in ("numel", "nelement"):
            return self.numel(args[0])
        elif name in _DTYPE_FACTS:
            self.trace.reads_dtype = True
            return func(*args, **kwargs)
        elif name in _METADATA or name in ("__len__", "stride", "storage_offset", "_set_grad_enabled", "set_grad_enabled"):
            return func(*args, **kwargs)
        elif name in _DATA_READS:
            self.event(func, args, kwargs, None, (), f"reads tensor data into Python ({name.strip('_')})")
            return func(*args, **kwargs)
        return self.call(func, args, kwargs)

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        described, described_kwargs = self.describe(args), self.describe(kwargs)
        tensors: list[torch.Tensor] = []
        _tensors(args, tensors)
        _tensors(kwargs, tensors)
        before = [tensor._version for tensor in tensors if not tensor.is_inference()]
        out = func(*args, **kwargs)
        mutated: tuple[int, ...] = ()
        if before != [tensor._version for tensor in tensors if not tensor.is_inference()]:
            live = [tensor for tensor in tensors if not tensor.is_inference()]
            changed = [tensor for tensor, version in zip(live, before, strict=True) if tensor._version != version]
            # Views share their base's version counter; the one that was written is the first argument (or, for out=, the keyword).
            mutated = tuple(dict.fromkeys(self.known[id(tensor)] for tensor in changed))
        poison = ""
        if kwargs.get("out") is not None:
            poison = "writes through out="
        elif not torch.is_grad_enabled():
            poison = "runs without gradient tracking (no_grad, or a custom autograd Function)"
        elif self._autocast() != self.autocast:
            poison = "switches autocast"
        elif any(tensor.grad_fn is not None and type(tensor) is nn.Parameter for tensor in tensors):
            poison = "computes with a Parameter that is not a leaf"
        elif out is not None and not _only_tensors(out) and func.__name__ not in ("__setitem__",):
            poison = f"takes a Python value out of {func.__name__}"
        self.event(func, described, described_kwargs, self.outputs(out), mutated, poison, raw=False)
        return out

    def event(
        self, func: Any, args: Any, kwargs: Any, out: Any, mutated: tuple[int, ...], poison: str = "", raw: bool = True
    ) -> None:
        if raw:
            args, kwargs = self.describe(args), self.describe(kwargs)
        frame = self.stack[-1] if self.stack else -1
        self.trace.events.append(Event(func, args, kwargs, out, mutated, user_place(), frame, poison))

    # -- sizes --------------------------------------------------------------------------------------------------------------------

    def sizes_of(self, tensor: torch.Tensor) -> tuple[int, ...]:
        number = self.number(tensor)
        with torch._C.DisableTorchFunction():
            shape = tuple(tensor.shape)
        self.note_comparisons()
        return tuple([TracedInt.make(size, SizeOf(number, dim), self.sizes) for dim, size in enumerate(shape)])

    def size(self, func: Any, args: Any, kwargs: Any) -> Any:
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        sizes = self.sizes_of(args[0])
        if dim is None:
            return torch.Size(sizes)
        return sizes[dim] if isinstance(dim, int) else func(*args, **kwargs)

    def numel(self, tensor: torch.Tensor) -> int:
        total: int = 1
        for size in self.sizes_of(tensor):
            total = size * total
        return total

    def note_comparisons(self) -> None:
        """Comparisons are logged by the sizes themselves; give those since the last look their frame and line."""
        if self.sizes:
            frame, place = (self.stack[-1] if self.stack else -1), user_place()
            self.trace.comparisons.extend((comparison, frame, place) for comparison in self.sizes)
            self.sizes.clear()

    # -- frames -------------------------------------------------------------------------------------------------------------------

    def enter(self, path: str, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any, poison: str) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        index = len(self.trace.frames)
        parent = self.stack[-1] if self.stack else -1
        frame = Frame(index, parent, path, module, [self.describe(leaf) for leaf in leaves], spec, len(self.trace.events))
        frame.raw = (args, kwargs)
        frame.place = user_place()
        frame.poison = poison
        self.trace.frames.append(frame)
        if parent >= 0:
            self.trace.frames[parent].children.append(index)
        self.note_comparisons()
        self.stack.append(index)
        try:
            out = forward(*args, **kwargs)
        finally:
            self.note_comparisons()
            self.stack.pop()
            frame.end = len(self.trace.events)
        out_leaves, frame.out_spec = tree_flatten(out)
        frame.out = [self.describe(leaf) for leaf in out_leaves]
        return out


def _tensors(tree: Any, found: list[torch.Tensor]) -> None:
    if isinstance(tree, torch.Tensor):
        found.append(tree)
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            _tensors(item, found)
    elif isinstance(tree, dict):
        for item in tree.values():
            _tensors(item, found)


def _only_tensors(tree: Any) -> bool:
    if isinstance(tree, (tuple, list)):
        return all(_only_tensors(item) for item in tree)
    return tree is None or isinstance(tree, torch.Tensor)


def attribute_tensors(model: nn.Module) -> dict[int, str]:
    """``id(tensor) -> path`` of every tensor that a module of ``model`` holds: parameters, buffers, and plain attributes."""
    found: dict[int, str] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for holder in (module._parameters, module._buffers, module.__dict__):
            for name, tensor in holder.items():
                if isinstance(tensor, torch.Tensor):
                    found.setdefault(id(tensor), prefix + name)
    return found


def _snapshot(value: Any) -> Any:
    """What of a Python attribute can be compared after the run: identity, and for containers that of their elements."""
    if isinstance(value, (list, tuple, set, frozenset)):
        return (id(value), tuple(id(item) for item in value))
    if isinstance(value, dict):
        return (id(value), tuple((id(key), id(item)) for key, item in value.items()))
    return id(value)


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in module.__dict__.items() if name not in _OWN_FIELDS}


@contextmanager
def _watched(model: nn.Module, recorder: Recorder) -> Iterator[list[tuple[str, str]]]:
    """Every module's forward reports to ``recorder``; hooks are off; afterwards everything is as it was.

    Yields a list that holds, afterwards, ``(module path, attribute)`` for what the run changed.
    """
    changed: list[tuple[str, str]] = []
    undo: list[tuple[nn.Module, dict[str, Any], dict[str, Any], dict[str, Any]]] = []
    replaced: dict[int, Any] = {}  # forward methods that the user put on the instance
    paths: dict[int, str] = {}
    for path, module in model.named_modules():
        paths[id(module)] = path
        hooks = {name: module.__dict__[name] for name in _HOOK_DICTS if module.__dict__.get(name)}
        values = _attributes(module)
        undo.append((module, hooks, values, {name: _snapshot(value) for name, value in values.items()}))
        for name, hook in hooks.items():
            module.__dict__[name] = type(hook)()
        if "forward" in module.__dict__:
            replaced[id(module)] = module.__dict__["forward"]
        if not isinstance(module, torch.jit.ScriptModule):
            module.__dict__["forward"] = _wrapper(recorder, path, module)
    try:
        yield changed
    finally:
        for module, hooks, values, snapshot in undo:
            module.__dict__.pop("forward", None)
            if id(module) in replaced:
                module.__dict__["forward"] = replaced[id(module)]
            after = _attributes(module)
            for name in {*after, *values}:
                if name not in after or name not in values or _snapshot(after[name]) != snapshot[name]:
                    changed.append((paths[id(module)], name))
                    if name in values:
                        module.__dict__[name] = values[name]
                    else:
                        del module.__dict__[name]
            module.__dict__.update(hooks)


def _wrapper(recorder: Recorder, path: str, module: nn.Module) -> Callable[..., Any]:
    own = module.__dict__.get("forward")
    forward = own if own is not None else type(module).forward.__get__(module)

    def watched(*args: Any, **kwargs: Any) -> Any:
        return recorder.enter(path, module, forward, args, kwargs, "its forward was replaced on the instance" if own is not None else "")

    return watched


def record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
    """Run ``model(*args, **kwargs)`` once under watch. Leaves no trace: buffers, RNG, attributes, hooks, grad mode stay as they were.

    A run that raises gives a ``Trace`` whose ``failure`` says why.
    """
    recorder = Recorder(attribute_tensors(model))
    trace = recorder.trace
    with preserved_state(model), _watched(model, recorder) as changed, torch.enable_grad(), torch.inference_mode(False):
        leaves, _ = tree_flatten((args, kwargs))
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor) and id(leaf) not in recorder.known:
                recorder.add(leaf, "input")
        try:
            _run(recorder, model, args, kwargs)
        except Exception as error:  # the user's model: anything can come
            trace.failure = f"{type(error).__name__}: {error}".splitlines()[0]
    by_path: dict[str, str] = {}
    for path, name in changed:
        by_path.setdefault(path, name)
    for frame in trace.frames:
        if frame.path in by_path:
            frame.poison = frame.poison or f"forward changes self.{by_path[frame.path]}"
    return trace


def _run(recorder: Recorder, model: nn.Module, args: Any, kwargs: Any) -> None:
    with recorder:
        model(*args, **kwargs)


_RUN_CODE = _run.__code__
