"""Graphs that hold graphs: ``checkpoint``, ``cond``, ``while_loop``, an ``autograd.Function``, ``nested_compile_region``.

Comes in: dynamo's graph and its inputs. Goes out: a graph of the same inputs that computes the same: ``inlined``, with the bodies of
``nested_compile_region`` in the place of their calls, which mean nothing but themselves; or ``in_pieces``, with loops fused inside of the
bodies of ``checkpoint``, ``cond`` and ``while_loop``, and in every run of calls between the calls that hold graphs.

A piece is a graph of its own to the pipeline, with other numbers of the same sizes where its inputs are computed, and is checked like one.
Its packs are stacked at every call: a body has the inputs that it has. What stays: calls with a body for every lane; branches of ``cond``
of which gradients are asked; and the body of an ``autograd.Function``, whose backward is the user's.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.fx

from fxfuse.graph import Refusal
from fxfuse.private.dynamo import is_higher_order, is_weight, keep_origin, keep_source, random_example

from .checked import NO_PIECE, tell
from .in_place import fuse_in_place
from .settings import Settings
from .writing import writes_first

log = logging.getLogger(__name__)

Node = torch.fx.Node
Numbers = dict[Node, Any]  # of dynamo's inputs
_SWITCHES = frozenset(("_enter_autocast", "_exit_autocast", "_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode"))
FEWEST = 3  # calls in a piece: fewer are no loop over layers


def name_of(node: Node) -> str:
    """What a node calls, by name."""
    return getattr(node.target, "__name__", str(node.target))


def holds_graphs(graph: torch.fx.Graph) -> bool:
    """Does it call anything that is given a graph?"""
    return any(is_higher_order(node.target) for node in graph.nodes)


def inlined(module: torch.fx.GraphModule) -> torch.fx.GraphModule | None:
    """The graph with the bodies of ``nested_compile_region`` in the place of their calls; None where it has none."""
    if not any(name_of(node) == "invoke_subgraph" for node in module.graph.nodes):
        return None
    made = _copy(module)
    while call := next((node for node in made.graph.nodes if name_of(node) == "invoke_subgraph"), None):
        _inline(made, call)
    _without_unread(made.graph)
    made.recompile()
    return made


def _inline(module: torch.fx.GraphModule, call: Node) -> None:
    """Replace one call by the calls of its body, whose own bodies the outer module holds from then on."""
    graph, body = module.graph, _body(module, call.args[0])
    operands = iter(call.args[2:])
    known: dict[Node, Any] = {}
    results: Any = ()
    with graph.inserting_before(call):
        for node in body.graph.nodes:
            if node.op == "placeholder":
                known[node] = next(operands)
            elif node.op == "output":
                results = torch.fx.map_arg(node.args[0], known.__getitem__)
            else:
                known[node] = graph.node_copy(node, known.__getitem__)
                if node.op == "get_attr":
                    known[node].target = _held(module, getattr(body, str(node.target)))
    for user in list(call.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(results[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(call)


def in_pieces(module: torch.fx.GraphModule, inputs: Sequence[Any], settings: Settings) -> torch.fx.GraphModule | Refusal:
    """A copy of the graph whose pieces are fused; why it stays, where none is."""
    made = _copy(module)
    graph = made.graph
    numbers: Numbers = dict(zip(graph.find_nodes(op="placeholder"), inputs, strict=True))
    said: list[str] = []
    fused = 0
    switch = next((name_of(node) for node in graph.nodes if name_of(node) in _SWITCHES), None)
    if switch is not None:
        return Refusal(f"the graph holds graphs of its own, and calls {switch}, which holds for several pieces")
    for call in [node for node in graph.nodes if is_higher_order(node.target)]:
        for place, operands in _bodies(call):
            reason = _fuse_body(made, name_of(call), place, operands, numbers, settings)
            said += [f"inside of {name_of(call)}: {reason}"] if reason else []
            fused += reason is None
    for run in _runs(graph):
        reason = _fuse_run(graph, run, numbers, settings)
        said += [f"{run[0].name} to {run[-1].name}: {reason}"] if reason else []
        fused += reason is None
    for each in said:
        log.info("%s", each)
    if not fused:
        held = next(name_of(node) for node in graph.nodes if is_higher_order(node.target))
        why = said[0] if said else "it has none"
        return Refusal(f"the graph calls {held}, which holds a graph of its own, and {NO_PIECE}: {why}")
    _without_unread(graph)
    graph.lint()
    made.recompile()
    return made


def _bodies(call: Node) -> Iterable[tuple[Node, Sequence[Any]]]:
    """The bodies of one call that may be rewritten, and what each is called with."""
    kind = name_of(call)
    args: Any = call.args
    if kind == "tag_activation_checkpoint":
        yield args[0], args[1:]
    elif kind == "cond" and len(args) == 4:
        yield from ((body, args[3]) for body in args[1:3])
    elif kind == "while_loop" and len(args) == 4:
        yield args[1], (*args[2], *args[3])


def _fuse_body(
    module: torch.fx.GraphModule, kind: str, place: Node, operands: Sequence[Any], numbers: Numbers, settings: Settings
) -> str | None:
    """Fuse the loops of the body that ``place`` reads; why it stays, or None."""
    body = _copy(_body(module, place))
    inputs = body.graph.find_nodes(op="placeholder")
    if len(inputs) != len(operands) or len(place.users) > 1:
        return "its inputs are not known"
    if holds_graphs(body.graph) or not isinstance(body.graph.output_node().args[0], (tuple, list)):
        return "it holds graphs itself, or returns a single value"
    for node, operand in zip(inputs, operands, strict=True):
        if isinstance(operand, Node):
            value = operand.meta.get("example_value")
            node.meta = dict(operand.meta) if operand.op == "placeholder" else {**node.meta, "example_value": value}
    given = [_number(operand, numbers) for operand in operands]
    asked = torch.is_grad_enabled() and any(isinstance(each, torch.Tensor) and each.requires_grad for each in given)
    if asked and kind == "cond":
        return "the gradients of both branches must lie alike in memory, and those of packed weights do not"
    if (reason := _why_not(body.graph, dict(zip(inputs, operands, strict=True)))) is not None:
        return reason
    refusal = fuse_in_place(body.graph, given, settings)
    if refusal is not None:
        tell(refusal)
        return str(refusal)
    body.recompile()
    place.target = _held(module, body)
    return None


def _runs(graph: torch.fx.Graph) -> list[list[Node]]:
    """The calls between those that hold graphs, in their order."""
    runs: list[list[Node]] = [[]]
    depth = 0  # of transforms of torch.func, in which a call means another thing
    for node in graph.nodes:
        name = name_of(node)
        depth += ("increment_nesting" in name) - ("decrement_nesting" in name)
        if is_higher_order(node.target) or "_nesting" in name or name == "lazy_load_decompositions":
            runs.append([])
        elif depth:
            continue
        elif node.op in ("call_function", "call_method") and not _is_result(node):
            runs[-1].append(node)
    return [run for run in runs if len(run) >= FEWEST]


def _is_result(node: Node) -> bool:
    """Does it take apart what a call that holds graphs has returned?"""
    of = node.args[0] if node.args else None
    return node.target is operator.getitem and isinstance(of, Node) and (is_higher_order(of.target) or (_is_result(of) and _is_tuple(of)))


def _is_tuple(node: Node) -> bool:
    return isinstance(node.meta.get("example_value"), (tuple, list))


def _fuse_run(graph: torch.fx.Graph, run: list[Node], numbers: Numbers, settings: Settings) -> str | None:
    """Fuse the loops of one run of calls; why it stays, or None."""
    inside = dict.fromkeys(run)
    read = dict.fromkeys(of for node in run for of in node.all_input_nodes if of not in inside)
    given = [node for node in numbers if node in read or not isinstance(numbers[node], torch.Tensor)]  # open sizes, whoever reads them
    given += [node for node in read if node not in numbers]
    results = [node for node in run if any(user not in inside for user in node.users)]
    if not all(isinstance(node.meta.get("example_value"), torch.Tensor) for node in results):
        return "it returns what is no tensor"
    piece = torch.fx.Graph()
    known: dict[Node, Node] = {}
    for node in given:
        known[node] = piece.placeholder(str(node.target) if node.op == "placeholder" else node.name)
        known[node].meta = dict(node.meta)
    for node in run:
        known[node] = piece.node_copy(node, known.__getitem__)
    piece.output(tuple(known[node] for node in results))
    outer: dict[Node, Any] = dict(zip(piece.find_nodes(op="placeholder"), given, strict=True))
    if (reason := _why_not(piece, outer)) is not None:
        return reason
    refusal = fuse_in_place(piece, [_number(node, numbers) for node in given], settings)
    if refusal is not None:
        tell(refusal)
        return str(refusal)
    with graph.inserting_after(run[-1]):
        end = graph.call_function(tuple, ((),))  # where the piece ends, for as long as it takes
    with graph.inserting_before(end):
        for node in piece.nodes:
            if node.op == "output":
                for old, new in zip(results, torch.fx.map_arg(node.args[0], outer.__getitem__), strict=True):
                    new.meta.setdefault("example_value", old.meta.get("example_value"))
                    old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in inside)
            elif node.op != "placeholder":
                outer[node] = graph.node_copy(node, outer.__getitem__)
    for node in (end, *reversed(run)):
        graph.erase_node(node)
    return None


def _why_not(piece: torch.fx.Graph, given: dict[Node, Any]) -> str | None:
    """A piece that writes to what it is given is not taken out of its graph, in which others may read the same memory.

    Running statistics may be written, where nothing else that the piece is given is a view of them.
    """
    for node in piece.nodes:
        if node.op in ("call_function", "call_method") and writes_first(node):
            written = _root(node.args[0])
            of = given.get(written)
            views = [each for each in given.values() if isinstance(each, Node) and each is not of and _root(each) is of]
            if written.op == "placeholder" and (not is_weight(written) or views):
                return f"{node.name} writes to memory that comes from outside"
    return None


def _root(value: Any) -> Node:
    """Whose memory it may be."""
    while value.op != "placeholder" and value.args and isinstance(value.args[0], Node):
        value = value.args[0]
    found: Node = value
    return found


def _number(value: Any, numbers: Numbers) -> Any:
    """What the pipeline sees of an input of a piece: dynamo's own, or random numbers of the same sizes for what is computed."""
    if not isinstance(value, Node):
        return value
    return numbers[value] if value in numbers else random_example(value.meta.get("example_value"))


def _copy(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The same graph in a module of its own, over the same bodies."""
    graph = torch.fx.Graph()
    known: dict[Node, Node] = {}
    result = graph.graph_copy(module.graph, known)
    graph.output(result)
    for node, made in known.items():
        if node.op == "placeholder":
            made.meta = dict(node.meta)
            keep_source(made, node)
    made_module = torch.fx.GraphModule(module, graph)
    keep_origin(made_module, module)
    return made_module


def _body(module: torch.fx.GraphModule, place: Any) -> torch.fx.GraphModule:
    """The graph that a node reads."""
    found = getattr(module, str(place.target))
    assert isinstance(found, torch.fx.GraphModule)
    return found


def _held(module: torch.fx.GraphModule, body: Any) -> str:
    """The name under which ``module`` holds ``body`` from now on."""
    number = 0
    while hasattr(module, name := f"fused_body_{number}"):
        if getattr(module, name) is body:
            return name
        number += 1
    setattr(module, name, body)
    return name


def _without_unread(graph: torch.fx.Graph) -> None:
    """Remove the reads of bodies that nothing calls any more."""
    for node in reversed(list(graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
