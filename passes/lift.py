"""One module call of a trace, as a functional FX graph.

Comes in: a ``Trace``, one of its frames, and which sizes were found to be free. Goes out: ``Lifted``: a graph whose nodes call ``Op``s
with canonical arguments, in which every write has become a new value, every repeated pure computation is one node, basic indexing
is a chain of ``select`` / ``slice_along`` / ``unsqueeze``, and constant sizes are numbers; or a ``Refusal``.

In-place writes and views are made functional as in PyTorch's functionalization: a view remembers how it was made, a write to
it is scattered back into its base, and other views of the base are made anew when they are next read.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx

from fxfuse.graph import Place, Refusal, SizeCheck
from fxfuse.sizes import SizeOf, SizeOp
from fxfuse.trace import Event, Frame, Ref, Trace

from .functional import as_slot, drop_unused, index_write, op_of, slice_along
from .ops import Op, canonical, op_name
from .size_source import size_source

_SELECT = canonical(torch.select, (torch.empty(0), 0, 0), {})[0]
_UNSQUEEZE = canonical(torch.unsqueeze, (torch.empty(0), 0), {})[0]
_SIZE = canonical(torch.Tensor.size, (torch.empty(0), 0), {})[0]
_GETITEM = op_of(operator.getitem, "item")
_SLICE = op_of(slice_along)
_WRITE = op_of(index_write)
_SLOT = op_of(as_slot)
_SIZE_OPS = {name: op_of(getattr(operator, name), f"size_{name}") for name in ("add", "sub", "mul")}
_SPLITS = frozenset("split chunk split_with_sizes tensor_split unsafe_split unsafe_chunk hsplit vsplit dsplit".split())
# Ops whose dims count those of their first argument, and ops whose dims count those of their result: there -1 and 1 can be one spelling.
_DIMS_OF_INPUT = frozenset(
    "sum mean amax amin prod var std logsumexp all any norm nansum nanmean argmax argmin max min median softmax log_softmax softmin cumsum "
    "cumprod normalize select narrow squeeze flatten transpose permute movedim flip unbind split chunk split_with_sizes tensor_split "
    "unsafe_split unsafe_chunk unsafe_unbind index_select gather sort argsort glu".split()
)
_DIMS_OF_RESULT = frozenset({"cat", "stack", "unsqueeze"})
_DIM_ARGS = frozenset({"dim", "dim0", "dim1", "dims", "start_dim", "end_dim", "source", "destination", "axis"})
_ALIASES = frozenset("contiguous alias".split())


Sizes = list[dict[int, frozenset[int]]]


class Refused(Exception):
    """Inside a pass: this region cannot be lifted. Carries the refusal; never leaves ``lift``."""

    def __init__(self, reason: str, place: Place | None = None) -> None:
        super().__init__(reason)
        self.refusal = Refusal(reason, place)


class SizeDependent(Exception):
    """A size expression that is not safe for other sizes: lift again with every size fixed."""

    def __init__(self, reason: str, place: Place | None) -> None:
        super().__init__(reason)
        self.reason, self.place = reason, place


@dataclass
class Lifted:
    """The functional graph of one frame. ``constants`` are tensors that the graph reads by ``get_attr`` besides the module's own."""

    graph: torch.fx.Graph
    frame: Frame
    constants: dict[str, torch.Tensor]
    size_checks: list[SizeCheck]
    dynamic: dict[int, frozenset[int]]
    specialised: str = ""
    place: Place | None = None
    random: bool = False
    factories: bool = False  # tensors are made with the default dtype or device
    shapes: dict[int, tuple[int, ...]] = field(default_factory=dict)  # of the tensor inputs, by value
    sizes: Sizes = field(default_factory=list)  # the free sizes, each with the dims that have it


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


class _Lifter:
    def __init__(self, trace: Trace, frame: Frame, sizes: Sizes, opaque: frozenset[int]) -> None:
        self.trace, self.frame, self.sizes, self.opaque = trace, frame, sizes, opaque
        self.dynamic = _merged(sizes)
        self.graph = torch.fx.Graph()
        self.env: dict[int, Any] = {}  # value -> node of its contents now
        self.parent: dict[int, tuple[int, Event]] = {}  # view -> (what it is a view of, how it was made)
        self.seen_version: dict[int, int] = {}
        self.version: dict[int, int] = {}  # by root value
        self.cse: dict[Any, torch.fx.Node] = {}
        self.inputs: set[int] = set()
        self.constants: dict[str, torch.Tensor] = {}
        self.checks: list[SizeCheck] = []
        self.place: Place | None = None
        self.path = frame.path
        self.at = frame.index  # the frame that the current event belongs to
        self.random = self.factories = False

    # -- the walk -----------------------------------------------------------------------------------------------------------------

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
            elif isinstance(leaf, (SizeOf, SizeOp)):
                raise SizeDependent("a size is passed into the region as a number", frame.place)
        self._comparisons()
        index = frame.start
        while index < frame.end:
            event = self.trace.events[index]
            skip = self._opaque_call(event, index)
            if skip is not None:
                index = skip
                continue
            self.place, self.at = event.place, event.frame
            self.path = self.trace.frames[event.frame].path if event.frame >= 0 else ""
            if event.poison:
                raise Refused(event.poison, event.place)
            self._event(event)
            index += 1
        outputs = [self._output(leaf) for leaf in frame.out]
        self.graph.output(outputs)
        drop_unused(self.graph)
        return Lifted(
            self.graph, frame, self.constants, self.checks, self.dynamic, place=frame.place, random=self.random, factories=self.factories,
            shapes={value: self.trace.values[value].shape for value in self.inputs}, sizes=self.sizes,
        )  # fmt: skip

    def _opaque_call(self, event: Event, index: int) -> int | None:
        """Where ``event`` belongs to a frame that stays closed: one module call for all of it, and the index after it."""
        at = event.frame
        outermost = -1
        while at >= 0 and at != self.frame.index:
            if at in self.opaque:
                outermost = at
            at = self.trace.frames[at].parent
        if outermost < 0:
            return None
        called = self.trace.frames[outermost]
        self.place, self.path, self.at = called.place, called.path, called.parent
        prefix = f"{self.frame.path}." if self.frame.path else ""
        args, kwargs = torch.utils._pytree.tree_unflatten([self._argument(leaf) for leaf in called.leaves], called.in_spec)
        written = {v for e in self.trace.events[called.start : called.end] for v in e.mutated}
        if any(v in self.env for v in written):
            raise Refused(f"{called.path or 'the model'} writes into a tensor that it was given", called.place)
        node = self.graph.call_module(called.path[len(prefix) :] if prefix else called.path, tuple(args), dict(kwargs))
        node.meta.update(place=called.place, path=called.path, shape=None, dyn=frozenset())
        structure = torch.utils._pytree.tree_unflatten(list(range(len(called.out))), called.out_spec)
        self._bind_outputs(node, structure, called.out)
        return called.end

    def _bind_outputs(self, node: torch.fx.Node, structure: Any, leaves: list[Any]) -> None:
        if isinstance(structure, int):
            leaf = leaves[structure]
            if isinstance(leaf, Ref) and leaf.value not in self.env:
                self._describe(node, leaf.value)
                self.env[leaf.value] = node
        elif isinstance(structure, (tuple, list)):
            for position, part in enumerate(structure):
                self._bind_outputs(self._node(_GETITEM, (node, position), None), part, leaves)
        elif isinstance(structure, dict):
            for key, part in structure.items():
                self._bind_outputs(self._node(_GETITEM, (node, key), None), part, leaves)
        elif structure is not None:
            raise Refused(f"{self.path} returns a {type(structure).__name__}", self.place)

    def _event(self, event: Event) -> None:
        name = op_name(event.func)
        if event.mutated:
            self._write_event(event, name)
            return
        args, kwargs = self._argument(event.args), self._argument(event.kwargs)
        if name == "__getitem__":
            self.env[event.out.value] = self._getitem(args[0], args[1], event.out.value, event.func)
        elif name in _SPLITS or name in ("unbind", "unsafe_unbind"):
            self._split(name, event, args, kwargs)
        elif name == "broadcast_tensors":
            raise Refused("broadcast_tensors has no functional form here", event.place)
        else:
            out = self._call(event.func, args, kwargs, event.out)
            self._bind(event.out, out)
        self._note_view(event)

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
                    self._bind(item, self._node(_GETITEM, (node, index), first))

    def _output(self, leaf: Any) -> Any:
        if isinstance(leaf, Ref):
            node = self._read(leaf.value)
            self._stride(node, leaf.value)
            return node
        if isinstance(leaf, (SizeOf, SizeOp)):
            return self._argument(leaf)
        if leaf is None or isinstance(leaf, (int, float, str, bool, complex, torch.dtype, torch.device)):
            return leaf
        raise Refused(f"returns a {type(leaf).__name__}, which fxfuse cannot take apart", self.frame.place)

    def _stride(self, node: torch.fx.Node, value: int) -> None:
        with torch._C.DisableTorchFunction():
            node.meta["out_stride"] = self.trace.values[value].tensor.stride()

    # -- nodes --------------------------------------------------------------------------------------------------------------------

    def _describe(self, node: torch.fx.Node, value: int) -> None:
        seen = self.trace.values[value]
        with torch._C.DisableTorchFunction():
            tensor = seen.tensor
            node.meta.update(
                value=value, shape=seen.shape, dyn=self.dynamic.get(value, frozenset()), dtype=tensor.dtype, device=tensor.device,
                stride=tensor.stride() if tensor.layout is torch.strided else None, place=self.place, path=self.path, frame=self.at,
            )  # fmt: skip

    def _node(self, op: Op, args: tuple[Any, ...], value: int | None) -> torch.fx.Node:
        key = None
        if not op.random:
            key = (op, torch.fx.node.map_aggregate(args, _hashable))
            try:
                known = self.cse.get(key)
            except TypeError:
                key, known = None, None
            if known is not None:
                return known
        else:
            self.random = True
        node = self.graph.call_function(op, args)
        if value is not None:
            self._describe(node, value)
        else:
            node.meta.update(shape=None, dyn=frozenset(), place=self.place, path=self.path, frame=self.at)
        if key is not None:
            self.cse[key] = node
        return node

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        op, canonical_args = canonical(func, tuple(args), dict(kwargs))
        shape = _first_shape(canonical_args)
        if any(isinstance(a, torch.dtype) for a in canonical_args):
            self.factories = True
        value = out.value if isinstance(out, Ref) else None
        if op.name == "add" and len(canonical_args) > 1 and type(canonical_args[1]) is int and canonical_args[1] == 0 and value is not None:
            # ``sum(...)`` starts from 0; with numbers alone the dtype is that of the tensor (bool tensors excepted).
            (tensor,) = [a for a in canonical_args if isinstance(a, torch.fx.Node)][:1] or (None,)
            if tensor is not None and tensor.meta["dtype"] is self.trace.values[value].tensor.dtype:
                return tensor
        if shape is None or op.name.startswith("new_"):
            device_dtype = dict(zip(op.names, canonical_args, strict=True))
            if op.name.startswith("new_"):
                pass
            elif device_dtype.get("dtype") is None or device_dtype.get("device") is None:
                self.factories = True
            if device_dtype.get("dtype") is not None:
                self.factories = True
        if op.name == "cat" and value is not None:
            canonical_args = self._without_empty(canonical_args, value)
        extent = len(shape) if op.name in _DIMS_OF_INPUT and shape is not None else 0
        if op.name in _DIMS_OF_RESULT and value is not None:
            extent = len(self.trace.values[value].shape)
        if extent:
            canonical_args = tuple(_positive(a, extent) if n in _DIM_ARGS else a for n, a in zip(op.names, canonical_args, strict=True))
        if op.name == "squeeze" and shape is not None:
            op, canonical_args = self._squeeze(op, canonical_args, shape)
        return self._node(op, canonical_args, value)

    def _without_empty(self, args: tuple[Any, ...], value: int) -> tuple[Any, ...]:
        """``cat([torch.tensor([]), x], 1)``: tensors of shape (0,) are left out of a ``cat`` of any rank, except for their dtype."""
        with torch._C.DisableTorchFunction():
            dtype = self.trace.values[value].tensor.dtype
        kept = [t for t in args[0] if t.meta.get("shape") != (0,) or t.meta["dyn"]] if isinstance(args[0], (list, tuple)) else []
        return ([*kept], *args[1:]) if kept and any(t.meta.get("dtype") is dtype for t in kept) else args

    def _squeeze(self, op: Op, args: tuple[Any, ...], shape: tuple[int, ...]) -> tuple[Op, tuple[Any, ...]]:
        """Name the dims that go, and guard that a free size is not 1 at a call when it was not in the recording."""
        node = args[0]
        dims = range(len(shape)) if len(args) < 2 or args[1] is None else args[1] if isinstance(args[1], (tuple, list)) else (args[1],)
        for dim in dims:
            if dim in node.meta["dyn"]:
                self._check(node, dim, "!=", 1)
        gone = tuple(dim for dim in dims if shape[dim] == 1)
        return canonical(torch.squeeze, (torch.empty(0), (0,)), {})[0], (node, gone)

    # -- sizes --------------------------------------------------------------------------------------------------------------------

    def _argument(self, tree: Any) -> Any:
        """A recorded argument as FX wants it: nodes for tensors and free sizes, numbers for fixed sizes."""
        kind = type(tree)
        if kind is Ref:
            return self._read(tree.value)
        if kind is SizeOf:
            if tree.dim not in self.dynamic.get(tree.value, ()):
                return self.trace.values[tree.value].shape[tree.dim]
            return self._node(_SIZE, (self._read(tree.value), tree.dim), None)
        if kind is SizeOp:
            args = tuple(self._argument(a) for a in tree.args)
            if all(isinstance(a, int) for a in args):
                return getattr(operator, tree.op)(*args)
            if tree.op in ("floordiv", "mod"):
                raise SizeDependent(f"a size is divided ({tree.op})", self.place)
            if tree.op == "neg":
                return self._node(_SIZE_OPS["mul"], (-1, args[0]), None)
            return self._node(_SIZE_OPS[tree.op], args, None)
        if kind is tuple:
            return tuple([self._argument(item) for item in tree])
        if kind is list:
            return [self._argument(item) for item in tree]
        if kind is dict:
            return {key: self._argument(item) for key, item in tree.items()}
        if kind is slice:
            return slice(self._argument(tree.start), self._argument(tree.stop), self._argument(tree.step))
        if isinstance(tree, tuple):  # torch.Size, named tuples
            return tuple([self._argument(item) for item in tree])
        return tree

    def _input_dim(self, value: int, dim: int) -> tuple[int, int] | None:
        """(leaf, dim) of an input that has the same free size as ``dim`` of ``value``; None where no input shows it."""
        size = self.trace.values[value].shape[dim]
        for dims in self.sizes:
            if dim in dims.get(value, ()):
                for index, leaf in enumerate(self.frame.leaves):
                    if isinstance(leaf, Ref):
                        for own in sorted(dims.get(leaf.value, ())):
                            if self.trace.values[leaf.value].shape[own] == size:
                                return index, own
        return None

    def _check_value(self, value: int, dim: int, op: Any, bound: int) -> None:
        """Guard what the recorded run took for granted of a free size."""
        found = self._input_dim(value, dim)
        if found is None:
            raise SizeDependent("a free size does not come from the inputs", self.place)
        self.checks.append(SizeCheck(*found, op, bound))

    def _check(self, node: torch.fx.Node, dim: int, op: Any, bound: int) -> None:
        value = node.meta.get("value")
        if value is None:
            raise SizeDependent("a free size does not come from the inputs", self.place)
        self._check_value(value, dim, op, bound)

    def _comparisons(self) -> None:
        """Comparisons of free sizes that Python made in this frame become guards, or fix every size."""
        signs = {"lt": ("<", ">="), "le": ("<=", ">"), "gt": (">", "<="), "ge": (">=", "<"), "eq": ("==", "!="), "ne": ("!=", "==")}
        mirrored = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "eq": "eq", "ne": "ne"}
        for comparison, frame, place in self.trace.comparisons:
            if not self._inside(frame):
                continue
            left, right, op = comparison.left, comparison.right, comparison.op
            if not self._free(left) and not self._free(right):
                continue
            if self._free(right):
                left, right, op = right, left, mirrored[op]
            if self._free(right) or not isinstance(left, SizeOf):
                if isinstance(left, SizeOf) and (left == right or self._one_size(left, right)):
                    continue
                raise SizeDependent("forward compares sizes", place)
            bound = right if isinstance(right, int) else self._argument(right)
            value, dim, factor = size_source(self.trace, left.value, left.dim) if op in ("eq", "ne") else (left.value, left.dim, 1)
            if factor != 1:
                if bound % factor == 0:  # else no size at all makes them equal
                    self._check_value(value, dim, signs[op][0 if comparison.result else 1], bound // factor)
                continue
            self._check_value(left.value, left.dim, signs[op][0 if comparison.result else 1], bound)

    def _one_size(self, left: SizeOf, right: Any) -> bool:
        """Two dims that have one free size, by whatever name: the guard holds them equal."""
        values = self.trace.values
        if not isinstance(right, SizeOf) or values[left.value].shape[left.dim] != values[right.value].shape[right.dim]:
            return False
        return any(left.dim in dims.get(left.value, ()) and right.dim in dims.get(right.value, ()) for dims in self.sizes)

    def _free(self, expr: Any) -> bool:
        if isinstance(expr, SizeOf):
            return expr.dim in self.dynamic.get(expr.value, ())
        return isinstance(expr, SizeOp) and any(self._free(a) for a in expr.args)

    def _inside(self, frame: int) -> bool:
        while frame >= 0:
            if frame in self.opaque:
                return False
            if frame == self.frame.index:
                return True
            frame = self.trace.frames[frame].parent
        return False

    # -- reading, viewing, writing ------------------------------------------------------------------------------------------------

    def _root(self, value: int) -> int:
        while value in self.parent:
            value = self.parent[value][0]
        return value

    def _read(self, value: int) -> Any:
        if value not in self.env:
            return self._outside(value)
        root = self._root(value)
        if self.version.get(root, 0) != self.seen_version.get(value, 0) and value in self.parent:
            base, event = self.parent[value]
            self._read(base)
            self.env[value] = self._again(event, value)
            self.seen_version[value] = self.version[root]
        return self.env[value]

    def _again(self, event: Event, value: int) -> Any:
        """Make a view anew from its base, whose contents have changed."""
        args, kwargs = self._argument(event.args), self._argument(event.kwargs)
        name = op_name(event.func)
        if name == "__getitem__":
            return self._getitem(args[0], args[1], value, event.func)
        if name in _SPLITS or name == "unbind":
            raise Refused("a piece of a split tensor is read after the tensor was written", event.place)
        return self._call(event.func, args, kwargs, Ref(value))

    def _outside(self, value: int) -> torch.fx.Node:
        seen = self.trace.values[value]
        prefix = f"{self.frame.path}." if self.frame.path else ""
        if seen.origin == "attribute":
            if not seen.name.startswith(prefix):
                raise Refused(f"reads {seen.name}, which belongs to a module outside", self.place)
            target = seen.name[len(prefix) :]
        elif seen.origin == "constant":
            if seen.tensor.requires_grad:
                raise Refused("uses a trainable tensor that no module of the model holds", self.place)
            target = f"packed.constant_{len(self.constants)}"
            self.constants[target] = seen.tensor
        else:
            raise Refused("reads a tensor that was computed outside of the module", self.place)
        node = self.graph.get_attr(target)
        self._describe(node, value)
        node.meta["requires_grad"] = seen.tensor.requires_grad
        self.env[value] = node
        return node

    def _note_view(self, event: Event) -> None:
        """Outputs that share memory with an argument are views of it: a write to either shows in the other."""
        out = event.out if isinstance(event.out, list) else [event.out]
        refs = [ref for ref in out if isinstance(ref, Ref)]
        if not refs:
            return
        arguments: list[int] = []
        _values(event.args, arguments)
        _values(event.kwargs, arguments)
        for ref in refs:
            storage = self.trace.values[ref.value].storage
            base = next((v for v in arguments if v != ref.value and self.trace.values[v].storage == storage), None)
            if base is not None and ref.value not in self.parent and ref.value not in self.inputs:
                self.parent[ref.value] = (base, event)
                self.seen_version[ref.value] = self.version.get(self._root(base), 0)

    def _write_event(self, event: Event, name: str) -> None:
        target = event.args[0].value if event.args and isinstance(event.args[0], Ref) else None
        if target is None or target not in event.mutated:
            raise Refused(f"{name} changes a tensor in a way that has no functional form here", event.place)
        root = self._root(target)
        if root in self.inputs:
            raise Refused(f"writes into its input ({name})", event.place)
        if root not in self.env and self.trace.values[root].origin in ("attribute", "constant"):
            raise Refused(f"changes {self.trace.values[root].name or 'a constant'} in forward ({name})", event.place)
        if self.trace.values[root].origin in ("attribute", "constant"):
            raise Refused(f"changes {self.trace.values[root].name or 'a constant'} in forward ({name})", event.place)
        args, kwargs = self._argument(event.args), self._argument(event.kwargs)
        self._write(target, self._functional(event, name, args, kwargs, target), event)
        if isinstance(event.out, Ref) and event.out.value != target:
            self.env[event.out.value] = self.env[target]

    def _functional(self, event: Event, name: str, args: Any, kwargs: Any, target: int) -> Any:
        """What ``target`` holds after the in-place call ``name``."""
        if name == "__setitem__":
            return self._node(_WRITE, (args[0], args[1], args[2]), target)
        if name == "copy_":
            return self._node(_SLOT, (args[1], args[0]), target)
        if name in ("zero_", "fill_"):
            filled = canonical(torch.full_like, (args[0], 0.0 if name == "zero_" else args[1]), {})
            return self._node(filled[0], filled[1], target)
        base = name[:-1] if name.endswith("_") and not name.endswith("__") else name
        func: Any
        if base == name:  # F.relu(x, inplace=True)
            func = event.func
            kwargs = {k: v for k, v in kwargs.items() if k != "inplace"}
            op, canonical_args = canonical(func, tuple(args), kwargs)
            node = self._node(op, canonical_args, target)
        else:
            func = getattr(torch.Tensor, base, None) or getattr(torch, base, None) or getattr(torch.nn.functional, base, None)
            if func is None:
                raise Refused(f"{name} has no functional form", event.place)
            node = self._call(func, args, kwargs, Ref(target))
        dtype = self.trace.values[target].tensor.dtype
        others = [a for a in args[1:] if isinstance(a, torch.fx.Node) and a.meta.get("dtype") not in (None, dtype)]
        if others:
            to, to_args = canonical(torch.Tensor.to, (node, dtype), {})
            node = self._node(to, to_args, target)
        return node

    def _write(self, value: int, node: Any, event: Event) -> None:
        self.env[value] = node
        chain = [value]
        while value in self.parent:
            base, made = self.parent[value]
            self.env[base] = self._scatter(base, made, self.env[value], event)
            value = base
            chain.append(value)
        self.version[value] = self.version.get(value, 0) + 1
        for member in chain:
            self.seen_version[member] = self.version[value]

    def _scatter(self, base: int, made: Event, node: Any, event: Event) -> Any:
        """``base`` after its view, made by ``made``, was given the contents ``node``."""
        name = op_name(made.func)
        args = self._argument(made.args)
        current = self._read(base)
        if name == "__getitem__":
            return self._node(_WRITE, (current, args[1], node), base)
        if name in ("select", "narrow"):
            op, canonical_args = canonical(made.func, tuple(args), self._argument(made.kwargs))
            given = dict(zip(op.names, canonical_args, strict=True))
            index = given["index"] if name == "select" else slice(given["start"], given["start"] + given["length"])
            dim = given["dim"] % len(self.trace.values[base].shape)
            return self._node(_WRITE, (current, (slice(None),) * dim + (index,), node), base)
        if name in ("view", "reshape", "unsqueeze", "squeeze", "flatten", "contiguous", "detach", "view_as"):
            if name == "detach":
                raise Refused("writes into a detached tensor", event.place)
            sizes = tuple(self._argument(SizeOf(base, dim)) for dim in range(len(self.trace.values[base].shape)))
            return self._call(torch.Tensor.reshape, (node, sizes), {}, Ref(base))
        if name in ("transpose", "t", "swapaxes"):
            return self._call(made.func, (node, *args[1:]), {}, Ref(base))
        raise Refused(f"writes into a view made by {name}", event.place)

    # -- indexing -----------------------------------------------------------------------------------------------------------------

    def _getitem(self, node: Any, index: Any, value: int, func: Any) -> Any:
        """Basic indexing as a chain of single-dim steps; anything else stays an indexing call."""
        items = list(index) if isinstance(index, tuple) else [index]
        shape = node.meta["shape"]
        if sum(isinstance(i, list) for i in items) == 1:  # x[:, [3]] is x[:, 3:4]; a copy there, but here nothing is written in place
            items = [_as_slice(i) if isinstance(i, list) else i for i in items]
        if shape is None or not all(i is None or i is Ellipsis or type(i) is int or isinstance(i, slice) for i in items):
            op, args = canonical(func, (node, index), {})
            return self._node(op, args, value)
        used = sum(1 for i in items if i is not None and i is not Ellipsis)
        if Ellipsis in [i for i in items if not isinstance(i, torch.fx.Node)]:
            at = next(k for k, i in enumerate(items) if i is Ellipsis)
            items[at : at + 1] = [slice(None)] * (len(shape) - used)
        steps: list[tuple[Op, tuple[Any, ...]]] = []
        dim, source = 0, 0
        for item in items:
            if item is None:
                steps.append((_UNSQUEEZE, (dim,)))
                dim += 1
                continue
            size, free = shape[source], source in node.meta["dyn"]
            if isinstance(item, slice):
                step = self._slice(item, dim, size, free)
                if step is not None:
                    steps.append((_SLICE, step))
                dim += 1
            else:
                if free:
                    self._check(node, source, ">=", item + 1 if item >= 0 else -item)
                steps.append((_SELECT, (dim, item if free or item >= 0 else item + size)))
            source += 1
        for position, (op, args) in enumerate(steps):
            last = position == len(steps) - 1
            node = self._step(op, node, args, value if last else None)
        return node

    def _slice(self, item: slice, dim: int, size: int, free: bool) -> tuple[Any, ...] | None:
        bounds = (item.start, item.stop, item.step)
        if any(isinstance(b, torch.fx.Node) for b in bounds):
            raise SizeDependent("a free size is a slice bound", self.place)
        if free:
            if item.start in (None, 0) and item.stop is None and item.step in (None, 1):
                return None
            raise SizeDependent("a slice with fixed bounds along a free size", self.place)
        start, stop, step = item.indices(size)
        if (start, stop, step) == (0, size, 1):
            return None
        return dim, start, max(start, stop), step

    def _step(self, op: Op, node: Any, args: tuple[Any, ...], value: int | None) -> Any:
        """One step of basic indexing, with shape and free dims worked out for those in the middle of a chain."""
        made = self._node(op, (node, *args), value)
        if value is None and made.meta["shape"] is None:
            shape, dyn, dim = list(node.meta["shape"]), node.meta["dyn"], args[0]
            if op is _SELECT:
                del shape[dim]
                dyn = frozenset(d - (d > dim) for d in dyn if d != dim)
            elif op is _UNSQUEEZE:
                shape.insert(dim, 1)
                dyn = frozenset(d + (d >= dim) for d in dyn)
            else:
                shape[dim] = len(range(args[1], args[2], args[3]))
            made.meta.update(shape=tuple(shape), dyn=dyn, dtype=node.meta["dtype"], device=node.meta["device"], stride=None)
        return made

    def _split(self, name: str, event: Event, args: Any, kwargs: Any) -> None:
        node = args[0]
        op, canonical_args = canonical(event.func, tuple(args), kwargs)
        given = dict(zip(op.names, canonical_args, strict=True))
        dim = given.get("dim", 0)
        rank = len(node.meta["shape"])
        dim = {"hsplit": 0 if rank == 1 else 1, "vsplit": 0, "dsplit": 2}.get(name, dim)
        dim = (dim if isinstance(dim, int) else 0) % rank
        if dim in node.meta["dyn"]:
            raise SizeDependent("a free size is split", self.place)
        start = 0
        for index, ref in enumerate(event.out):
            if name.endswith("unbind"):
                self.env[ref.value] = self._step(_SELECT, node, (dim, index), ref.value)
            else:
                width = self.trace.values[ref.value].shape[dim]
                whole = start == 0 and width == node.meta["shape"][dim]
                self.env[ref.value] = node if whole else self._step(_SLICE, node, (dim, start, start + width, 1), ref.value)
                start += width


def _merged(sizes: Sizes) -> dict[int, frozenset[int]]:
    found: dict[int, frozenset[int]] = {}
    for dims in sizes:
        for value, free in dims.items():
            found[value] = found.get(value, frozenset()) | free
    return found


def _as_slice(index: list[Any]) -> Any:
    """A list of consecutive positions as the slice it is; any other list as it came."""
    if index and all(type(i) is int for i in index) and index[0] >= 0 and index == list(range(index[0], index[0] + len(index))):
        return slice(index[0], index[-1] + 1)
    return index


def _first_shape(args: Any) -> tuple[int, ...] | None:
    for arg in args:
        if isinstance(arg, torch.fx.Node):
            return arg.meta.get("shape")
        if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], torch.fx.Node):
            return arg[0].meta.get("shape")
    return None


def _hashable(item: Any) -> Any:
    if isinstance(item, float):
        return ("float", item.hex())
    if isinstance(item, slice):
        return ("slice", item.start, item.stop, item.step)
    if isinstance(item, (bool, int)):
        return (type(item).__name__, item)
    if isinstance(item, list):
        return tuple(item)
    return item


def _positive(value: Any, extent: int) -> Any:
    """Negative dims counted from the front, so that ``-1`` and ``1`` are one spelling."""
    if type(value) is int:
        return value % extent
    if isinstance(value, (tuple, list)) and all(type(v) is int for v in value):
        return tuple(v % extent for v in value)
    return value


def _values(tree: Any, found: list[int]) -> None:
    if isinstance(tree, Ref):
        found.append(tree.value)
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            _values(item, found)
    elif isinstance(tree, dict):
        for item in tree.values():
            _values(item, found)
