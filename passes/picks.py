"""Lanes that take several places of one tensor at once: one spelling for every way to write it.

Comes in: a functional graph. Goes out: the same graph, in place, in which ``cat([x[:, :i], x[:, i + 1:]], 1)`` and
``stack([x[:, i], x[:, j]], 1)`` are a ``pick_along`` of their positions, and slices beside picks of the same width are picks too; where
there is but one of a kind, everything stays as it is. So all lanes come apart by one gather, whatever their places.
"""

from __future__ import annotations

from typing import Any

import torch.fx

from fxfuse.functional import drop_unused, op_of, pick_along

from .joins import Node, argument, is_op

PICK = op_of(pick_along)


def unify_picks(graph: torch.fx.Graph) -> None:
    """Rewrite in place; near-linear."""
    groups: dict[Any, list[tuple[Node, tuple[int, ...]]]] = {}
    for node in graph.nodes:
        found = _joined(node) or _taken(node, node.args[1] if is_op(node, "slice_along") or is_op(node, "pick_along") else -1)
        if found is not None:
            source, dim, positions = found
            groups.setdefault((source, dim, len(positions)), []).append((node, positions))
    for (source, dim, _), members in groups.items():
        if len(members) < 2 or all(is_op(node, "slice_along") for node, _ in members):
            continue
        known: dict[tuple[int, ...], Node] = {}
        for node, positions in members:
            made = known.get(positions)
            if made is None:
                with graph.inserting_before(node):
                    made = known[positions] = graph.call_function(PICK, (source, dim, positions))
                made.meta.update(node.meta)
            node.replace_all_uses_with(made)
    drop_unused(graph)


def _taken(node: Any, dim: Any) -> tuple[Node, int, tuple[int, ...]] | None:
    """``(source, dim, positions)`` of a node that keeps ``dim`` and takes fixed places of it: a slice, a pick, an index with its dim."""
    if not isinstance(node, Node) or node.meta.get("shape") is None:
        return None
    if is_op(node, "unsqueeze") and argument(node, "dim") == dim:
        return _selected(node.args[0], dim)
    if not (is_op(node, "slice_along") or is_op(node, "pick_along")) or node.args[1] != dim or dim in node.meta["dyn"]:
        return None
    source: Any = node.args[0]
    positions = range(*node.args[2:]) if is_op(node, "slice_along") else node.args[2]  # type: ignore[arg-type]
    return source, dim, tuple(positions)  # type: ignore[arg-type]


def _selected(node: Any, dim: int) -> tuple[Node, int, tuple[int, ...]] | None:
    if not is_op(node, "select") or node.args[1] != dim:
        return None
    source = node.args[0]
    size = source.meta["shape"][dim]
    return None if dim in source.meta["dyn"] else (source, dim, (node.args[2] % size,))


def _joined(node: Node) -> tuple[Node, int, tuple[int, ...]] | None:
    """A ``cat`` or ``stack`` of several places of one tensor, along the dim they are taken from."""
    if not (is_op(node, "cat") or is_op(node, "stack")):
        return None
    tensors, dim = argument(node, "tensors"), argument(node, "dim")
    if len(tensors) < 2 or not all(isinstance(piece, Node) for piece in tensors):
        return None
    parts = [_selected(piece, dim) if is_op(node, "stack") else _taken(piece, dim) for piece in tensors]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or any(part[0] is not known[0][0] for part in known):
        return None
    return known[0][0], dim, tuple(position for part in known for position in part[2])
