"""Results that share memory: with each other, with an input, with a weight; and results that are part of a larger memory.

Comes in: what a module call returned, and how each recorded view was made. Goes out: ``Returned``, a layer of the lifter: such a result
is the very view of the very tensor that it is in the original, so that a caller who writes into one finds it in the other, and so that
one which skips part of its memory (``h[:, :2]``) has the strides of the original's, whatever the number of rows. What is a view at some
sizes only (``x.transpose(1, 2).reshape(-1, 6)``, of one row) is that very call, too. The tensor that they are views of is made once, by
itself; views of it are calls that no lane set takes up. All other results are values.
"""

from __future__ import annotations

import dataclasses
import operator
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from fxfuse.functional import op_of, untracked_view
from fxfuse.ops import Op, canonical, op_name
from fxfuse.recording.trace import Event, Frame, Ref, Trace

from .assigning import Assigning
from .lifted import Sizes


def returned(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that leaves the region by several ways: stands for itself."""
    return tensor


RETURNED = op_of(returned)
_UNTRACKED = op_of(untracked_view)


def is_a_view_of_an_input(node: torch.fx.Node) -> bool:
    """Is this result of a lifted graph an input, or made from one by calls that return views?"""
    while node.meta.get("alone") and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node.op == "placeholder"


_PIECE = op_of(operator.getitem, "item")
_COPY = dataclasses.replace(canonical(torch.clone, (torch.empty(0),), {})[0], name="copy of its own", pointwise=False)  # of no lane set


class Returned(Assigning):
    """Finds the results that share memory, and makes them."""

    def __init__(self, trace: Trace, frame: Frame, sizes: Sizes, opaque: frozenset[int]) -> None:
        super().__init__(trace, frame, sizes, opaque)
        self.flagged: dict[int, tuple[Any, ...]] = {}  # values whose ``requires_grad_`` was called, and with what
        self.given: dict[torch.fx.Node, int] = {}  # results, and the first value that each is

    def _shared(self, leaves: list[Any]) -> dict[int, torch.fx.Node]:
        """The nodes of those results, by value."""
        values = list(dict.fromkeys(leaf.value for leaf in leaves if isinstance(leaf, Ref)))
        roots = self._roots(values)
        ways = Counter(roots.values())
        made: dict[int, torch.fx.Node] = {}
        for value, root in roots.items():
            held = root in self.inputs or self.trace.values[root].origin in ("attribute", "constant")
            if (value != root and (held or self._has_gaps(value))) or (ways[root] > 1 and not held):
                self._view(value, root, held, made)
        return {value: made[value] for value in values if value in made}

    def _roots(self, values: list[int]) -> dict[int, int]:
        """What each result is a view of: an input also where ``reshape`` has copied it, which may view it at another size, or as another
        input lies; what was computed, where other results are views of it, or copies of another kind."""
        near = {value: self._root(value) for value in values}
        far: dict[int, int] = {}
        for value in values:
            for at in self._way_back(value):
                if at in self.itself:
                    self._check_ones(at, "==")
                far[value] = at
        kinds = Counter(root for root, _ in {(far[value], near[value]) for value in values})
        return {value: far[value] if far[value] in self.inputs or kinds[far[value]] > 1 else near[value] for value in values}

    def _way_back(self, value: int) -> Iterator[int]:
        """``value``, what it is a view of, and so on."""
        yield value
        while (origin := self._origin(value)) is not None:
            value = origin[0]
            yield value

    def _origin(self, value: int) -> tuple[int, Event] | None:
        """What ``value`` is a view of, or may be at another call, and how it was made; None where it is memory of its own in any case."""
        if value in self.parent:
            return self.parent[value]
        of, event = self.copied.get(value, (-1, None))
        if event is None or self.version.get(value) or self.version.get(self._root(of), 0) != self.copied_at[value]:
            return None  # written since: it is no longer what it was made of
        root = self._root(of)
        if self.trace.values[root].origin in ("attribute", "constant") and root not in self.inputs:
            return None
        return of, event

    def _untracked(self, node: torch.fx.Node, value: int) -> torch.fx.Node:
        """``node``; of a view made under ``no_grad``, the view as torch makes it: without a gradient, and with its base's flag."""
        if value not in self.trace.untracked_views or value not in self.parent:
            return node
        base = self.parent[value][0]
        return self._alone(_UNTRACKED, (self._as_flagged(base) if self._shows_a_flag(base) else self._read(base),), value)

    def _shows_a_flag(self, value: int) -> bool:
        """Is it, or is it a view of, a view under ``no_grad``?"""
        while value not in self.trace.untracked_views and value in self.parent:
            value = self.parent[value][0]
        return value in self.trace.untracked_views and value in self.parent

    def _as_flagged(self, value: int) -> torch.fx.Node:
        """``value``, a view of a view under ``no_grad``, with the flag that it has in the original."""
        base, event = self.parent[value]
        source = self._as_flagged(base) if self._shows_a_flag(base) else self._in_memory_of_its_own(base)
        if value in self.trace.untracked_views:
            return self._alone(_UNTRACKED, (source,), value)
        return self._called_alone(event, base, source, value)

    def _has_gaps(self, value: int) -> bool:
        """Do the strides of ``value`` step over memory of the tensor that it is a view of? Then no copy of its own has them.

        A free size of 1 counts as any other: in more rows its stride shows, as a run of more rows had it (``view`` gives dims of one
        row the strides of rows without gaps).
        """
        seen = self.trace.values[value]
        shape, strides = seen.more or (seen.shape, seen.stride)
        if strides is None or 0 in seen.shape:
            return False
        dyn, expected = self.dynamic.get(value, frozenset()), 1
        for stride, dim in sorted((stride, dim) for dim, stride in enumerate(strides) if shape[dim] > 1 or dim in dyn):
            if stride != expected:
                return True
            expected *= shape[dim]
        return False

    def _view(self, value: int, root: int, held: bool, made: dict[int, torch.fx.Node]) -> torch.fx.Node:
        """``value``, which is a view of ``root``, made from it as in the recording."""
        if value in made:
            return made[value]
        if value == root:
            node: torch.fx.Node = self._read(root) if held else self._in_memory_of_its_own(root)
        else:
            origin = self._origin(value)
            assert origin is not None
            base, event = origin
            source = self._view(base, root, held, made)
            if value in self.trace.untracked_views:
                made[value] = self._alone(_UNTRACKED, (source,), value)
                return made[value]
            node = self._called_alone(event, base, source, value)
            if value in self.flagged:
                op, args = canonical(torch.Tensor.requires_grad_, (node, *self.flagged[value]), {})
                node = self._alone(op, args, value)
        made[value] = node
        return node

    def _in_memory_of_its_own(self, value: int) -> torch.fx.Node:
        """What results are views of, made once, by itself."""
        node = self._alone(RETURNED, (self._another(self._read(value), value),), value)
        node.meta["out_stride"] = self.trace.values[value].order()
        return node

    def _another(self, node: torch.fx.Node, value: int) -> torch.fx.Node:
        """``node``, or a copy where another result is that node already, or others read it as what was computed before: what is computed
        twice is two tensors, and backward may keep the one that no caller has."""
        if node.op in ("placeholder", "get_attr"):  # itself; what only equals it is copied in any case
            return node
        first, values = self.given.setdefault(node, value), self.trace.values
        computed = (node.meta.get("value", value), *node.meta.get("again", ())) if node.users else ()
        if any(values[each].storage != values[value].storage for each in (first, *computed)):
            node = self.graph.call_function(_COPY, (node, None))
            self._describe(node, value)
            node.meta["distinct"] = True  # equal copies are as many tensors
        return node

    def _alone(self, op: Op, args: tuple[Any, ...], value: int | None) -> torch.fx.Node:
        """A call that stays by itself: no lane set takes it up, and no other call is the same."""
        node = self.graph.call_function(dataclasses.replace(op, name=f"returned {op.name}", pointwise=False), args)
        if value is not None:
            self._describe(node, value)
        else:
            node.meta.update(shape=None, dyn=frozenset(), place=self.place, path=self.path, frame=self.at)
        node.meta["alone"] = True
        return node

    def _called_alone(self, event: Event, base: int, source: torch.fx.Node, value: int) -> torch.fx.Node:
        """``value`` made of ``source``, which is ``base``, as in the recording."""
        op, args = self._call_of(event, base, source)
        if not isinstance(event.out, list):
            return self._alone(op, args, value)
        whole = self._alone(op, args, None)
        return self._alone(_PIECE, (whole, event.out.index(Ref(value))), value)

    def _call_of(self, event: Event, base: int, source: torch.fx.Node) -> tuple[Op, tuple[Any, ...]]:
        def given(tree: Any) -> Any:
            if isinstance(tree, Ref) and tree.value == base:
                return source
            return type(tree)([given(item) for item in tree]) if type(tree) in (tuple, list) else self._argument(tree)

        args, kwargs = given(event.args), {key: given(value) for key, value in event.kwargs.items()}
        if op_name(event.func) == "__getitem__":
            return _PIECE, (args[0], args[1])
        return canonical(event.func, tuple(args), kwargs)
