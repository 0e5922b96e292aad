"""The rule of last resort: ``torch.vmap`` of the op, traced into the graph as one call.

For ops that no file of this folder knows, and for rules that hand over a case they do not cover (``by_vmap``). An op for which torch
itself has no batching rule would run lane by lane inside ``torch.vmap``: it is refused by name, as is all that ``torch.vmap`` refuses
(random numbers, writes, shapes that depend on data). Whether it does is tried when the rewritten graph is written, on tensors
without data.
"""

from __future__ import annotations

from typing import Any

import torch

from fxfuse.ops import Op
from fxfuse.private.pytree import tree_map_only
from fxfuse.private.schemas import schema_of
from fxfuse.recording.batching_rules import MissingRule, batched_or_raise
from fxfuse.running.over_lanes import OverLanes

from ..bundle import POSITIONS, Bundle, Node
from ..emit import Emitter
from ..writer import CannotVectorize, Packed
from .base import Rule

LOWERING = "vmap"
_WRONG = frozenset({"select_scatter"})  # gradients over lanes that torch 2.13 gets wrong
_OF_AUTOGRAD = frozenset({"grad", "requires_grad_"})  # they speak of one tensor's history, which lanes of a pack have together
_OURS = frozenset({"index_write"})  # of the functions in fxfuse/functional.py, those that are all torch inside


def applies(bundle: Bundle) -> bool:
    """Is it worth trying: a function of tensors that draws no random numbers?"""
    op = bundle.op
    if op is None or op.random or op.name in POSITIONS or op.name in _OF_AUTOGRAD or (op.overload == "fxfuse" and op.name not in _OURS):
        return False
    if any(member.meta.get("update") for member in bundle.members):  # changes a buffer
        return False
    return any(node.meta.get("shape") is not None for node in bundle.members[0].all_input_nodes)


def by_vmap(emitter: Emitter, bundle: Bundle) -> tuple[Packed, str]:
    """The bundle's op over all lanes by ``torch.vmap``. Raises ``CannotVectorize`` where torch cannot."""
    op = bundle.op
    assert op is not None
    if _mutates(op):
        raise CannotVectorize(f"{op.name} writes into its arguments")
    if op.name in _WRONG:
        raise CannotVectorize(f"the gradient of {op.name} over lanes is wrong in torch")
    columns = [[member.args[i] for member in bundle.members] for i in range(len(op.names))]
    positional, named = op.invocation(tuple(_fetched(emitter, column) for column in columns))
    values, keywords = [*positional, *named.values()], tuple(named)
    if not any(packed.dim is not None for value in values for packed in _packed(value)):
        return Packed(_call(emitter, op.func, values, keywords, None), None), "one call"
    try:
        return Packed(_over_lanes(emitter, op, values, keywords), 0), LOWERING
    except CannotVectorize:
        # A lane that writes into its copy of a shared tensor needs the copy to be a lane's: give every lane its own view of it.
        lanes = len(bundle.members)
        own = [_mapped(value, lambda p: p if _is_number(p.node) else Packed(emitter.front(p, lanes), 0)) for value in values]
        if own == values:
            raise
        return Packed(_over_lanes(emitter, op, own, keywords), 0), LOWERING


BY_VMAP = Rule(("*",), by_vmap, lowering=LOWERING)
VIEW_BY_VMAP = Rule(("*",), by_vmap, view=True, lowering=LOWERING)


def rule_of_last_resort(bundle: Bundle) -> Rule | None:
    """``by_vmap`` as a rule, None where it is not worth trying."""
    if not applies(bundle):
        return None
    assert bundle.op is not None
    return VIEW_BY_VMAP if _is_view(bundle.op) else BY_VMAP


def _over_lanes(emitter: Emitter, op: Op, values: list[Any], keywords: tuple[str, ...]) -> Node:
    # Lanes in front: at other places torch's batching rules are tried less, and some are wrong (grid_sample, gradients of batch_norm).
    values = [_mapped(value, lambda p: p if p.dim is None else Packed(emitter.at(p, 0), 0)) for value in values]
    in_dims = tuple(_mapped(value, lambda packed: packed.dim, constant=None) if _packed(value) else None for value in values)
    return _call(emitter, OverLanes(op.func, in_dims, keywords), values, (), op)


def _call(emitter: Emitter, function: Any, values: list[Any], keywords: tuple[str, ...], op: Op | None) -> Node:
    """The call as a node; its value is found without data, on meta tensors, and kept as the emitter keeps them."""
    nodes = [_mapped(value, lambda packed: packed.node) for value in values]
    positional, named = nodes[: len(nodes) - len(keywords)], dict(zip(keywords, nodes[len(nodes) - len(keywords) :], strict=True))
    given = [_mapped(value, lambda packed: _without_data(packed.node.meta["val"])) for value in values]
    result = _tried(function, given[: len(positional)], dict(zip(keywords, given[len(positional) :], strict=True)), op)
    node = emitter.graph.call_function(function, tuple(positional), named)
    node.meta["val"] = tree_map_only(torch.Tensor, lambda t: emitter.stand_in(t.shape, t.stride(), t.dtype), result)
    if not isinstance(result, torch.Tensor):
        node.meta["val"] = tuple(node.meta["val"])
    return emitter._placed(node)


def _tried(function: Any, args: list[Any], kwargs: dict[str, Any], op: Op | None) -> Any:
    """The result on meta tensors, with and without gradients (torch may take another way for each); a refusal where torch refuses."""
    name = op.name if op is not None else getattr(function, "__name__", "the op")
    try:
        with batched_or_raise():
            with torch.enable_grad():
                function(*tree_map_only(torch.Tensor, _trainable, args), **tree_map_only(torch.Tensor, _trainable, kwargs))
            with torch.no_grad():
                result = function(*args, **kwargs)
    except MissingRule as missing:
        raise CannotVectorize(f"torch has no batching rule for {missing}") from missing
    except Exception as error:  # whatever torch says here, it says of this op over lanes
        raise CannotVectorize(f"torch.vmap does not take {name}: {_first_sentence(error)}") from error
    leaves = [result] if isinstance(result, torch.Tensor) else list(result) if isinstance(result, (tuple, list)) else [None]
    if any(not isinstance(leaf, torch.Tensor) for leaf in leaves):
        raise CannotVectorize(f"{name} returns other things than tensors")
    return result


def _fetched(emitter: Emitter, column: list[Any]) -> Any:
    """One argument of all lanes: ``Packed`` for tensors and for sizes, wherever they are in it; the lanes' common value else."""
    first = column[0]
    if isinstance(first, Node):
        packed = emitter.fetch(column)
        if _is_number(packed.node) and packed.dim is not None:
            raise CannotVectorize("lanes use sizes that differ")
        return packed
    if isinstance(first, (tuple, list)):
        return _like(first, [_fetched(emitter, [item[i] for item in column]) for i in range(len(first))])
    if isinstance(first, slice) and any(isinstance(part, Node) for part in (first.start, first.stop, first.step)):
        raise CannotVectorize("a slice whose bounds are sizes")
    if any(item is not first and item != first for item in column):
        raise CannotVectorize("lanes pass numbers that differ")
    return first


def _like(sequence: Any, items: list[Any]) -> Any:
    """A plain list or tuple: those in a graph are of types of its own, which ``torch.vmap`` does not take for lists."""
    return items if isinstance(sequence, list) else tuple(items)


def _is_number(node: Node) -> bool:
    return not isinstance(node.meta.get("val"), torch.Tensor)


def _mapped(tree: Any, change: Any, **constant: Any) -> Any:
    """``tree`` with ``change`` of each ``Packed`` in it; other leaves stay, or become ``constant``."""
    if isinstance(tree, Packed):
        return change(tree)
    if isinstance(tree, (tuple, list)):
        return _like(tree, [_mapped(item, change, **constant) for item in tree])
    return constant.get("constant", tree)


def _packed(tree: Any) -> list[Packed]:
    found: list[Packed] = []
    _mapped(tree, found.append)
    return found


def _first_sentence(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0].partition(". ")[0].removesuffix(".")


def _without_data(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _trainable(value: torch.Tensor) -> torch.Tensor:
    trainable = value.is_floating_point() or value.is_complex()
    return value.detach().requires_grad_() if trainable else value


def _matched(op: Op) -> Any:
    packet = getattr(torch.ops.aten, op.name, None)
    return schema_of(getattr(packet, op.overload)) if packet is not None and op.overload in packet.overloads() else None


def _mutates(op: Op) -> bool:
    schema = _matched(op)
    return schema is not None and bool(schema.is_mutable)


def _is_view(op: Op) -> bool:
    schema = _matched(op)
    return schema is not None and bool(schema.returns) and all(r.alias_info is not None for r in schema.returns)
