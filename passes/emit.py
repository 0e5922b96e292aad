"""Write the rewritten graph: one op per bundle, single nodes as they were.

Comes in: a lifted graph, its bundles, and which lowering to use for which bundle. Goes out: a new ``torch.fx.Graph`` that calls public
torch functions, and the recipes of the weights it packs. The rules (``passes/rules``) say what to write for a bundle; this file gives them
their operands in packed form and carries the layouts.

A packed value is a node and the dim of its lane axis (``Packed``), as in JAX's batching rules; ``dim is None`` means that all lanes
have the same value. Every node carries ``meta["val"]``, a meta tensor, so that rules can look at physical shapes and strides.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import networkx as nx
import torch
import torch.fx

from fxfuse.functional import drop_unused, in_rows_without_grad, numbers_like, slice_along, tracked_as, untracked_view
from fxfuse.graph import FusedOp
from fxfuse.ops import Op

from .bundle import Bundle, Bundles
from .lifted import Lifted
from .outputs import copies_by_size, is_part_of_a_pack, strides_unknown, treatment
from .packs import Packs
from .tidy import tidy
from .tracked import untracked
from .weights import WeightReader
from .writer import CannotVectorize, Node, Packed

# Of these a result may have been written into memory in rows in the recording, where its operands lie otherwise.
_WRITTEN = frozenset("as_slot sum_of prod_of min_of max_of".split())


class Emitter(WeightReader):
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
        super().__init__(lifted, packs)
        self.bundles, self.rules = bundles, rules
        self.lowering, self.prefer = lowering, prefer
        self.singles_too = singles_too  # offer other spellings of nodes that are in no bundle
        self.singles: dict[Node, Any] = {}
        self.values: dict[int, Packed] = {}
        self.pieces: dict[int, Node] = {}
        self.separated: dict[int, Node] = {}  # pieces that are tensors of their own
        self.strided: dict[Node, Node] = {}  # results, laid out as in the recording
        self.unknown: dict[Node, bool] = {}  # of ``strides_unknown``
        self.gathers: dict[tuple[Node, ...], Node] = {}  # what was joined for one bundle serves others
        self.choices: dict[Any, tuple[str, ...]] = {}
        self.ops: list[FusedOp] = []
        self.op_of: dict[int, int] = {}  # where in ``ops`` a bundle is
        self.notes: list[str] = []  # what a person should know of how the packed form computes

    # -- operands ------------------------------------------------------------------------------------------------------------------------

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
        shapes = dict.fromkeys(node.meta["shape"] for node in nodes)
        if len(shapes) > 1:
            a, b = (list(shape) for shape in list(shapes)[:2])
            raise CannotVectorize(f"lanes of unequal sizes, {a} against {b}: only what is elementwise or reduces other dims takes those")
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

    # -- single nodes --------------------------------------------------------------------------------------------------------------------

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
        shape = bundle.members[first].meta["shape"]
        dim, width = len(shape) + bundle.apart, int(shape[bundle.apart])
        return Packed(self.call(torch.unflatten, self.stretch(bundle, first, count), dim, (count, width)), dim)

    def stretch(self, bundle: Bundle, first: int, count: int) -> Node:
        """Lanes that lie one behind the other, as they lie: a view."""
        assert bundle.apart is not None
        whole, rank = self.values[bundle.index].node, len(bundle.members[first].meta["shape"])
        widths = [int(member.meta["shape"][bundle.apart]) for member in bundle.members]
        start, stop = sum(widths[:first]), sum(widths[: first + count])
        return whole if count == len(widths) else self.call(slice_along, whole, rank + bundle.apart, start, stop, 1)

    def _stretches(self, bundle: Bundle, split: Callable[..., Any]) -> Node:
        """The lanes' parts of what lies end to end."""
        assert bundle.apart is not None
        sizes = [int(member.meta["shape"][bundle.apart]) for member in bundle.members]
        return self.call(split, self.values[bundle.index].node, sizes, bundle.apart)

    def _copy(self, node: Node) -> Node:
        previous, self.source = self.source, node
        args = torch.fx.node.map_arg(node.args, self.single)
        if _takes_neighbours(node):
            source = node.all_input_nodes[0]
            if _restrided(source, self.single(source)) or strides_unknown(self.single(source), self.unknown):
                args = (self.call("contiguous", args[0]), *args[1:])
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
        several = any(isinstance(user.target, Op) and user.target.name == "item" for user in node.users)  # values and indices
        spread = isinstance(node.target, Op) and node.target.name in _WRITTEN
        if not (any(_restrided(operand, self.singles.get(operand)) for operand in node.all_input_nodes) or is_size or spread):
            if recorded:
                made.meta["val"], made.meta["as_recorded"] = self._meta(node), True
        elif is_size or ((recorded or several) and isinstance(node.target, Op)):
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

    # -- the walk ------------------------------------------------------------------------------------------------------------------------

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
        """Bundles (by number) and single nodes in an order that respects the dataflow, close to the program's own.

        What leaves the region in memory of its own (``returned``) comes last, when all that reads the same value is known; only then
        are buffers written that others read (``late``).
        """
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

        def first(unit: Any) -> tuple[int, int, int]:
            """One chunk after the other, whatever the order of the program; within a chunk, as the program has it."""
            if isinstance(unit, int):
                bundle = self.bundles.classes[unit]
                return 2 * bool(bundle.members[0].meta.get("late")), bundle.chunk, position[bundle.members[0]]
            return 2 if unit.meta.get("late") else int(bool(unit.meta.get("alone"))), 0, position[unit]

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
        if not rule.view and bundle.leads:
            operands = [n.meta.get("shape") for n in bundle.members[0].all_input_nodes[:2]]
            shapes = " x ".join(str(list(shape)) for shape in operands if shape is not None)
            lanes, lowering = len(bundle.members), lowering if bundle.chunks == 1 else f"{lowering}, {bundle.chunks} chunks"
            self.op_of[bundle.index] = len(self.ops)
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

    # -- what leaves the region ----------------------------------------------------------------------------------------------------------

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
        for leaf, sources in untracked(self.lifted, self.graph, self.packs, made).items():
            made[leaf] = self.call(tracked_as, made[leaf], tuple(dict.fromkeys(self._held(node) for node in sources)))
        for leaf in made:
            if leaf.meta.get("rows_without_grad"):
                made[leaf] = self.call(in_rows_without_grad, made[leaf])
        out = self.graph.output([made[leaf] if isinstance(leaf, Node) else leaf for leaf in leaves])
        out.meta["some_rows"] = any(leaf.meta.get("no_empty") for leaf in made)

    def _held(self, node: Node) -> Node:
        """An input, or what holds a weight: its pack, where it has one."""
        where = self.packs.where.get(str(node.target)) if node.op == "get_attr" else None
        made: Node = self.single(node) if where is None else self.packed(where[0], node.meta)
        return made

    def _separate(self, bundle: Bundle, members: list[Node]) -> None:
        """Lanes that leave the region one by one leave as tensors of their own, as they were: not as views of one pack."""
        self.source = members[0]
        value, dim = self.values[bundle.index]
        if len(members) == 1 and dim is not None and bundle.index not in self.separated:
            lane = value, dim, self.bundles.position[members[0]]
            if value.meta["val"].is_complex():  # select_copy has no derivative there
                self.singles[members[0]] = self.call("clone", self.call(torch.select, *lane), memory_format=torch.contiguous_format)
            else:
                self.singles[members[0]] = self.call(torch.select_copy, *lane)
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
            made = self.call(torch.clone, made) if made.op in ("placeholder", "get_attr") or is_part_of_a_pack(made) else made
        else:
            if bundle.index not in self.separated:
                self.separated[bundle.index] = self._own_pieces(bundle)
            made = self.call(operator.getitem, self.separated[bundle.index], self.bundles.position[source])
        made = self._laid_out(node, made, source)
        return self.call(untracked_view, made) if node.target.func is untracked_view else made  # type: ignore[union-attr]

    def _strided(self, leaf: Node) -> Any:
        """An output with the strides that the original's has, where both are dense: callers may ``view`` it."""
        if leaf.meta.get("alone") or leaf.op == "placeholder":  # an input lies as its caller has it
            return self.single(leaf)
        if leaf not in self.strided:
            made = self._laid_out(leaf, self.single(leaf), leaf)
            self.strided[leaf] = self.call(torch.clone, made) if is_part_of_a_pack(made) else made
        return self.strided[leaf]

    def _laid_out(self, leaf: Node, node: Any, computed: Node) -> Any:
        """``node`` with the strides recorded of ``leaf``; ``computed``: the node of the lifted graph that computes it."""
        wanted, value = leaf.meta.get("out_stride"), node.meta.get("val")
        if wanted is None or not isinstance(value, torch.Tensor) or value.shape != torch.Size(leaf.meta["shape"]):
            return node
        how = treatment(computed, node)
        one_row = any(value.shape[d] == 1 for d in leaf.meta.get("dyn") or ())  # of which the strides of more rows cannot be told
        open_ends = one_row or (bool(leaf.meta.get("dyn")) and copies_by_size(node)) or strides_unknown(node, self.unknown)
        if not how and not open_ends and all(w == s or n == 1 for w, s, n in zip(wanted, value.stride(), value.shape, strict=True)):
            return node

        def copied(node: Node) -> Node:
            return self.call("clone", node, memory_format=torch.contiguous_format) if how == "clone" else self.call("contiguous", node)

        order = sorted(range(len(wanted)), key=lambda d: (-wanted[d], d))
        if order == list(range(len(order))):
            return copied(node)
        inverse = [order.index(d) for d in range(len(order))]
        return self.call(torch.permute, copied(self.call(torch.permute, node, tuple(order))), tuple(inverse))

    # -- choices -------------------------------------------------------------------------------------------------------------------------

    def choose(self, bundle: Bundle, options: tuple[str, ...]) -> str:
        """The lowering to use, out of what the rule can do here; the planner learns of the choice by it."""
        key = signature(bundle)
        self.choices[key] = options
        chosen = self.lowering.get(key)
        if chosen in options:
            return str(chosen)
        return self.prefer if self.prefer in options else options[0]

    def choose_by(self, key: tuple[Any, ...], options: tuple[str, ...]) -> str:
        """The form of something that is no bundle of its own, told by ``key``: its name, its lanes, and the shapes that it reads."""
        self.choices[key] = options
        chosen = self.lowering.get(key, self.prefer)
        return chosen if chosen in options else options[0]

    def choose_single(self, node: Node, options: tuple[str, ...]) -> str:
        """The spelling of a node that is in no bundle."""
        key = ("single", node.target.name, tuple(n.meta.get("shape") for n in node.all_input_nodes))  # type: ignore[union-attr]
        self.choices[key] = options
        return self.lowering.get(key, options[0])


def signature(bundle: Bundle) -> tuple[Any, ...]:
    """What a bundle's choice of lowering hangs on, equal in the train and the eval graph. Layers that read one input have other forms
    than equal ones that read inputs of their own."""
    shapes = tuple(n.meta.get("shape") for n in bundle.members[0].all_input_nodes)
    first = bundle.members[0].args[0] if bundle.members[0].args else None
    shared = isinstance(first, Node) and len(bundle.members) > 1 and all(member.args[0] is first for member in bundle.members)
    return (bundle.name, bundle.whole or len(bundle.members), shapes, *(("one input",) if shared else ()))


def _takes_neighbours(node: Node) -> bool:
    """Has what it reads of the last dim to lie side by side: pairs of numbers, numbers of another size?"""
    if not isinstance(node.target, Op) or not node.all_input_nodes:
        return False
    dtypes = [each.meta.get("dtype") for each in (node.all_input_nodes[0], node)]
    sizes = {dtype.itemsize for dtype in dtypes if dtype is not None}
    return node.target.name == "view_as_complex" or (node.target.name == "view" and len(sizes) > 1)


def _restrided(before: Node, after: Any) -> bool:
    """``before``, in the recording, and ``after``: a value that a pass has made has no strides of its own yet."""
    value = after.meta.get("val") if isinstance(after, Node) else None
    if isinstance(value, tuple):  # several results, which have a value only where they had to be found anew
        return True
    return isinstance(value, torch.Tensor) and value.stride() != before.meta.get("stride")
