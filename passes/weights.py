"""The weights of lanes as packed tensors.

Comes in: the nodes that read lanes' own weights. Goes out: one node that reads all of them from a pack, in the order that was asked
for; ``Packs`` learns of what was packed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from fxfuse.graph import Recipe

from .writer import CannotVectorize, Node, Packed, Writer


class WeightReader(Writer):
    """Reads weights from packs, and packs those that are not packed yet."""

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
                self.packs.name(targets), targets, shape, self.packs.stored(order), "cat" if stored == "cat" else "stack",
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

        Tables may differ in their number of rows, and one may serve several lanes. Rows of unequal widths are filled up with zeros.
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
            row = tuple(max(sizes) for sizes in zip(*(shape[1:] for shape in shapes), strict=True))
            recipe = Recipe(
                self.packs.name(names), names, (shapes[0][0], *row), tuple(range(len(shapes[0]))), "cat" if equal else "rows",
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


def _own_shapes(nodes: list[Node]) -> tuple[tuple[int, ...], ...] | None:
    """The members' own shapes, where a pass reads some of them in another shape than they have."""
    if all(node.meta.get("own_shape") is None for node in nodes):
        return None
    return tuple(tuple(node.meta.get("own_shape") or node.meta["shape"]) for node in nodes)
