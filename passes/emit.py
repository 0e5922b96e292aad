"""Write the rewritten graph: one op per bundle, single nodes as they were.

Comes in: a lifted graph, its bundles, and which lowering to use for which bundle. Goes out: a new ``torch.fx.Graph`` that calls public
torch functions, and the recipes of the weights it packs. The rules (``passes/rules``) say what to write for a bundle; this file gives them
their operands in packed form and carries the layouts.

A packed value is a node and the dim of its lane axis (``Packed``), as in JAX's batching rules; ``dim is None`` means that all lanes
have the same value. Every node carries ``meta["val"]``, a meta tensor, so that rules can look at physical shapes and strides.
"""

from __future__ import annotations

import inspect
import itertools
import linecache
import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import networkx as nx
import torch
import torch.fx

from fxfuse.graph import FusedOp, Recipe

from .bundle import Bundle, Bundles
from .functional import drop_unused, numbers_like, slice_along
from .lifted import Lifted
from .ops import Op
from .outputs import treatment
from .tidy import tidy

Node = torch.fx.Node

_TENSOR_METHODS = {function: name for name, function in vars(torch.Tensor).items() if inspect.isfunction(function)}


class Packed(NamedTuple):
    """The values of all lanes in one tensor; ``dim`` is the lane axis, None where the lanes share one value."""

    node: Node
    dim: int | None


class CannotVectorize(Exception):
    """Raised by a rule that meets a case it does not cover: the bundle stays a loop, for this reason."""

    bundle: Bundle | None = None


@dataclass
class Packs:
    """The weights packed so far, shared by all programs of one region."""

    recipes: dict[tuple[str, ...], Recipe] = field(default_factory=dict)
    where: dict[str, tuple[Recipe, int]] = field(default_factory=dict)  # member -> its recipe and lane
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    unpackable: dict[str, str] = field(default_factory=dict)  # member -> why it must stay as it is
    kinds: dict[str, Literal["parameter", "buffer"]] = field(default_factory=dict)  # of the members that may be packed
    holder: str = "packed"

    def name(self, members: tuple[str, ...]) -> str:
        """A readable name for the pack: the members' common path, without the part that differs from lane to lane."""
        split = [member.split(".") for member in members]
        width = min(len(parts) for parts in split)
        common = [
            parts[0] for parts in zip(*(s[:width] for s in split), strict=True) if len(set(parts)) == 1
        ]  # fmt: skip
        last = split[0][-1]
        if not common or common[-1] != last:
            common.append(last)
        base = ".".join([self.holder, *common])
        taken = {recipe.name for recipe in self.recipes.values()}
        name, count = base, 1
        while name in taken or any(t.startswith(name + ".") or name.startswith(t + ".") for t in taken):
            count += 1
            stem = [str(count)] if len(common) == 1 else [*common[:-2], f"{common[-2]}_{count}"]
            name = ".".join([self.holder, *stem, last])
        return name


class Emitter:
    """Builds one program's graph."""

    def __init__(
        self,
        lifted: Lifted,
        bundles: Bundles,
        packs: Packs,
        rules: Callable[[Bundle], Any],
        lowering: dict[Any, str],
        prefer: str,
        singles_too: bool,
    ) -> None:
        self.lifted, self.bundles, self.packs, self.rules = lifted, bundles, packs, rules
        self.lowering, self.prefer = lowering, prefer
        self.singles_too = singles_too  # offer other spellings of nodes that are in no bundle
        self.real = _small(lifted.graph)
        self.graph = torch.fx.Graph()
        self.singles: dict[Node, Any] = {}
        self.values: dict[int, Packed] = {}
        self.pieces: dict[int, Node] = {}
        self.separated: dict[int, Node] = {}  # pieces that are tensors of their own
        self.strided: dict[Node, Node] = {}  # results, laid out as in the recording
        self.picked: dict[tuple[Node, int, tuple[int, ...]], Node] = {}
        self.attributes: dict[str, Node] = {}
        self.gathers: dict[tuple[Node, ...], Node] = {}  # what was joined for one bundle serves others
        self.choices: dict[Any, tuple[str, ...]] = {}
        self.ops: list[FusedOp] = []
        self.notes: list[str] = []  # what a person should know of how the packed form computes
        self.source: Node | None = None  # the original node on whose behalf we are writing

    # -- writing nodes ------------------------------------------------------------------------------------------------------------

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

    # -- operands -----------------------------------------------------------------------------------------------------------------

    def operand(self, bundle: Bundle, name: str) -> Any:
        """The argument ``name`` of a bundle: ``Packed`` where it is a tensor, else the value that all lanes have in common."""
        op = bundle.op
        assert op is not None
        column = op.names.index(name)
        given: list[Any] = [member.args[column] for member in bundle.members]
        first = given[0]
        if isinstance(first, Node):
            return self.fetch(given)
        if type(first) in (int, float) and any(number != first for number in given):
            return self.numbers(bundle, given)
        if isinstance(first, (tuple, list)) and any(isinstance(item, Node) for item in first):
            return type(first)(self.fetch([g[i] for g in given]) if isinstance(item, Node) else item for i, item in enumerate(first))
        return first

    def numbers(self, bundle: Bundle, given: list[Any]) -> Packed:
        """Numbers, one per lane, as a tensor ``[G]`` of the dtype of the op's tensors."""
        like = next(node for node in bundle.members[0].all_input_nodes if node.meta.get("dtype") is not torch.bool)
        if like.meta["dtype"] is torch.int64:
            return Packed(self.constant(given, self.device(None)), 0)
        column = bundle.members[0].args.index(like)
        bits = torch.tensor(given, dtype=torch.float64).view(torch.int64).tolist()
        operand = self.fetch([member.args[column] for member in bundle.members])  # type: ignore[misc]
        return Packed(self.call(numbers_like, self.constant(bits, self.device(None)), operand.node), 0)

    def nodes(self, bundle: Bundle, name: str) -> list[Node] | None:
        """The lanes' own nodes for the tensor argument ``name``; None where it is not a tensor."""
        assert bundle.op is not None
        column = bundle.op.names.index(name)
        found: list[Any] = [member.args[column] for member in bundle.members]
        return found if isinstance(found[0], Node) else None

    def fetch(self, nodes: list[Node]) -> Packed:
        """The values of ``nodes``, one per lane, as one packed value; at best nothing is moved."""
        first = nodes[0]
        if all(node is first for node in nodes):
            return Packed(self.single(first), None)
        if all(node.op == "get_attr" for node in nodes):
            packed = self.weights(nodes)
            if packed is not None:
                return packed
        bundle = self.bundles.bundle(first)
        if bundle is not None and all(self.bundles.of.get(node) == bundle.index for node in nodes):
            value = self.values[bundle.index]
            return self.pick(value, len(bundle.members), [self.bundles.position[node] for node in nodes])
        stretch = self.bundles.stretch(nodes)
        if stretch is not None:
            return self._stretch(*stretch, len(nodes))
        if isinstance(first.target, Op) and first.target.name.startswith("size"):  # lanes of one shape have one size, whoever has it
            return Packed(self.single(first), None)
        known = self.gathers.get(tuple(nodes))
        if known is None:
            known = self.gathers[tuple(nodes)] = self._gathered(nodes)
        return Packed(known, 0)

    def _gathered(self, nodes: list[Node]) -> Node:
        """Values from several places, one per lane, lanes in front: runs of lanes that are packed already are taken as they are."""
        parts: list[tuple[Node, bool]] = []  # (value, it has a lane axis in front)
        run: list[Node] = []
        for node, following in zip(nodes, [*nodes[1:], None], strict=True):
            run.append(node)
            bundle = self.bundles.bundle(node)
            if following is not None and bundle is not None and self.bundles.bundle(following) is bundle:
                continue
            value = self.values.get(bundle.index) if bundle is not None else None
            if len(run) > 1 and value is not None and value.dim is not None:
                assert bundle is not None
                picked = self.pick(value, len(bundle.members), [self.bundles.position[n] for n in run])
                parts.append((self.at(picked, 0), True))
            else:
                parts.extend((self.single(n), False) for n in run)
            run = []
        if not any(packed for _, packed in parts):
            return self.call(torch.stack, [part for part, _ in parts], 0)
        return self.call(torch.cat, [part if packed else self.call(torch.unsqueeze, part, 0) for part, packed in parts], 0)

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

    # -- weights ------------------------------------------------------------------------------------------------------------------

    def weights(self, nodes: list[Node], order: tuple[int, ...] | None = None, style: str = "stack") -> Packed | None:
        """The lanes' own parameters as one packed tensor ``[G, *shape.permute(order)]``, packed once; None where they cannot be.

        ``style="cat"`` gives ``[G * s0, ...]`` with ``dim`` 0 instead. The first request decides how the pack is stored; later ones
        that want another order get a view of it.
        """
        targets = tuple(str(node.target) for node in nodes)
        if any(node.op != "get_attr" for node in nodes) or any(t in self.packs.unpackable for t in targets):
            return None
        if any(t in self.lifted.constants for t in targets):  # no module holds them
            return None
        meta = nodes[0].meta
        shape = tuple(meta["shape"])
        order = tuple(range(len(shape))) if order is None else order
        recipe = self.packs.recipes.get(targets)
        if len(set(targets)) < len(targets):
            return self._repeated(nodes, order, style)
        if recipe is None:
            if any(t in self.packs.where for t in targets):
                return self._repack(nodes, targets, order, style)
            stored = "cat" if len(shape) == 1 else style if shape else "stack"
            recipe = Recipe(
                self.packs.name(targets), targets, shape, order, "cat" if stored == "cat" else "stack",
                self.packs.kinds.get(targets[0], "parameter"), bool(meta.get("requires_grad")), _own_shapes(nodes),
            )  # fmt: skip
            self.packs.recipes[targets] = recipe
            self.packs.where.update((target, (recipe, lane)) for lane, target in enumerate(targets))
        if recipe.style in ("rows", "padded"):
            return None
        return self._viewed(self.packed(recipe, meta), recipe, order, style)

    def filled_up(self, nodes: list[Node], shape: tuple[int, ...], order: tuple[int, ...]) -> Node:
        """The lanes' own parameters, each with zeros behind it up to ``shape``, as one tensor ``[G, *shape.permute(order)]``."""
        shapes = tuple(tuple(node.meta["shape"]) for node in nodes)
        targets = tuple(str(node.target) for node in nodes)
        blocked = next((t for t in targets if t in self.packs.unpackable or t in self.lifted.constants), None)
        if blocked is not None:
            raise CannotVectorize(f"{blocked} cannot be packed: {self.packs.unpackable.get(blocked, 'no module holds it')}")
        if len(set(shapes)) == 1:
            packed = self.weights(nodes, order)
            assert packed is not None
            return packed.node
        recipe = self.packs.recipes.get(targets)
        if recipe is None:
            if any(t in self.packs.where for t in targets):
                raise CannotVectorize(f"{targets[0]} is packed with other weights already")
            kind, requires_grad = self.packs.kinds.get(targets[0], "parameter"), bool(nodes[0].meta.get("requires_grad"))
            recipe = Recipe(self.packs.name(targets), targets, shape, order, "padded", kind, requires_grad, shapes)
            self.packs.recipes[targets] = recipe
            self.packs.where.update((target, (recipe, lane)) for lane, target in enumerate(targets))
        if recipe.style != "padded" or recipe.order != order or recipe.shape != shape:
            raise CannotVectorize(f"{targets[0]} is packed in another form already")
        return self.packed(recipe, nodes[0].meta)

    def table(self, nodes: list[Node]) -> tuple[Node, list[int]] | str:
        """The lanes' own tables as rows of one, ``[V0 + V1 + ..., *rest]``, and where each lane's rows begin; else why they cannot be.

        Tables may differ in their number of rows, and one may serve several lanes.
        """
        targets = [str(node.target) for node in nodes]
        distinct = list(dict(zip(targets, nodes, strict=True)).values())
        names = tuple(dict.fromkeys(targets))
        if any(name in self.lifted.constants for name in names):
            return "a table that no module of the model holds"
        blocked = next((name for name in names if name in self.packs.unpackable), None)
        if blocked is not None:
            return f"{blocked} cannot be packed: {self.packs.unpackable[blocked]}"
        if len({self.packs.kinds.get(name) for name in names}) > 1:
            return f"{names[0]} is a {self.packs.kinds.get(names[0])}, others are not"
        held = self.packs.where.get(names[0])
        if held is None and not any(name in self.packs.where for name in names):
            shapes = tuple(tuple(node.meta["shape"]) for node in distinct)
            equal = len(set(shapes)) == 1
            recipe = Recipe(
                self.packs.name(names), names, shapes[0], tuple(range(len(shapes[0]))), "cat" if equal else "rows",
                self.packs.kinds.get(names[0], "parameter"), bool(nodes[0].meta.get("requires_grad")), None if equal else shapes,
            )  # fmt: skip
            self.packs.recipes[names] = recipe
            self.packs.where.update((name, (recipe, lane)) for lane, name in enumerate(names))
            held = (recipe, 0)
        places = [self.packs.where.get(name) for name in targets]
        if held is None or any(place is None or place[0] is not held[0] for place in places):
            other = next(name for name in names if name in self.packs.where)
            return f"{other} is packed with other weights already"
        recipe = held[0]
        node = self.packed(recipe, nodes[0].meta)
        if recipe.style == "stack":
            if recipe.order != tuple(range(len(recipe.order))):
                return f"{names[0]} is packed in another order already"
            node = self.call(torch.flatten, node, 0, 1)
            starts: tuple[int, ...] = tuple(range(0, recipe.shape[0] * len(recipe.members), recipe.shape[0]))
        elif recipe.style == "padded":
            return f"{names[0]} is packed in another form already"
        else:
            starts = recipe.row_starts()
        return node, [starts[place[1]] for place in places if place is not None]

    def packed(self, recipe: Recipe, meta: dict[str, Any]) -> Node:
        """The node that reads a packed tensor as it is stored."""
        if recipe.style == "rows":
            return self.attribute(recipe.name, self.stand_in((recipe.row_starts()[-1], *recipe.shape[1:]), None, meta["dtype"]))
        inner = [recipe.shape[d] for d in recipe.order]
        shape = [len(recipe.members), *inner]
        if recipe.style == "cat":
            shape = [shape[0] * shape[1], *shape[2:]]
        return self.attribute(recipe.name, self.stand_in(shape, None, meta["dtype"]))

    def _viewed(self, node: Node, recipe: Recipe, order: tuple[int, ...], style: str) -> Packed:
        lanes = len(recipe.members)
        if recipe.order == order and recipe.style == style:
            return Packed(node, 0)
        if recipe.style == "cat":
            node = self.call(torch.unflatten, node, 0, (lanes, -1))
        if recipe.order != order:
            inverse = [recipe.order.index(d) for d in order]
            node = self.call(torch.permute, node, (0, *(1 + d for d in inverse)))
        if style == "cat":
            node = self.call(torch.flatten, node, 0, 1)
        return Packed(node, 0)

    def _repeated(self, nodes: list[Node], order: tuple[int, ...], style: str) -> Packed | None:
        """Weights that several lanes use: each is packed once."""
        distinct = list(dict.fromkeys(nodes))
        whole = self.weights(distinct, order) if len(distinct) > 1 else None
        if whole is None:
            return None
        lane_of = {node: lane for lane, node in enumerate(distinct)}
        picked = self.pick(whole, len(distinct), [lane_of[node] for node in nodes])
        return Packed(self.call(torch.flatten, picked.node, 0, 1), 0) if style == "cat" else picked

    def _repack(self, nodes: list[Node], targets: tuple[str, ...], order: tuple[int, ...], style: str) -> Packed | None:
        """Weights that another bundle has packed already: the same pack in another order, or part of it."""
        found = [self.packs.where.get(target) for target in targets]
        recipe = found[0][0] if found[0] is not None else None
        if recipe is None or recipe.style in ("rows", "padded") or any(f is None or f[0] is not recipe for f in found):
            return None
        whole = self._viewed(self.packed(recipe, nodes[0].meta), recipe, order, "stack")
        picked = self.pick(whole, len(recipe.members), [f[1] for f in found if f is not None])
        return Packed(self.call(torch.flatten, picked.node, 0, 1), 0) if style == "cat" else picked

    # -- single nodes -------------------------------------------------------------------------------------------------------------

    def single(self, node: Node) -> Any:
        """The value of one original node in the new graph."""
        known = self.singles.get(node)
        if known is not None:
            return known
        bundle, wide = self.bundles.bundle(node), self.bundles.end_to_end(node)
        if node.op == "get_attr":
            own = node.meta.get("own_shape")
            if own is None:
                made = self.attribute(str(node.target), self._meta(node))
            else:
                held = self.attribute(str(node.target), self.stand_in(own, None, node.meta["dtype"]))
                made = self.call("reshape", held, node.meta["shape"])
        elif bundle is not None and bundle.index in self.values and not self._cheaper_alone(node, bundle):
            made = self._lane(bundle, node)
        elif wide is not None and wide.apart is not None and wide.index in self.values:
            if wide.index not in self.pieces:
                self.pieces[wide.index] = self._stretches(wide, torch.split)
            made = self.call(operator.getitem, self.pieces[wide.index], self.bundles.position[node])
        else:
            made = self._copy(node)
        self.singles[node] = made
        return made

    def _cheaper_alone(self, node: Node, bundle: Bundle) -> bool:
        """A slice of a tensor that is no lane itself: slicing it again is free, taking it out of a pack may not be."""
        return bundle.name in ("select", "slice_along") and self.bundles.bundle(node.all_input_nodes[0]) is None

    def _piece(self, node: Node) -> Any:
        """A lane's piece of a packed tuple, where no bundle takes that piece for all lanes; None for any other node."""
        if not (isinstance(node.target, Op) and node.target.name == "item"):
            return None
        bundle = self.bundles.bundle(node.all_input_nodes[0])
        if bundle is None or bundle.index not in self.values:
            return None
        value, dim = self.values[bundle.index]
        piece = self.call(operator.getitem, value, node.args[1])
        return piece if dim is None else self.call(torch.select, piece, dim, self.bundles.position[node.all_input_nodes[0]])

    def _lane(self, bundle: Bundle, node: Node) -> Any:
        value, dim = self.values[bundle.index]
        if dim is None:
            return value
        pieces = self.pieces.get(bundle.index)
        if pieces is None:
            pieces = self.pieces[bundle.index] = self.call(torch.unbind, value, dim)
        return self.call(operator.getitem, pieces, self.bundles.position[node])

    def _stretch(self, bundle: Bundle, first: int, count: int) -> Packed:
        """Lanes of one width that lie one behind the other among others: a view."""
        assert bundle.apart is not None
        whole, shape = self.values[bundle.index].node, bundle.members[first].meta["shape"]
        start = sum(member.meta["shape"][bundle.apart] for member in bundle.members[:first])
        dim, width = len(shape) + bundle.apart, int(shape[bundle.apart])
        part = self.call(slice_along, whole, dim, start, start + count * width, 1)
        return Packed(self.call(torch.unflatten, part, dim, (count, width)), dim)

    def _stretches(self, bundle: Bundle, split: Callable[..., Any]) -> Node:
        """The lanes' parts of what lies end to end."""
        assert bundle.apart is not None
        sizes = [int(member.meta["shape"][bundle.apart]) for member in bundle.members]
        return self.call(split, self.values[bundle.index].node, sizes, bundle.apart)

    def _copy(self, node: Node) -> Node:
        previous, self.source = self.source, node
        args = torch.fx.node.map_arg(node.args, self.single)
        if node.op == "call_module":
            made = self.graph.call_module(str(node.target), args, torch.fx.node.map_arg(node.kwargs, self.single))
        else:
            assert isinstance(node.target, Op), node
            made = self.spell(node.target, args)
        self._value(node, made, args)
        self._placed(made)
        if node.meta.get("update"):
            made.meta["update"] = True
        self.source = previous
        return made

    def _value(self, node: Node, made: Node, args: Any) -> None:
        """``meta["val"]`` of a copied node: as recorded, unless an operand now has other strides, which this op may pass on."""
        is_size = isinstance(node.target, Op) and node.target.name.startswith("size")
        recorded = node.meta.get("shape") is not None
        if recorded and not any(_restrided(operand, self.singles.get(operand)) for operand in node.all_input_nodes):
            made.meta["val"] = self._meta(node)
        elif is_size or (recorded and isinstance(node.target, Op)):
            function: Any = node.target
            try:
                values = torch.fx.node.map_arg(args, lambda n: n.meta["val"])
                with torch.no_grad():
                    made.meta["val"] = function(*values)
            except (KeyError, RuntimeError, NotImplementedError, IndexError):  # no meta kernel, or an index made of zeros
                if recorded:
                    made.meta["val"] = self._meta(node)
        elif recorded:
            made.meta["val"] = self._meta(node)

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

    # -- the walk -----------------------------------------------------------------------------------------------------------------

    def run(self) -> torch.fx.Graph:
        """The rewritten graph. Raises ``CannotVectorize`` with ``bundle`` set where a rule refuses."""
        output = next(node for node in reversed(self.lifted.graph.nodes) if node.op == "output")
        for node in self.lifted.graph.nodes:
            if node.op == "placeholder":
                made = self.graph.placeholder(node.name)
                made.meta.update(place=None)
                if node.meta.get("shape") is not None:
                    made.meta["val"] = self._meta(node)
                self.singles[node] = made
        for unit in self._units(output):
            if isinstance(unit, int):
                self._bundle(self.bundles.classes[unit])
            elif unit not in self.singles:
                self.singles[unit] = self._single_unit(unit)
        self._outputs(output)
        drop_unused(self.graph)
        tidy(self.graph)
        for node in self.graph.nodes:  # the graph is kept: no data in it
            value = node.meta.get("val")
            if self.real and isinstance(value, torch.Tensor):
                node.meta["val"] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
            elif self.real and isinstance(value, (tuple, list)):
                del node.meta["val"]
        return self.graph

    def _units(self, output: Node) -> list[Any]:
        """Bundles (by number) and single nodes in an order that respects the dataflow, close to the program's own."""
        of = {n: i for n, i in self.bundles.of.items() if i in self.bundles.active}
        position = {node: i for i, node in enumerate(self.lifted.graph.nodes)}
        dataflow = nx.DiGraph()
        # Calls of closed modules and updates of buffers run whether or not anybody reads what they return.
        calls = [node for node in self.lifted.graph.nodes if node.op == "call_module" or node.meta.get("update")]
        pending: list[Any] = [of.get(n, n) for n in (*output.all_input_nodes, *calls)]
        seen: set[Any] = set()
        while pending:
            unit = pending.pop()
            if unit in seen or (isinstance(unit, Node) and unit.op in ("get_attr", "placeholder")):
                continue
            seen.add(unit)
            dataflow.add_node(unit)
            members = self.bundles.classes[unit].members if isinstance(unit, int) else [unit]
            for operand in {of.get(n, n) for m in members for n in m.all_input_nodes}:
                if not (isinstance(operand, Node) and operand.op in ("get_attr", "placeholder")):
                    dataflow.add_edge(operand, unit)
                    pending.append(operand)
        self._keep_order([node for node in calls if node.op == "call_module"], dataflow)

        def first(unit: Any) -> tuple[int, int]:
            """One chunk after the other, whatever the order of the program; within a chunk, as the program has it."""
            bundle = self.bundles.classes[unit] if isinstance(unit, int) else None
            return (0, position[unit]) if bundle is None else (bundle.chunk, position[bundle.members[0]])

        return list(nx.lexicographical_topological_sort(dataflow, key=first))

    def _keep_order(self, calls: list[Node], dataflow: nx.DiGraph) -> None:
        """A module that stays closed and is called again may hold state: its calls keep their order."""
        latest: dict[Any, Node] = {}
        for node in calls:
            if node.target in latest:
                dataflow.add_edge(latest[node.target], node)
            latest[node.target] = node
        if len(latest) < len(calls) and not nx.is_directed_acyclic_graph(dataflow):
            units = [unit for edge in nx.find_cycle(dataflow) for unit in edge if isinstance(unit, int)]
            refusal = CannotVectorize(f"{calls[0].target} is called in an order that this lane set would change")
            refusal.bundle = self.bundles.classes[units[0]]
            raise refusal

    def _bundle(self, bundle: Bundle) -> None:
        self.source = bundle.members[0]
        try:
            rule = self.rules(bundle)
            value, lowering = rule.apply(self, bundle)
        except CannotVectorize as refusal:
            refusal.bundle = bundle
            raise
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
            # A rule that fails on meta tensors is a rule that does not cover this case.
            failure = CannotVectorize(f"{bundle.name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
            failure.bundle = bundle
            raise failure from error
        self.values[bundle.index] = value
        if not rule.view and bundle.chunk == 0:
            operands = [n.meta.get("shape") for n in bundle.members[0].all_input_nodes[:2]]
            shapes = " x ".join(str(list(shape)) for shape in operands if shape is not None)
            lanes, lowering = len(bundle.members), lowering if bundle.chunks == 1 else f"{lowering}, {bundle.chunks} chunks"
            self.ops.append(FusedOp(bundle.name, bundle.whole or lanes, lowering, bundle.members[0].meta.get("place"), shapes))
        self.source = None

    def _single_unit(self, node: Node) -> Any:
        from .rules.joins import join  # rule families that also serve single nodes
        from .rules.single import respelled

        self.source = node
        made = self._own(node) if node.meta.get("alone") and node.meta.get("out_stride") is not None else join(self, node)
        if made is None:
            made = self._piece(node)
        if made is None and isinstance(node.target, Op) and node.target.name == "pick_along":
            source, dim, positions = node.args
            index = self.constant(list(positions), self.device([node]))  # type: ignore[arg-type]
            made = self.call(torch.index_select, self.single(source), dim, index)  # type: ignore[arg-type]
        if made is None and self.singles_too:
            made = respelled(self, node)
            if made is not None:
                key = ("single", node.target.name, tuple(n.meta.get("shape") for n in node.all_input_nodes))  # type: ignore[union-attr]
                shapes = " x ".join(str(list(shape)) for shape in key[2][:2] if shape is not None)
                self.ops.append(FusedOp(str(key[1]), 1, self.lowering[key], node.meta.get("place"), shapes))
        self.source = None
        return made if made is not None else self._copy(node)

    def _outputs(self, output: Node) -> None:
        leaves = list(output.args[0])  # type: ignore[arg-type]
        by_bundle: dict[int, list[Node]] = {}
        for leaf in leaves:
            bundle = self.bundles.end_to_end(leaf) if isinstance(leaf, Node) else None
            value = self.values.get(bundle.index) if bundle is not None else None
            if bundle is not None and value is not None and (value.dim is not None or bundle.apart is not None):
                by_bundle.setdefault(bundle.index, []).append(leaf)
        for index, members in by_bundle.items():
            self._separate(self.bundles.classes[index], list(dict.fromkeys(members)))
        made = {leaf: self._strided(leaf) for leaf in dict.fromkeys(leaves) if isinstance(leaf, Node)}  # one tensor given twice is one
        self.graph.output([made[leaf] if isinstance(leaf, Node) else leaf for leaf in leaves])

    def _separate(self, bundle: Bundle, members: list[Node]) -> None:
        """Lanes that leave the region one by one leave as tensors of their own, as they were: not as views of one pack."""
        self.source = members[0]
        value, dim = self.values[bundle.index]
        if len(members) == 1 and dim is not None and bundle.index not in self.separated:
            self.singles[members[0]] = self.call(torch.select_copy, value, dim, self.bundles.position[members[0]])
            members = []
        pieces = (self.separated.get(bundle.index) or self._own_pieces(bundle)) if members else None
        for member in members:
            self.singles[member] = self.call(operator.getitem, pieces, self.bundles.position[member])
        self.source = None

    def _own_pieces(self, bundle: Bundle) -> Node:
        """The lanes of a packed value, or of one that lies end to end, each in memory of its own."""
        value, dim = self.values[bundle.index]
        return self._stretches(bundle, torch.split_with_sizes_copy) if dim is None else self.call(torch.unbind_copy, value, dim)

    def _own(self, node: Node) -> Any:
        """A tensor of which several results are views (``returned``): in memory of its own, laid out as in the recording."""
        source: Any = node.args[0]
        bundle = self.bundles.end_to_end(source)
        packed = self.values.get(bundle.index) if bundle is not None else None
        if bundle is None or packed is None or (packed.dim is None and bundle.apart is None):
            made = self.single(source)
            made = self.call(torch.clone, made) if made.op in ("placeholder", "get_attr") else made
        else:
            if bundle.index not in self.separated:
                self.separated[bundle.index] = self._own_pieces(bundle)
            made = self.call(operator.getitem, self.separated[bundle.index], self.bundles.position[source])
        return self._laid_out(node, made)

    def _strided(self, leaf: Node) -> Any:
        """An output with the strides that the original's has, where both are dense: callers may ``view`` it."""
        if leaf.meta.get("alone"):
            return self.single(leaf)
        if leaf not in self.strided:
            self.strided[leaf] = self._laid_out(leaf, self.single(leaf))
        return self.strided[leaf]

    def _laid_out(self, leaf: Node, node: Any) -> Any:
        wanted, value = leaf.meta.get("out_stride"), node.meta.get("val")
        if wanted is None or not isinstance(value, torch.Tensor) or value.shape != torch.Size(leaf.meta["shape"]):
            return node
        how = treatment(leaf, node)
        one_row = any(value.shape[d] == 1 for d in leaf.meta.get("dyn") or ())  # of which the strides of more rows cannot be told
        if not how and not one_row and all(w == s or n == 1 for w, s, n in zip(wanted, value.stride(), value.shape, strict=True)):
            return node

        def copied(node: Node) -> Node:
            return self.call("clone", node, memory_format=torch.contiguous_format) if how == "clone" else self.call("contiguous", node)

        order = sorted(range(len(wanted)), key=lambda d: (-wanted[d], d))
        if order == list(range(len(order))):
            return copied(node)
        inverse = [order.index(d) for d in range(len(order))]
        return self.call(torch.permute, copied(self.call(torch.permute, node, tuple(order))), tuple(inverse))

    # -- layout helpers for rules ---------------------------------------------------------------------------------------------------

    def choose(self, bundle: Bundle, options: tuple[str, ...]) -> str:
        """The lowering to use, out of what the rule can do here; the planner learns of the choice by it."""
        key = signature(bundle)
        self.choices[key] = options
        chosen = self.lowering.get(key)
        if chosen in options:
            return str(chosen)
        return self.prefer if self.prefer in options else options[0]

    def choose_single(self, node: Node, options: tuple[str, ...]) -> str:
        """The spelling of a node that is in no bundle."""
        key = ("single", node.target.name, tuple(n.meta.get("shape") for n in node.all_input_nodes))  # type: ignore[union-attr]
        self.choices[key] = options
        return self.lowering.get(key, options[0])

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


def signature(bundle: Bundle) -> tuple[Any, ...]:
    """What a bundle's choice of lowering hangs on, equal in the train and the eval graph."""
    shapes = tuple(n.meta.get("shape") for n in bundle.members[0].all_input_nodes)
    return (bundle.name, bundle.whole or len(bundle.members), shapes)


def _own_shapes(nodes: list[Node]) -> tuple[tuple[int, ...], ...] | None:
    """The members' own shapes, where a pass reads some of them in another shape than they have."""
    if all(node.meta.get("own_shape") is None for node in nodes):
        return None
    return tuple(tuple(node.meta.get("own_shape") or node.meta["shape"]) for node in nodes)


def _restrided(before: Node, after: Any) -> bool:
    """``before``, in the recording, and ``after``: a value that a pass has made has no strides of its own yet."""
    value = after.meta.get("val") if isinstance(after, Node) else None
    return isinstance(value, torch.Tensor) and value.stride() != before.meta.get("stride")


# A region whose tensors have fewer elements than this in all is run on zeros to find shapes; others on meta tensors.
SMALL = 1 << 23


def _small(graph: torch.fx.Graph) -> bool:
    total = 0
    for node in graph.nodes:
        dtype, shape = node.meta.get("dtype"), node.meta.get("shape")
        if dtype in (torch.float16, torch.bfloat16) or (dtype is not None and dtype.is_complex):
            return False  # kernels for these are missing here and there
        total += math.prod(shape) if shape is not None else 0
    return total < SMALL
