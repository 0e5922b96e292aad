"""Write nodes into a graph, each with the meta tensor that it gives, and move the lane axis of packed values.

Comes in: calls of torch functions and Tensor methods on nodes. Goes out: nodes with ``meta["val"]``, a stand-in of the same shape, strides
and dtype, so that rules can look at physical layouts.
"""

from __future__ import annotations

import inspect
import itertools
import linecache
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.fx

from fxfuse.functional import slice_along
from fxfuse.ops import Op
from fxfuse.private.dispatch import dynamo_is_imported

from .bundle import Bundle
from .lifted import Lifted
from .packs import Packs

Node = torch.fx.Node

_TENSOR_METHODS = {function: name for name, function in vars(torch.Tensor).items() if inspect.isfunction(function)}


class Packed(NamedTuple):
    """The values of all lanes in one tensor; ``dim`` is the lane axis, None where the lanes share one value."""

    node: Node
    dim: int | None


class CannotVectorize(Exception):
    """Raised by a rule that meets a case it does not cover: the bundle stays a loop, for this reason."""

    bundle: Bundle | None = None


class Writer:
    """A graph under construction."""

    def __init__(self, lifted: Lifted, packs: Packs) -> None:
        self.lifted, self.packs = lifted, packs
        self.real = _small(lifted.graph)
        self.graph = torch.fx.Graph()
        self.picked: dict[tuple[Node, int, tuple[int, ...]], Node] = {}
        self.attributes: dict[str, Node] = {}
        self.source: Node | None = None  # the original node on whose behalf we are writing

    def call(self, func: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Node:
        """A call of ``func`` (a name: a Tensor method); its ``meta["val"]`` is found by running it on meta tensors."""
        if isinstance(func, str):
            node = self.graph.call_method(func, args, kwargs)
            function: Callable[..., Any] = getattr(torch.Tensor, func)
        else:
            node = self.graph.call_function(func, args, kwargs)
            function = func
        values, keywords = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        with torch.no_grad():
            node.meta["val"] = function(*values, **keywords)
        return self._placed(node)

    def _placed(self, node: Node) -> Node:
        if self.source is not None:
            node.meta["place"] = self.source.meta.get("place")
            place = node.meta["place"]
            if place is not None:
                code = linecache.getline(place.file, place.line).strip()
                where = self.source.meta.get("path") or "forward"
                node.meta["stack_trace"] = f'File "{place.file}", line {place.line}, in {where}\n    {code}'
        return node

    def stand_in(self, shape: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of that shape to find shapes with: zeros on the CPU where they are small, else a meta tensor.

        Meta kernels are written in Python, and the first of them imports dynamo and sympy: a second that small models need not wait.
        """
        strides = tuple(stride) if stride is not None else None
        if not self.real:
            return torch.empty(shape, dtype=dtype, device="meta") if strides is None else torch.empty_strided(
                shape, strides, dtype=dtype, device="meta"
            )  # fmt: skip
        if strides is None:
            return torch.zeros(shape, dtype=dtype)
        extent = 1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True)) if 0 not in shape else 0
        return torch.zeros(extent, dtype=dtype).as_strided(shape, strides)

    def _meta(self, node: Node) -> torch.Tensor:
        return self.stand_in(node.meta["shape"], node.meta.get("stride"), node.meta["dtype"])

    def attribute(self, target: str, value: torch.Tensor) -> Node:
        """A tensor that the region holds, read once per program."""
        node = self.attributes.get(target)
        if node is None:
            node = self.attributes[target] = self.graph.get_attr(target)
            node.meta["val"] = self.stand_in(value.shape, value.stride(), value.dtype)
            node.meta["place"] = None
        return node

    def constant(self, values: list[int], device: torch.device) -> Node:
        """An index tensor held by the region."""
        tensor = torch.tensor(values, dtype=torch.int64, device=device)
        held = [(name, known) for name, known in self.packs.constants.items() if name not in self.lifted.constants]
        alike = (n for n, known in held if known.dtype is tensor.dtype and known.device == tensor.device and torch.equal(known, tensor))
        fresh = (f"{self.packs.holder}.index_{number}" for number in itertools.count(len(self.packs.constants)))
        name = next(alike, "") or next(name for name in fresh if name not in self.packs.constants)
        self.packs.constants.setdefault(name, tensor)
        node = self.attribute(name, tensor)
        if self.real:  # rather than zeros, by which something may be divided
            node.meta["val"] = tensor.cpu()
        return node

    def pick(self, value: Packed, total: int, positions: list[int]) -> Packed:
        """The lanes at ``positions`` of a packed value of ``total`` lanes."""
        node, dim = value
        if dim is None or positions == list(range(total)):
            return value
        count = len(positions)
        step = positions[1] - positions[0] if count > 1 else 1
        if step > 0 and positions == list(range(positions[0], positions[0] + step * count, step)):
            return Packed(self.call(slice_along, node, dim, positions[0], positions[-1] + 1, step), dim)
        if count % total == 0 and positions == list(range(total)) * (count // total):
            sizes = [-1] * (len(node.meta["val"].shape) + 1)
            sizes[dim] = count // total
            expanded = self.call("expand", self.call(torch.unsqueeze, node, dim), *sizes)
            return Packed(self.call(torch.flatten, expanded, dim, dim + 1), dim)
        rows = total // max(step, 1)
        if count == total and total % max(step, 1) == 0 and positions == [r * step + c for c in range(step) for r in range(rows)]:
            turned = self.call(torch.transpose, self.call(torch.unflatten, node, dim, (rows, step)), dim, dim + 1)
            return Packed(self.call(torch.flatten, turned, dim, dim + 1), dim)
        key = (node, dim, tuple(positions))
        if key not in self.picked:
            self.picked[key] = self.call(torch.index_select, node, dim, self.constant(positions, self.device(nodes=None)))
        return Packed(self.picked[key], dim)

    def device(self, nodes: Iterable[Node] | None) -> torch.device:
        """The device the region was recorded on."""
        for node in nodes or self.lifted.graph.nodes:
            device = node.meta.get("device")
            if device is not None:
                return torch.device(device)
        return torch.device("cpu")

    def spell(self, op: Op, args: tuple[Any, ...]) -> Node:
        """A canonical call in the words a person would write: a torch function, or a Tensor method."""
        positional, keywords = op.invocation(args)
        name = getattr(op.func, "__name__", "")
        if name == "__get__":
            return self.graph.call_function(getattr, (positional[0], op.func.__self__.__name__))  # type: ignore[attr-defined]
        if getattr(torch.Tensor, name, None) is op.func or isinstance(op.func, type(torch.Tensor.add)):
            return self.graph.call_method(name, positional, keywords)
        if op.func in _TENSOR_METHODS:  # Tensor.__pow__, whose own name is another's
            return self.graph.call_method(_TENSOR_METHODS[op.func], positional, keywords)
        return self.graph.call_function(op.func, positional, keywords)

    def respell(self, op: Op, args: tuple[Any, ...], zeros: bool = True) -> Node:
        """A canonical call on packed operands, with its ``meta["val"]``. ``zeros``: the op takes a tensor of zeros (no inverse does)."""
        node = self.spell(op, args)
        values = torch.fx.node.map_arg(args, lambda n: n.meta["val"] if zeros else n.meta["val"].to("meta"))
        with torch.no_grad():
            made = op(*values)
            node.meta["val"] = made if zeros else self.stand_in(made.shape, made.stride(), made.dtype)
        return self._placed(node)

    def front(self, value: Packed, lanes: int) -> Node:
        """The value with its lane axis in front, ``[G, ...]``; a shared value is expanded (no copy)."""
        node, dim = value
        if dim is None:
            return self.call("expand", self.call(torch.unsqueeze, node, 0), lanes, *([-1] * len(node.meta["val"].shape)))
        return self.at(value, 0)

    def at(self, value: Packed, dim: int) -> Node:
        """A batched value with its lane axis moved to ``dim``."""
        assert value.dim is not None
        if value.dim == dim:
            return value.node
        if abs(value.dim - dim) == 1:  # the same, at half the overhead
            return self.call(torch.transpose, value.node, value.dim, dim)
        return self.call(torch.movedim, value.node, value.dim, dim)


# A region whose tensors have fewer elements than this in all is run on zeros to find shapes; others on meta tensors. Where dynamo is in
# use, so are meta kernels: 50 us for an op, as long as it takes to compute some ten thousand numbers. Every candidate form is written anew.
SMALL, SMALL_BESIDE_DYNAMO = 1 << 23, 1 << 18


def _small(graph: torch.fx.Graph) -> bool:
    limit = SMALL_BESIDE_DYNAMO if dynamo_is_imported() else SMALL
    total = 0
    for node in graph.nodes:
        dtype, shape = node.meta.get("dtype"), node.meta.get("shape")
        if dtype in (torch.float16, torch.bfloat16) or (dtype is not None and dtype.is_complex):
            return False  # kernels for these are missing here and there
        total += math.prod(shape) if shape is not None else 0
    return total < limit
