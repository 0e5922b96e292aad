"""Find the lanes: which nodes of the graph are the same computation on other data.

Comes in: a functional graph. Goes out: ``Bundles``: classes of nodes that can be computed as one, and the order of lanes in each.

Two nodes are in one class when they call the same op with the same attributes on operands of the same classes, slices of one
tensor being one class whatever their position, and parameters of one shape likewise. This is value numbering (hash consing) up to
the lane index, as the SLP vectorizer's isomorphism test but for whole graphs at once. Because a node's class is made of its
operands' classes, all members of a class sit at the same height: they cannot depend on each other, and contracting every
class to one node leaves the graph acyclic; merging two classes with no path between them keeps it so. A pass is linear in the nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import torch
import torch.fx

from fxfuse.ops import Op

from .numbers import loosened, numbers_of
from .places import operands_of, read_apart
from .unequal import Group, blurred_numbers, unequal_groups

Node = torch.fx.Node

# Each merge of two classes costs a pass over the graph.
MOST_MERGES = 16

# What nodes of one class have in common besides their op. "unread": no gradient reaches it (see updating). "untracked": under
# ``no_grad``, so that a target network is not packed with the one that trains.
FACTS = ("shape", "dyn", "dtype", "device", "unread", "untracked")
BLURRED_FACTS = FACTS[1:]  # sizes left out

# Which argument of a slicing op is the lane's position, and may differ from lane to lane.
POSITIONS = {"select": ("index",), "slice_along": ("start", "stop"), "pick_along": ("positions",)}


# Ops that look rows up in a table: lanes with tables of unequal row counts are one class, as one table with offsets can serve them. Only
# the look-up itself is: what else reads such a table sees its shape. The padding row is each table's own.
TABLES = frozenset({"embedding", "embedding_bag"})


@dataclass
class Bundle:
    """The same op in every lane: ``members[i]`` is lane i's node."""

    index: int
    members: list[Node]
    operands: set[int] = field(default_factory=set)  # classes it reads
    number: int = 0  # its place in an order in which operands come first
    whole: int = 0  # the lanes of all chunks, where this is one chunk of several
    chunk: int = 0
    chunks: int = 1
    leads: bool = True  # the first of its chunks, which speaks for all
    unequal: bool = False  # lanes of unequal widths, computed as one
    apart: int | None = None  # the dim, counted from the end, in which their results differ and lie end to end

    @property
    def op(self) -> Op | None:
        target = self.members[0].target
        return target if isinstance(target, Op) else None

    @property
    def name(self) -> str:
        return self.op.name if self.op is not None else self.members[0].op


@dataclass
class Bundles:
    """All classes of a graph. ``active`` are those that are computed as one; the others stay as single nodes."""

    classes: list[Bundle]
    of: dict[Node, int]
    active: set[int]
    position: dict[Node, int]  # of a node within its bundle

    def bundle(self, node: Node) -> Bundle | None:
        """The active bundle of a node, or None. Results of unequal widths are no pack: each is a value of its own."""
        found = self.end_to_end(node)
        return found if found is not None and found.apart is None else None

    def end_to_end(self, node: Node) -> Bundle | None:
        """The active bundle of a node, also where its results lie end to end."""
        index = self.of.get(node)
        return self.classes[index] if index is not None and index in self.active else None

    def stretch(self, nodes: list[Node]) -> tuple[Bundle, int] | None:
        """Where ``nodes``, of one width, lie one behind the other among results of unequal widths: the bundle, and the first's place."""
        found = self.end_to_end(nodes[0])
        if found is None or found.apart is None or any(self.of.get(node) != found.index for node in nodes):
            return None
        first = self.position[nodes[0]]
        in_order = [self.position[node] for node in nodes] == list(range(first, first + len(nodes)))
        return (found, first) if in_order and len({node.meta["shape"] for node in nodes}) == 1 else None

    def components(self, through_forks: bool = True) -> list[set[int]]:
        """Lane sets: active bundles connected through their operands. Each is kept or refused as a whole.

        ``through_forks=False``: slices connect nothing, and are in no set; two loops over the columns of one input are two.
        """
        dataflow = nx.Graph()
        joined = self.active if through_forks else {i for i in self.active if self.classes[i].name not in POSITIONS}
        dataflow.add_nodes_from(joined)
        for index in joined:
            dataflow.add_edges_from((index, other) for other in self.classes[index].operands if other in joined)
        return sorted((set(c) for c in nx.connected_components(dataflow)), key=min)


def find_bundles(
    graph: torch.fx.Graph,
    vectorizable: Callable[[Bundle], bool],
    is_view: Callable[[Bundle], bool],
    min_lanes: int,
    is_heavy: Callable[[Bundle], bool] | None = None,
    groups: Sequence[Group] = (),
) -> Bundles:
    """Classes of equal nodes; those with at least ``min_lanes`` members that ``vectorizable`` accepts are active.

    ``is_view(bundle)`` tells ops that launch nothing: a bundle of those is worth computing as one only next to one that does.
    ``is_heavy`` (optional): classes of such ops that differ only in where their operands come from, and do not depend on each other,
    are merged: a loop that fills two buffers with equal Linears is one launch, at the price of joining their inputs. ``groups``: lanes of
    unequal widths that are to be one class each (``widths_apart``).
    """
    merged: dict[Node, Node] = {}
    loose: set[Node] = set()
    apart: set[Node] = set()
    grouped = {member: group for group in groups for member in group.members}
    classes, of = _classes(graph, merged, loose, grouped, apart)
    for _ in range(MOST_MERGES):
        more = read_apart(classes, of, POSITIONS) - apart
        if not more:
            break
        apart |= more
        classes, of = _classes(graph, merged, loose, grouped, apart)
    for _ in range(MOST_MERGES):
        more = loosened(graph.nodes, of, loose, lambda node, of=of: _key(node, of, {node}, apart=apart))  # type: ignore[misc]
        if not more:
            break
        loose |= more
        classes, of = _classes(graph, merged, loose, grouped, apart)
    for _ in range(MOST_MERGES if is_heavy is not None else 0):
        pair = _mergeable(classes, of, is_heavy) if is_heavy is not None else None
        if pair is None:
            break
        merged[pair[1]] = pair[0]
        classes, of = _classes(graph, merged, loose, grouped, apart)
    active = {
        b.index
        for b in classes
        if len(b.members) >= min_lanes
        and (_is_size(b) or (b.op is not None and (b.members[0].meta.get("shape") is not None or _is_tuple(b)) and vectorizable(b)))
    }
    # A piece of a tuple is one for all lanes only where the tuple is.
    active -= {b.index for b in classes if b.name == "item" and not b.operands & active}
    bundles = Bundles(classes, of, active, {})
    _drop_idle_views(bundles, is_view)
    _order(bundles)
    return bundles


def widths_apart(graph: torch.fx.Graph, min_lanes: int) -> list[Group]:
    """Layers of unequal widths, and what follows them, that could be one class each."""

    def key(node: Node, numbers: dict[Node, int]) -> Any:
        return _key(node, numbers, set(), BLURRED_FACTS)

    return unequal_groups(graph.nodes, blurred_numbers(graph.nodes, key), min_lanes)


def _classes(
    graph: torch.fx.Graph, merged: dict[Node, Node], loose: set[Node], grouped: dict[Node, Group], apart: set[Node]
) -> tuple[list[Bundle], dict[Node, int]]:
    """Classes of equal nodes. ``merged`` sends the first member of a class to that of the class it is to join; nodes in ``loose`` may
    differ in their numbers; those in ``grouped`` are of one class with their group; those in ``apart`` are one only by place."""
    classes: list[Bundle] = []
    of: dict[Node, int] = {}
    by_key: dict[Any, int] = {}
    for node in graph.nodes:
        if node.op == "output":
            continue
        group = grouped.get(node)
        key = _key(node, of, loose, apart=apart) if group is None else ("unequal", id(group))
        index = by_key.get(key)
        if index is None:
            index = of[merged[node]] if node in merged else len(classes)
            by_key[key] = index
        if index == len(classes):
            classes.append(Bundle(index, [], unequal=group is not None, apart=None if group is None else group.dim))
        classes[index].members.append(node)
        of[node] = index
    for node, index in of.items():
        classes[index].operands.update(of[o] for o in node.all_input_nodes)
    return classes, of


def _mergeable(classes: list[Bundle], of: dict[Node, int], is_heavy: Callable[[Bundle], bool]) -> tuple[Node, Node] | None:
    """First members of two classes of one heavy op on equal shapes, neither of which depends on the other."""
    groups: dict[Any, list[int]] = {}
    for bundle in classes:
        if bundle.op is not None and not bundle.unequal and is_heavy(bundle):
            first = bundle.members[0]
            local = tuple(_local(arg) for arg in first.args)
            facts = tuple(first.meta.get(name) for name in FACTS)
            if bundle.name in TABLES:
                local = _look_up(first, local)
            groups.setdefault((bundle.op, local, facts), []).append(bundle.index)
    candidates = [indices for indices in groups.values() if len(indices) > 1]
    if not candidates:
        return None
    dataflow = dataflow_of(classes)
    for indices in candidates:
        for position, one in enumerate(indices):
            reach = nx.descendants(dataflow, one) | nx.ancestors(dataflow, one)
            for other in indices[position + 1 :]:
                if other not in reach:
                    return classes[one].members[0], classes[other].members[0]
    return None


def dataflow_of(classes: list[Bundle]) -> nx.DiGraph:
    """Which class reads which: an edge from each operand's class to its user's."""
    dataflow = nx.DiGraph()
    dataflow.add_nodes_from(range(len(classes)))
    dataflow.add_edges_from((operand, bundle.index) for bundle in classes for operand in bundle.operands)
    return dataflow


def _local(arg: Any) -> Any:
    """An argument without where it comes from: shapes, and whether it is a weight of a module."""
    if isinstance(arg, Node):
        facts = tuple(arg.meta.get(name) for name in ("requires_grad", "registered", "shape", "dyn", "dtype"))
        return ("tensor", arg.op == "get_attr", *facts)
    if isinstance(arg, (list, tuple)):
        return tuple([_local(a) for a in arg])
    return (type(arg).__name__, arg if not isinstance(arg, (dict, slice)) else repr(arg))


def _is_size(bundle: Bundle) -> bool:
    return bundle.op is not None and bundle.op.name.startswith("size")


def _is_tuple(bundle: Bundle) -> bool:
    """True for ops that return several tensors, which the graph takes apart by ``item``."""
    users = [user for member in bundle.members for user in member.users]
    return any(isinstance(user.target, Op) and user.target.name == "item" for user in users)


def _key(
    node: Node, of: dict[Node, int], loose: set[Node], considered: tuple[str, ...] = FACTS, apart: Collection[Node] = frozenset()
) -> Any:
    meta = node.meta
    facts = tuple(meta.get(name) for name in considered)
    if node.op == "placeholder":
        return ("input", *facts)
    if node.op == "get_attr":
        return ("attribute", *facts, meta.get("requires_grad"), meta.get("registered"), meta.get("pack"))
    if node.op != "call_function" or not isinstance(node.target, Op) or meta.get("alone") or meta.get("distinct"):
        return ("alone", id(node))
    erased = POSITIONS.get(node.target.name, ()) if node not in apart else ()
    if node in loose:
        erased = numbers_of(node)
    args = tuple(
        None if name in erased else _freeze(arg, of) for name, arg in zip(node.target.names, node.args, strict=True)
    )  # fmt: skip
    if node.target.name in TABLES:
        args = _look_up(node, args, widths="shape" in considered)
    key = (node.target, args, facts, _freeze(node.kwargs, of), meta.get("place") if node in loose else None)
    try:
        hash(key)
    except TypeError:
        return ("alone", id(node))
    return key


def _look_up(node: Node, keys: tuple[Any, ...], widths: bool = True) -> tuple[Any, ...]:
    """The keys of a look-up's arguments, but for what lanes need not agree in: the rows of a table that is held, and its padding row.

    Nor, where offsets say which of them are a bag, in how many indices they are given; nor in ``widths``, where sizes are left out.
    """
    assert isinstance(node.target, Op)
    found: list[Any] = []
    offsets = node.args[node.target.names.index("offsets")] if "offsets" in node.target.names else None
    for name, arg, key in zip(node.target.names, node.args, keys, strict=True):
        if name == "weight" and isinstance(arg, Node) and arg.op == "get_attr":
            meta = arg.meta
            facts = tuple(meta.get(fact) for fact in ("dtype", "device", "requires_grad", "registered"))
            key = ("table", meta["shape"][1:] if widths else None, *facts)
        if name == "input" and offsets is not None and isinstance(arg, Node) and arg.op == "placeholder":
            key = ("indices", arg.meta["dtype"], arg.meta["device"])
        found.append(None if name == "padding_idx" else key)
    return tuple(found)


def _freeze(arg: Any, of: dict[Node, int]) -> Any:
    if isinstance(arg, Node):
        return ("class", of[arg])
    if isinstance(arg, (list, tuple)):
        return tuple([_freeze(a, of) for a in arg])
    if isinstance(arg, slice):
        return ("slice", _freeze(arg.start, of), _freeze(arg.stop, of), _freeze(arg.step, of))
    if isinstance(arg, dict):
        return tuple(sorted((k, _freeze(v, of)) for k, v in arg.items())) if arg else ()
    return (type(arg).__name__, arg)


def _drop_idle_views(bundles: Bundles, is_view: Callable[[Bundle], bool]) -> None:
    """Bundles of views that neither feed nor come from a bundle that computes stay single nodes: they cost nothing as they are."""
    classes = bundles.classes
    computing = {i for i in bundles.active if not is_view(classes[i])}
    derived = set(computing)
    ordered = [classes[i] for i in nx.topological_sort(dataflow_of(classes))]  # operands come before their users
    for bundle in ordered:
        if bundle.index in bundles.active and bundle.operands & derived:
            derived.add(bundle.index)
    needed = set(computing)
    for bundle in reversed(ordered):
        if bundle.index in needed:
            needed |= bundle.operands & bundles.active
    bundles.active &= derived | needed


def _order(bundles: Bundles) -> None:
    """The order of lanes: by the position of the first operand that tells lanes apart, else as the program has them.

    Lanes that read the same position (two networks on each slice) are ordered network by network, so that each is a run of its own;
    where that gives no whole runs (pairs ``i < j``) the operand is gathered anyway, and the program's order spares a second gather.
    """
    for number, index in enumerate(nx.topological_sort(dataflow_of(bundles.classes))):
        bundle = bundles.classes[index]
        bundle.number = number
        if bundle.index in bundles.active:
            positions = _operand_positions(bundle, bundles)
            if positions is not None:
                seen: dict[Any, int] = {}
                keys = []
                for member, position in zip(bundle.members, positions, strict=True):
                    occurrence = seen.get(position, 0)
                    seen[position] = occurrence + 1
                    keys.append((occurrence, position, member))
                if bundle.name in POSITIONS:  # the places of one tensor stay together
                    bundle.members = [member for _, _, member in sorted(keys, key=lambda k: k[1])]
                elif len(set(seen.values())) == 1:
                    bundle.members = [member for _, _, member in sorted(keys, key=lambda k: k[:2])]
            bundle.members = _by_weight(bundle)
            bundles.position.update((member, position) for position, member in enumerate(bundle.members))


def _by_weight(bundle: Bundle) -> list[Node]:
    """Calls of one network next to each other, so that its weights serve them all as more rows (a network called in two loops)."""
    first = bundle.members[0]
    assert bundle.op is not None
    for column, arg in enumerate(first.args):
        if not isinstance(arg, Node) or arg.op != "get_attr":
            continue
        calls: dict[Any, list[Node]] = {}
        for member in bundle.members:
            calls.setdefault(member.args[column], []).append(member)
        if 1 < len(calls) < len(bundle.members) and len({len(group) for group in calls.values()}) == 1:
            return [member for group in calls.values() for member in group]
    return bundle.members


def _operand_positions(bundle: Bundle, bundles: Bundles) -> list[Any] | None:
    first = bundle.members[0]
    op = bundle.op
    assert op is not None
    if op.name in POSITIONS:
        sources = [member.all_input_nodes[0] for member in bundle.members]
        at = op.names.index(POSITIONS[op.name][0])
        order = {s: i for i, s in enumerate(dict.fromkeys(sources))}
        inner = [bundles.position.get(s, order[s]) for s in sources]
        return [(i, member.args[at]) for i, member in zip(inner, bundle.members, strict=True)]
    flat = [operands_of(member) for member in bundle.members]
    for column in range(len(operands_of(first))):
        nodes = [operands[column] for operands in flat]
        if all(n is nodes[0] for n in nodes):
            continue
        if all(n in bundles.position for n in nodes):
            return [(bundles.classes[bundles.of[n]].number, bundles.position[n]) for n in nodes]
    return None
