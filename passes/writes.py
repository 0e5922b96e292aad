"""In-place writes and views made functional, as in PyTorch's functionalization.

Comes in: events that write, views, and reads of recorded values. Goes out: ``Writes``, a layer of the lifter. A view
remembers how it was made, a write to it is scattered back into its base, and other views of the base are made anew when they are next read.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.fx

from fxfuse.functional import as_slot, casting, drawn, index_write, op_of
from fxfuse.ops import MAY_COPY, canonical, op_name
from fxfuse.recording.sizes import SizeOf, SizeOp
from fxfuse.recording.trace import Event, Frame, Ref, Trace, refs_in

from .indexing import Indexing
from .lifted import Refused, SizeDependent, Sizes
from .rows import in_rows, needs_no_rows

_SIZE = canonical(torch.Tensor.size, (torch.empty(0), 0), {})[0]
_WRITE = op_of(index_write)
_SLOT = op_of(as_slot)
DETACH = canonical(torch.Tensor.detach, (torch.empty(0),), {})[0]
_DRAWN = replace(op_of(drawn), random=True)
# Methods that fill a tensor with random numbers: their arguments, and what these are where they are left out.
DRAWS: dict[str, dict[str, Any]] = {
    "normal": {"mean": 0.0, "std": 1.0}, "uniform": {"from": 0.0, "to": 1.0}, "exponential": {"lambd": 1.0}, "bernoulli": {"p": 0.5},
    "cauchy": {"median": 0.0, "sigma": 1.0}, "log_normal": {"mean": 1.0, "std": 2.0},
}  # fmt: skip
_SIZE_OPS = {name: op_of(getattr(operator, name), f"size_{name}") for name in ("add", "sub", "mul")}
_MADE = frozenset("zeros ones empty full new_zeros new_ones new_empty new_full zeros_like ones_like empty_like full_like".split())
_VIEWS = frozenset("select slice_along unsqueeze squeeze reshape flatten transpose permute".split())
_LEAVES = (Ref, SizeOf, SizeOp, type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device)
# What is recorded of a tensor is its shape, and where its gradient goes, as it was first seen.
RENEWING = frozenset("squeeze_ unsqueeze_ transpose_ t_ swapaxes_ swapdims_ as_strided_ resize_ resize_as_ set_ detach_".split())
_COMPARING = frozenset("eq_ ne_ lt_ le_ gt_ ge_ logical_not_ logical_and_ logical_or_ logical_xor_".split())
DRAWING = frozenset("random_ geometric_".split())  # into a tensor, and without a rule
SPLITS = frozenset("split chunk split_with_sizes tensor_split unsafe_split unsafe_chunk hsplit vsplit dsplit".split())


class Writes(Indexing):
    """What every recorded value holds at each point of the program."""

    def __init__(self, trace: Trace, frame: Frame, sizes: Sizes, opaque: frozenset[int]) -> None:
        super().__init__(trace, frame, sizes, opaque)
        self.viewed: set[int] = set()  # values that are read or written as another layout would not let them be
        self.copied: dict[int, tuple[int, Event]] = {}  # what ``reshape`` and the like have copied -> (of what, how)
        self.copied_at: dict[int, int] = {}  # and the version of what it was copied of
        self.itself: set[int] = set()  # what ``contiguous`` handed back, and copies at other sizes
        self.torn: set[int] = set()  # of what a copy was written
        self.parent: dict[int, tuple[int, Event]] = {}  # view -> (what it is a view of, how it was made)
        self.seen_version: dict[int, int] = {}
        self.version: dict[int, int] = {}  # by root value
        self.inputs: set[int] = set()
        self.memory_of_results = {trace.values[value].storage for value in refs_in(frame.out)}
        self.constants: dict[str, torch.Tensor] = {}
        self.cut: set[torch.fx.Node] = set()  # written under ``no_grad``: without a history
        self.renewable: set[int] = set()  # storages of buffers whose new contents are written when all is over
        self.renewed: dict[int, torch.fx.Node] = {}  # those that were given some: by value, as the region holds them

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
        if kind.__module__ == "numpy" and getattr(tree, "shape", None) == ():  # np.float64(0.3), which code cannot spell
            return tree.item()
        return tree

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
        part = self._part(name, event.func, args, kwargs, value)
        if name in MAY_COPY:
            self._relies_on_order(name, self.parent[value][0], value)
        if part is not None:
            return part
        if name in SPLITS or name == "unbind":
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
            self._not_of_an_argument(seen.tensor)
            if seen.tensor.requires_grad:
                raise Refused("uses a trainable tensor that no module of the model holds", self.place)
            if seen.numbers:
                facts = {"dtype": seen.tensor.dtype, "device": seen.tensor.device}
                made: torch.fx.Node = self._call(torch.tensor, (seen.tensor.tolist(),), facts, Ref(value))
                self.env[value] = made
                return made
            target = f"packed.constant_{len(self.constants)}"
            self.constants[target] = seen.tensor
        else:
            self._not_of_an_argument(seen.tensor)
            raise Refused("reads a tensor that was computed outside of the module", self.place)
        node = self.graph.get_attr(target)
        self._describe(node, value)
        node.meta["requires_grad"] = seen.tensor.requires_grad
        node.meta["registered"] = seen.name not in self.trace.unregistered
        self.env[value] = node
        return node

    def _not_of_an_argument(self, tensor: torch.Tensor) -> None:
        """Refuses where an object that the module is given holds the tensor: another call's object holds another, or this one will."""
        for leaf in self.frame.leaves:
            if not isinstance(leaf, _LEAVES) and _holds(leaf, tensor, 4):
                raise Refused(f"reads a tensor out of its argument, a {type(leaf).__name__}, which fxfuse cannot take apart", self.place)

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
        if name in DRAWING:
            raise Refused(f"{name} fills a tensor with random numbers", event.place)
        if name in _COMPARING and self.trace.values[target].tensor.dtype is not torch.bool:
            raise Refused(f"{name} writes truth values as numbers", event.place)
        root = self._root(target)
        if root in self.inputs:
            raise Refused(f"writes into its input ({name})", event.place)
        seen = self.trace.values[root]
        if seen.origin == "attribute" and seen.storage in self.renewable:
            self.renewed.setdefault(root, self._registered(root))
        elif seen.origin in ("attribute", "constant"):
            raise Refused(f"changes {seen.name or 'a constant'} in forward ({name})", event.place)
        args, kwargs = self._argument(event.args), self._argument(event.kwargs)
        if event.untracked:  # into what has no history, and gets none
            args, kwargs = (args[0], *map(self._detached, args[1:])), self._detached(kwargs)
        self._write(target, self._functional(event, name, args, kwargs, target), event)
        if event.untracked:
            self._note_cut(target)
        if isinstance(event.out, Ref) and event.out.value != target:
            self.env[event.out.value] = self.env[target]

    def _registered(self, value: int) -> Any:
        """The tensor that a module holds, as the graph may write it."""
        return self._read(value)

    def _note_cut(self, value: int) -> None:
        self.cut.add(self.env[value])
        while value in self.parent:
            value = self.parent[value][0]
            self.cut.add(self.env[value])

    def _detached(self, tree: Any) -> Any:
        """Arguments, each tensor of which is cut off its history."""

        def cut(node: torch.fx.Node) -> torch.fx.Node:
            dtype = node.meta.get("dtype")
            inexact = dtype is not None and (dtype.is_floating_point or dtype.is_complex)
            if not inexact or node in self.cut or node.target == DETACH or node.meta.get("value") is None:
                return node
            made: torch.fx.Node = self._call(torch.Tensor.detach, (node,), {}, Ref(node.meta["value"]))
            return made

        return torch.fx.node.map_arg(tree, cut)

    def _functional(self, event: Event, name: str, args: Any, kwargs: Any, target: int) -> Any:
        """What ``target`` holds after the in-place call ``name``."""
        if name == "__setitem__":
            last = args[0]
            if isinstance(last, torch.fx.Node) and last.target is _WRITE and last.args[1:] == tuple(args[1:3]):
                return last  # the second half of ``x[i] += y``: what the first wrote into the view is there already
            return self._node(_WRITE, (args[0], args[1], args[2]), target)
        if name == "copy_" or (name == "fill_" and isinstance(args[1], torch.fx.Node)):
            given = self._node(_SLOT, (args[1], args[0]), target)
            return given if self._no_history(event, args[0]) else self._over(given, args[0], target)
        if name in ("zero_", "fill_"):
            # Of what was computed: a fill whose gradient is zero, as it is there; a new buffer has none.
            fill: Any = torch.full_like if _new(args[0]) else torch.fill
            filled = canonical(fill, (args[0], 0.0 if name == "zero_" else args[1]), {})
            return self._node(filled[0], filled[1], target)
        base = name[:-1] if name.endswith("_") and not name.endswith("__") else name
        func: Any
        if base in DRAWS and base != name:
            return self._draw(event, base, args, kwargs, target)
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
            widest = max((other.meta["dtype"] for other in others), key=lambda d: d.itemsize)
            to, to_args = canonical(casting(widest, dtype), (node, dtype), {})
            node = self._node(to, to_args, target)
        return node

    def _no_history(self, event: Event, slot: torch.fx.Node) -> bool:
        """Has what ``copy_`` overwrites no history that its new contents lack?"""
        source = event.args[1] if len(event.args) > 1 else event.kwargs.get("src", event.kwargs.get("value"))
        if event.untracked or _new(slot) or self._root(event.args[0].value) in self.renewed or not isinstance(source, Ref):
            return True
        return self.trace.values[source.value].tensor.requires_grad

    def _over(self, given: Any, slot: torch.fx.Node, target: int) -> Any:
        """``given`` with the history of ``slot``, whose gradient is zero: as after ``h.copy_(h.detach())``."""
        flags, flags_args = canonical(torch.ones_like, (slot,), {"dtype": torch.bool})
        everywhere = self._node(flags, flags_args, None)
        everywhere.meta.update({**slot.meta, "value": None, "dtype": torch.bool, "stride": None})
        where, where_args = canonical(torch.where, (everywhere, given, slot), {})
        return self._node(where, where_args, target)

    def _draw(self, event: Event, name: str, args: Any, kwargs: Any, target: int) -> Any:
        """Random numbers drawn into a new tensor."""
        signature = DRAWS[name]
        given = dict(zip(signature, args[1:], strict=False)) | kwargs
        numbers = tuple(given.get(argument, default) for argument, default in signature.items())
        if not _new(args[0]) or not set(given) <= set(signature) or any(isinstance(number, torch.fx.Node) for number in numbers):
            raise Refused(f"{name}_ draws into a tensor that was computed, or from tensors or a generator", event.place)
        return self._node(_DRAWN, (args[0], name, numbers), target)

    def _write(self, value: int, node: Any, event: Event) -> None:
        self.env[value] = node
        chain = [value]
        while value in self.parent:
            base, made = self.parent[value]
            self.env[base] = self._scatter(base, made, self.env[value], event)
            value = base
            chain.append(value)
        self.version[value] = self.version.get(value, 0) + 1
        for copy, (of, _) in self.copied.items():
            if value in (copy, self._root(of)) and of not in self.torn:
                self.torn.add(of)
                self._check_ones(of, "!=")  # of one row it may be a view
        for member in chain:
            if member in self.itself:
                self._check_ones(member, "==")
            self.seen_version[member] = self.version[value]

    def _note_order(self, event: Event, name: str) -> None:
        """Calls that look at a tensor as it lies in memory."""
        source = event.args[0] if event.args else event.kwargs.get("input")
        if not isinstance(event.out, Ref) or not isinstance(source, Ref):
            return
        base, out = source.value, event.out.value
        if name in ("view", "view_as") and not any(isinstance(arg, torch.dtype) for arg in (*event.args, *event.kwargs.values())):
            self._relies_on_order(name, base, out)
        elif name in ("contiguous", "ravel") and base == out:  # of another layout, one more tensor, and all that follows lies otherwise
            self.viewed.add(base)
            if not self._in_rows_at_all_sizes(base):
                self.itself.add(base)
                if event.untracked:  # a copy would have no history
                    self._check_ones(base, "==")
        elif name in MAY_COPY and self.trace.values[base].storage != self.trace.values[out].storage:
            if event.untracked and name == "contiguous" and self.trace.values[out].storage in self.memory_of_results:
                self._check_ones(base, "!=")  # what it hands back at other sizes says that it needs a gradient
            self.copied[out] = (base, event)
            self.copied_at[out] = self.version.get(self._root(base), 0)

    def _is_itself(self, name: str, event: Event) -> int | None:
        """What ``contiguous`` was called of, where it is no copy at any size, and the guard sees to how it lies.

        Of an input it is a call all the same, since that may lie otherwise; so it is where it leaves the region (``returned``).
        """
        if name != "contiguous" or len(event.args) != 1 or event.kwargs or not isinstance(event.args[0], Ref):
            return None
        base, out = event.args[0].value, event.out.value
        values = self.trace.values
        if values[base].storage != values[out].storage or not self._in_rows_at_all_sizes(base) or self._root(base) in self.inputs:
            return None
        self.viewed.add(base)
        return base

    def _in_rows_at_all_sizes(self, value: int) -> bool:
        """Of one row the strides that it would have of more are known, too."""
        return not self.dynamic.get(value) or in_rows(self.trace.values[value].tensor)

    def _check_ones(self, value: int, op: Literal["==", "!="]) -> None:
        """Guard that the free sizes of ``value`` that are 1 stay so (``==``), or that none of the others becomes 1 (``!=``)."""
        shape = self.trace.values[value].shape
        for dim in self.dynamic.get(value, ()):
            if (shape[dim] == 1) == (op == "=="):
                self._check_value(value, dim, op, 1)

    def _relies_on_order(self, name: str, base: int, view: int) -> None:
        """``view`` is one of ``base`` as it lies in memory."""
        before, after = (self.trace.values[value].shape for value in (base, view))
        free = [[dim for dim in self.dynamic.get(value, ()) if self.trace.values[value].shape[dim] == 1] for value in (base, view)]
        joined = len(free[0]) > len(free[1])  # a free size that is 1 here became part of another dim
        if name == "contiguous" or joined or not needs_no_rows(before, after):
            self.viewed.add(base)
        if (name == "contiguous" or joined) and not self._in_rows_at_all_sizes(base):
            self._check_ones(base, "==")

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
            if name in MAY_COPY:
                self._relies_on_order(name, base, made.out.value)
            if name == "detach":
                if event.untracked:  # what is written has no history
                    return node
                if self._root(base) not in self.renewed:
                    raise Refused("writes into a detached tensor", event.place)
                return self._call(torch.Tensor.detach, (node,), {}, Ref(base))  # ``buffer.data.add_(h)``
            sizes = tuple(self._argument(SizeOf(base, dim)) for dim in range(len(self.trace.values[base].shape)))
            return self._call(torch.Tensor.reshape, (node, sizes), {}, Ref(base))
        if name in ("transpose", "t", "swapaxes"):
            return self._call(made.func, (node, *args[1:]), {}, Ref(base))
        raise Refused(f"writes into a view made by {name}", event.place)


def _holds(value: Any, tensor: torch.Tensor, depth: int) -> bool:
    """Is the tensor somewhere in the attributes and items of ``value``?"""
    if value is tensor or not depth or isinstance(value, (*_LEAVES, torch.Tensor, torch.nn.Module)):
        return value is tensor
    if isinstance(value, (list, tuple, dict)):
        return any(_holds(item, tensor, depth - 1) for item in (value.values() if isinstance(value, dict) else value))
    slots = [getattr(value, name, None) for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    return any(_holds(item, tensor, depth - 1) for item in (*getattr(value, "__dict__", {}).values(), *slots))


def _new(node: Any) -> bool:
    """Is this a tensor that was made from numbers, or what was written into one, in whole or in part?"""
    while node.op == "call_function" and node.target.name in _VIEWS:
        node = node.all_input_nodes[0]
    return node.op == "call_function" and node.target.name in _MADE


def _values(tree: Any, found: list[int]) -> None:
    if isinstance(tree, Ref):
        found.append(tree.value)
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            _values(item, found)
    elif isinstance(tree, dict):
        for item in tree.values():
            _values(item, found)
