"""Nodes of the lifted graph: one node per different pure computation, its arguments in one spelling.

Comes in: torch calls on nodes. Goes out: ``Nodes``, a layer of the lifter: it writes nodes of canonical ``Op``s and describes them by
what was recorded (shape, free dims, dtype, strides, source line). Writing the same pure node twice gives the first one back.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from fxfuse.ops import Op, canonical
from fxfuse.private.torch_function import DisableTorchFunction
from fxfuse.recording.trace import Frame, Ref, Trace

from .free_sizes import FreeSizes
from .lifted import Sizes

# Ops whose dims count those of their first argument, and ops whose dims count those of their result: there -1 and 1 can be one spelling.
_DIMS_OF_INPUT = frozenset(
    "sum mean amax amin prod var std logsumexp all any norm nansum nanmean argmax argmin max min median softmax log_softmax softmin cumsum "
    "cumprod normalize select narrow squeeze flatten transpose permute movedim flip unbind split chunk split_with_sizes tensor_split "
    "unsafe_split unsafe_chunk unsafe_unbind index_select gather sort argsort glu".split()
)
_DIMS_OF_RESULT = frozenset({"cat", "stack", "unsqueeze"})
_DIM_ARGS = frozenset({"dim", "dim0", "dim1", "dims", "start_dim", "end_dim", "source", "destination", "axis"})


class Nodes(FreeSizes):
    """Writes the graph."""

    def __init__(self, trace: Trace, frame: Frame, sizes: Sizes, opaque: frozenset[int]) -> None:
        super().__init__(trace, frame, sizes, opaque)
        self.graph = torch.fx.Graph()
        self.cse: dict[Any, torch.fx.Node] = {}
        self.path = frame.path
        self.at = frame.index  # the frame that the current event belongs to
        self.random = self.factories = self.untracked = False

    def _describe(self, node: torch.fx.Node, value: int) -> None:
        seen = self.trace.values[value]
        with DisableTorchFunction():
            tensor = seen.tensor
            node.meta.update(
                value=value, shape=seen.shape, dyn=self.dynamic.get(value, frozenset()), dtype=tensor.dtype, device=tensor.device,
                stride=seen.stride, place=self.place, path=self.path, frame=self.at,
            )  # fmt: skip
            if self.untracked:
                node.meta["untracked"] = True

    def _node(self, op: Op, args: tuple[Any, ...], value: int | None) -> torch.fx.Node:
        key = None
        if not op.random:
            key = (op, torch.fx.node.map_aggregate(args, _hashable))
            try:
                known = self.cse.get(key)
            except TypeError:
                key, known = None, None
            if known is not None:
                if not self.untracked:
                    known.meta.pop("untracked", None)
                if value is not None:
                    known.meta.setdefault("again", set()).add(value)
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
        if op.name == "view" and len(canonical_args) == 2 and not isinstance(canonical_args[1], torch.dtype):
            # What it looks at may be laid out in another way once lanes are packed.
            op, canonical_args = canonical(torch.Tensor.reshape, canonical_args, {})
        shape = _first_shape(canonical_args)
        if any(isinstance(a, torch.dtype) for a in canonical_args):
            self.factories = True
        value = out.value if isinstance(out, Ref) else None
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
        with DisableTorchFunction():
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
