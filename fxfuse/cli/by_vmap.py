"""The model as somebody would rewrite it by hand with ``torch.func.vmap`` and ``stack_module_state``: what ``bench`` compares with.

Comes in: a model and one call. Goes out: a module that computes the same at the sizes of that call, the networks of its largest loop
run by one ``vmap``; or a sentence why not. Possible where equal networks are called once each, with one tensor, and none reads what
another gave.

Method: one recorded run, split in what comes before the loop's results and what depends on them, with one vmapped call in between.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.fx
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from fxfuse.models.copies import independent_copy
from fxfuse.private.pytree import tree_flatten
from fxfuse.recording.sizes import SizeOf, SizeOp
from fxfuse.recording.trace import Event, Frame, Ref, Trace
from fxfuse.recording.tracer import record

from .specs import Call


class NotPossible(Exception):
    """Why there is no form with vmap: a sentence."""


class Lanes(nn.Module):
    """All networks at once: their parameters stacked as Parameters, one network called under ``vmap``."""

    def __init__(self, networks: Sequence[nn.Module], shared: bool) -> None:
        super().__init__()
        params, buffers = stack_module_state(list(networks))
        self.names, self.buffer_names, self.shared = list(params), list(buffers), shared
        self.params = nn.ParameterList(nn.Parameter(p.detach().clone()) for p in params.values())
        self.held = list(buffers.values())
        self.network = [copy.deepcopy(networks[0]).to("meta")]  # in a list: its parameters are not ours

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """One tensor for each network, all of one shape (shared: one for all); one result for each."""

        def one(params: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Any:
            return functional_call(self.network[0], (params, buffers), (x,))

        params = dict(zip(self.names, self.params, strict=True))
        buffers = dict(zip(self.buffer_names, self.held, strict=True))
        x = inputs[0] if self.shared else torch.stack(inputs)
        out = vmap(one, in_dims=(0, 0, None if self.shared else 0), randomness="different")(params, buffers, x)
        return cast(Tensor, out).unbind(0)


def by_vmap(model: nn.Module, call: Call) -> nn.Module:
    """A module that answers calls of this one's sizes (with the flattened tensors as arguments; ``flat_call``). Raises ``NotPossible``."""
    args, kwargs = call
    trace = record(independent_copy(model), args, kwargs)
    if trace.failure:
        raise NotPossible(f"it cannot be recorded: {trace.failure}")
    return _Written(model, trace, _largest_loop(trace)).module()


def flat_call(call: Call) -> list[Tensor]:
    """The tensors of a call in the order in which ``by_vmap``'s module takes them."""
    return [leaf for leaf in tree_flatten(call)[0] if isinstance(leaf, Tensor)]


def _largest_loop(trace: Trace) -> list[Frame]:
    calls: dict[str, list[Frame]] = {}
    for frame in trace.frames:
        calls.setdefault(frame.path, []).append(frame)
    loops: dict[Any, list[Frame]] = {}
    for path, frames in calls.items():
        frame = frames[0]
        if len(frames) > 1 or not path or not list(frame.module.parameters()):
            continue
        if len(frame.leaves) != 1 or not isinstance(frame.leaves[0], Ref) or len(frame.out) != 1 or not isinstance(frame.out[0], Ref):
            continue
        parent = path.rpartition(".")[0]
        tensors = (*frame.module.named_parameters(), *frame.module.named_buffers())
        shapes = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors)
        value = trace.values[frame.leaves[0].value]
        loops.setdefault((parent, type(frame.module), shapes, value.shape, value.tensor.dtype), []).append(frame)
    found = max(loops.values(), key=lambda frames: (len(frames), sum(f.end - f.start for f in frames)), default=[])
    if len(found) < 2:
        raise NotPossible("no two networks of one structure are called once each, with one tensor")
    return found


@dataclass
class _Written:
    """The recorded run as a graph with one vmapped call."""

    model: nn.Module
    trace: Trace
    lanes: list[Frame]

    def __post_init__(self) -> None:
        self.results = {cast(Ref, lane.out[0]).value: i for i, lane in enumerate(self.lanes)}
        self.graph = torch.fx.Graph()
        self.root: dict[str, Any] = {}
        self.nodes: dict[int, torch.fx.Node] = {}

    def module(self) -> nn.Module:
        before, after = self._split()
        root = self.trace.frames[0]
        for leaf in root.leaves:
            if isinstance(leaf, Ref) and leaf.value not in self.nodes:
                self.nodes[leaf.value] = self.graph.placeholder(f"x{leaf.value}")
        for event in before:
            self._emit(event)
        inputs = [cast(Ref, lane.leaves[0]).value for lane in self.lanes]
        shared = len(set(inputs)) == 1
        self.root["lanes"] = Lanes([lane.module for lane in self.lanes], shared)
        called = self.graph.call_module("lanes", tuple(self._node(i) for i in (inputs[:1] if shared else inputs)))
        for i, lane in enumerate(self.lanes):
            self.nodes[cast(Ref, lane.out[0]).value] = self.graph.call_function(operator.getitem, (called, i))
        for event in after:
            self._emit(event)
        self.graph.output([self._node(leaf.value) for leaf in root.out if isinstance(leaf, Ref)])
        return torch.fx.GraphModule(self.root, self.graph)

    def _split(self) -> tuple[list[Event], list[Event]]:
        """The events that do not depend on a lane's result, and those that do; those of the lanes themselves are left out."""
        inside = {i for lane in self.lanes for i in range(lane.start, lane.end)}
        storages = {self.trace.values[value].storage for value in self.results}
        values = set(self.results)
        before: list[Event] = []
        after: list[Event] = []
        for i, event in enumerate(self.trace.events):
            if i in inside:
                continue
            reads, makes = _refs((event.args, event.kwargs)), _refs(event.out)
            tainted = any(v in values or (self.trace.values[v].storage in storages and self.trace.values[v].storage) for v in reads)
            if tainted:
                values |= makes | set(event.mutated)
                storages |= {self.trace.values[v].storage for v in event.mutated}
            (after if tainted else before).append(event)
        for lane in self.lanes:
            if _refs(lane.leaves) & values:
                raise NotPossible(f"{lane.path} reads what another network gave")
        return before, after

    def _emit(self, event: Event) -> None:
        made = self.graph.call_function(event.func, self._filled(event.args), self._filled(event.kwargs))
        self._bind(event.out, made)

    def _bind(self, out: Any, node: torch.fx.Node) -> None:
        if isinstance(out, Ref):
            self.nodes.setdefault(out.value, node)
        elif isinstance(out, list):
            for i, item in enumerate(out):
                if isinstance(item, (Ref, list)):
                    self._bind(item, self.graph.call_function(operator.getitem, (node, i)))

    def _filled(self, tree: Any) -> Any:
        if isinstance(tree, Ref):
            return self._node(tree.value)
        if isinstance(tree, (SizeOf, SizeOp)):
            return self._size(tree)
        if isinstance(tree, slice):
            return slice(*(self._filled(part) for part in (tree.start, tree.stop, tree.step)))
        if isinstance(tree, (tuple, list)):
            return type(tree)(self._filled(item) for item in tree)
        if isinstance(tree, dict):
            return {key: self._filled(item) for key, item in tree.items()}
        return tree

    def _size(self, size: Any) -> Any:
        if isinstance(size, SizeOf):
            return self.trace.values[size.value].shape[size.dim]
        return getattr(operator, size.op)(*map(self._size, size.args)) if isinstance(size, SizeOp) else size

    def _node(self, value: int) -> torch.fx.Node:
        if value not in self.nodes:
            name = f"held_{value}"
            recorded = self.trace.values[value]
            self.root[name] = _held(self.model, recorded.name) if recorded.origin == "attribute" else recorded.tensor
            self.nodes[value] = self.graph.get_attr(name)
        return self.nodes[value]


def _held(model: nn.Module, name: str) -> Any:
    return operator.attrgetter(name)(model)


def _refs(tree: Any) -> set[int]:
    if isinstance(tree, Ref):
        return {tree.value}
    if isinstance(tree, slice):
        return _refs((tree.start, tree.stop, tree.step))
    if isinstance(tree, dict):
        return _refs(tuple(tree.values()))
    return set().union(*map(_refs, tree)) if isinstance(tree, (tuple, list)) else set()
