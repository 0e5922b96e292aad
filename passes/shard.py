"""One process's part of a program: its own lanes, and what passes between the processes.

Comes in: a program's graph and its ``split.Trial``. Goes out: the graph of one process: ops on its part, ops that all processes do
alike, and between them the collectives of ``fxfuse.distributed.collectives``. What holds afterwards:

- What is no lane's (inputs, shared weights, what is computed of gathered lanes) is the same on every process, and so is its gradient.
- Where lanes read such a value it enters, and its gradient is summed; all values known by then enter in one call. Views of it are made by
  each process: what enters, and whose gradient moves, is then the smaller of the two.
- Where such a value reads lanes these are gathered; of a sum over lanes only the sum moves.
- A pack that is held in shares which are no lanes is gathered at the start, and is then a value that all have.
- Collectives come in the same order on every process, forward and backward.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx

from fxfuse.distributed.collectives import Apart, common_seed, enter, gather, reduce, share_along
from fxfuse.functional import drop_unused
from fxfuse.running.weight_views import VIEWS

from .split import Node, Split, Step, Trial, part_arguments


@dataclass(frozen=True)
class Moved:
    """One collective of a forward: "gather" or "sum", and the shape of its result, in which None is a size that is free."""

    kind: str
    shape: tuple[int | None, ...]


class PartWriter:
    """Writes the graph of process ``rank``; ``group`` names the processes. ``rows``: packs that all need whole, each held in shares."""

    def __init__(self, trial: Trial, rank: int, group: str, rows: dict[str, Split] | None = None) -> None:
        self.trial, self.rank, self.group, self.rows = trial, rank, group, rows or {}
        self.graph = torch.fx.Graph()
        self.common: dict[Node, Any] = {}  # values that all processes have
        self.own: dict[Node, Any] = {}  # this process's parts
        self.entered: dict[Node, Node] = {}
        self.viewed: dict[Node, Node] = {}
        self.cuts: dict[tuple[Node, Split], Node] = {}
        self.token: Node | None = None
        self.seed: Node | None = None
        self.draws = 0
        self.moved: list[tuple[str, Node]] = []  # kind, and the old node whose whole value it gives
        self.entering = self._all_entering()

    def written(self) -> torch.fx.Graph:
        """The whole graph."""
        for node in self.trial.graph.nodes:
            self._write(node)
        drop_unused(self.graph)  # views that both sides have, of which one reads them
        return self.graph

    def _write(self, node: Node) -> None:
        if node.op == "output":
            self.graph.output(torch.fx.node.map_arg(node.args[0], self._whole))
            return
        split = self.trial.splits.get(node)
        if node.op in ("placeholder", "get_attr"):
            made = self.graph.create_node(node.op, node.target, name=node.name)
            held = self.rows.get(str(node.target)) if node.op == "get_attr" else None
            if held is not None:
                self._gather_rows(node, made, held)
                return
            (self.common if split is None else self.own)[node] = self._placed(made, node)
            return
        step = self.trial.steps[node]
        if not step.own:
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), self._whole)
            self.common[node] = self._placed(self.graph.create_node(node.op, node.target, args, kwargs, node.name), node)
        else:
            self._write_part(node, step)

    def _gather_rows(self, node: Node, made: Node, held: Split) -> None:
        """A pack of which this process has some rows, no lanes: all of them, once, on every process."""
        known = next((n for n in self.common if n.op == "get_attr" and n.target == node.target), None)
        if known is None:
            self.common[node] = self._placed(self.graph.call_function(gather, (self.group, self.token, made, 0, held.starts)), node)
            self.moved.append(("weights", node))
        else:
            self.common[node] = self.common[known]

    def _write_part(self, node: Node, step: Step) -> None:
        cuts, shifts = dict(step.cuts), dict(step.shifts)

        def operand(n: Node) -> Any:
            made = self._part(n, cuts.get(n))
            if n in shifts and shifts[n][self.rank]:
                made = self._placed(self.graph.call_function(torch.sub, (made, shifts[n][self.rank])), node)
            return made

        args, kwargs = part_arguments(node, {path: sizes[self.rank] for path, sizes in step.sizes}, operand)
        target: Any = node.target
        if step.draws:
            if self.seed is None:
                self.seed = self.graph.call_function(common_seed, ())
            self.draws += 1
            target, args = Apart(target), (self.seed, self.rank, self.draws, *args)
        made = self._placed(self.graph.create_node(node.op, target, args, kwargs, node.name), node)
        if step.total:
            self.common[node] = self._placed(self.graph.call_function(reduce, (self.group, self.token, made)), node)
            self.moved.append(("sum", node))
        elif step.result is None:
            self.common[node] = made
        else:
            self.own[node] = made

    def _placed(self, made: Node, node: Node) -> Node:
        made.meta.update({key: value for key, value in node.meta.items() if key in ("place", "stack_trace", "update")})
        return made

    # -- operands ------------------------------------------------------------------------------------------------------------------------

    def _whole(self, node: Node) -> Any:
        """The value as all processes have it; lanes are gathered."""
        if node not in self.common:
            split = self.trial.splits[node]
            assert isinstance(split, Split), node
            made = self.graph.call_function(gather, (self.group, self.token, self.own[node], split.dim, split.starts))
            self.common[node] = self._placed(made, node)
            self.moved.append(("gather", node))
        return self.common[node]

    def _part(self, node: Node, cut: Split | None) -> Any:
        """The value as this process's lanes read it."""
        if self.trial.splits.get(node) is not None:
            return self.own[node]
        if node not in self.trial.tensors:
            return self.common[node]
        if cut is None:
            return self._enter(node)
        key = (node, cut)
        if key not in self.cuts:
            made = self.graph.call_function(share_along, (self._enter(node), cut.dim, cut.starts, self.rank))
            self.cuts[key] = self._placed(made, node)
        return self.cuts[key]

    def _enter(self, node: Node) -> Any:
        """A value that all processes have, on its way into the lanes."""
        if node not in self.trial.floating:
            return self.common[node]
        base = self._base(node)
        if base is not node:
            if node not in self.viewed:
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), self._enter)
                self.viewed[node] = self._placed(self.graph.create_node(node.op, node.target, args, kwargs), node)
            return self.viewed[node]
        if base not in self.entered:
            ready = [n for n in self.entering if n in self.common and n not in self.entered]
            call = self.graph.call_function(enter, (self.group, self.token, [self.common[n] for n in ready]))
            for index, n in enumerate(ready):
                self.entered[n] = self._placed(self.graph.call_function(operator.getitem, (call, index)), n)
            self.token = self.graph.call_function(operator.getitem, (call, len(ready)))
        return self.entered[base]

    def _base(self, node: Node) -> Node:
        """What ``node`` is a view of, where all processes have that; else the node itself."""
        trial = self.trial
        while node.op in ("call_function", "call_method") and node.target in VIEWS and not trial.steps[node].own:
            source = node.args[0]
            tensors = [n for n in node.all_input_nodes if n in trial.tensors]
            if tensors != [source] or trial.splits.get(tensors[0]) is not None:
                break
            node = tensors[0]
        return node

    def _all_entering(self) -> list[Node]:
        """What will enter, in the program's order."""
        found: dict[Node, None] = {}
        for node, step in self.trial.steps.items():
            if step.own:
                for n in node.all_input_nodes:
                    if self.trial.splits.get(n) is None and n in self.trial.floating:
                        found[self._base(n)] = None
        order = {node: at for at, node in enumerate(self.trial.graph.nodes)}
        return sorted(found, key=order.__getitem__)
