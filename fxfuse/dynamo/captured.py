"""A graph of dynamo's as a model that the pipeline can record.

Comes in: dynamo's graph and the tensors that it was given. Goes out: ``Captured``, a module that holds the weights among the
graph's inputs under their names and takes the other tensors; and which dims of these have a symbolic size (``Symbol``).

Symbolic sizes are inputs of their own in dynamo's graph. A ``Captured`` reads them off its tensors, so that the recorder sees where they
come from.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from fxfuse.models.side_by_side import apart
from fxfuse.private.dynamo import is_open, is_wanted_open, is_weight, is_wrapped_number
from fxfuse.private.storages import storage_key
from fxfuse.running.widen import widen

from .steps import Uncaptured, steps_of
from .writing import writes_first

NUMBERS = "the graph takes Python's numbers as tensors, which dynamo fixes in a second attempt where the inner backend needs them"


@dataclass(frozen=True)
class Symbol:
    """A size that dynamo left open: its name, and every ``(input, dim)`` that has it, inputs counted as ``Captured.forward`` does.

    ``wanted``: it was marked, or has been seen to change; others are open because all are (``dynamic=True``).
    """

    name: str
    places: tuple[tuple[int, int], ...]
    wanted: bool = True


@dataclass
class Slot:
    """One placeholder of dynamo's graph."""

    node: torch.fx.Node
    weight: str = ""  # the name under which ``Captured`` holds it
    input: int = -1  # the number of the tensor among the arguments
    place: tuple[int, int] | None = None  # of a size: the input and the dim of which it is one
    number: int | None = None  # of a size that is fixed by now


class Captured(nn.Module):
    """dynamo's graph; ``forward`` takes the tensors that are no weights, in the graph's order, and returns the graph's tuple."""

    more: tuple[str, ...] = ()  # what a copy shares besides

    def __init__(self, graph: torch.fx.Graph, examples: Sequence[Any]) -> None:
        super().__init__()
        nodes = [node for node in graph.nodes if node.op == "placeholder"]
        if any(map(is_wrapped_number, nodes)):
            raise Uncaptured(NUMBERS)
        self.slots = [Slot(node) for node in nodes]
        self.given: list[Tensor] = []  # the tensors that are no weights
        weights: dict[str, Tensor] = {}
        names = _Names()
        for slot, example in zip(self.slots, examples, strict=True):
            if isinstance(example, nn.Parameter) or (isinstance(example, Tensor) and is_weight(slot.node)):
                slot.weight = names.of(str(slot.node.target))
                weights[slot.weight] = example
            elif isinstance(example, Tensor):
                slot.input = len(self.given)
                self.given.append(example)
        self.symbols = _symbols(self.slots, self.given)
        places = {symbol.name: symbol.places[0] for symbol in self.symbols}
        for slot in self.slots:
            if not slot.weight and slot.input < 0:
                shown = str(slot.node.meta.get("example_value"))
                slot.place, slot.number = places.get(shown), int(shown) if shown.isdigit() else None
                if slot.place is None and slot.number is None and slot.node.users:
                    raise Uncaptured(f"the graph takes a number ({slot.node.name}) that is the size of no tensor")
        # A computed weight (``functional_call``, a parametrization) ends here: no backward of ours goes into the caller's own graph.
        self.hold(apart({name: tensor if tensor.is_leaf else _alias(tensor) for name, tensor in weights.items()}))
        self.tracked = torch.is_grad_enabled()  # by the caller: the graph is compiled for this
        self.take(graph, frozenset() if self.tracked else _buffer_writes(self.slots, graph))

    def take(self, graph: torch.fx.Graph, untracked: frozenset[torch.fx.Node] = frozenset()) -> None:
        """The calls to make, as they are and for float64; dtypes that the graph spells out are those of the inputs, as often as not.

        ``untracked``: those to make under ``no_grad``.
        """
        wide, copies = torch.fx.Graph(), dict[torch.fx.Node, torch.fx.Node]()
        for node in graph.nodes:
            copies[node] = wide.node_copy(node, copies.__getitem__)
            copies[node].meta = {"val": node.meta.get("val", node.meta.get("example_value")), "stack_trace": node.meta.get("stack_trace")}
        widen(wide)
        self.steps = steps_of(graph, untracked)
        self.wide_steps = steps_of(wide, frozenset(copies[node] for node in untracked))
        self.wide_slots = [replace(slot, node=copies[slot.node]) for slot in self.slots]
        self.narrow = _is_narrow((*self.given, *self.weights().values()))

    def hold(self, weights: dict[str, Tensor], saved: Callable[[str], bool] = lambda name: True) -> None:
        """Register the weights. ``saved``: is this one part of the state dict?"""
        self.owners: dict[str, tuple[dict[str, Any], str]] = {}
        for name, tensor in weights.items():
            owner: nn.Module = self
            *path, leaf = name.split(".")
            for part in path:
                inner = owner._modules.get(part)
                if inner is None:
                    inner = owner._modules[part] = _holder()
                owner = inner
            if isinstance(tensor, nn.Parameter):
                owner._parameters[leaf] = tensor
                self.owners[name] = owner._parameters, leaf
            else:
                owner.register_buffer(leaf, tensor, persistent=saved(name))
                self.owners[name] = owner._buffers, leaf

    def __deepcopy__(self, memo: dict[int, Any]) -> Captured:
        return self._with({name: copy.deepcopy(tensor, memo) for name, tensor in self.weights().items()}, memo)

    def alias(self) -> Captured:
        """The same graph on tensors of the same memory, which have no hooks: for steps with a backward that nobody is to see."""
        return self._with({name: _alias(tensor) for name, tensor in self.weights().items()})

    def _with(self, weights: dict[str, Tensor], memo: dict[int, Any] | None = None) -> Captured:
        made = type(self).__new__(type(self))
        nn.Module.__init__(made)
        if memo is not None:
            memo[id(self)] = made
        kept = ("training", "slots", "wide_slots", "symbols", "steps", "wide_steps", "narrow", "given", "tracked", *self.more)
        made.__dict__.update({name: self.__dict__[name] for name in kept})
        made.hold(weights)
        return made

    def weights(self) -> dict[str, Tensor]:
        """The weights by name, in the graph's order."""
        return {name: store[leaf] for name, (store, leaf) in self.owners.items()}

    def forward(self, *tensors: Tensor) -> Any:
        """The graph on ``tensors`` and the weights held; in float64, where it was captured in another dtype, with its dtypes widened."""
        wide = self.narrow and not _is_narrow((*tensors, *self.weights().values()))
        slots, steps = (self.wide_slots, self.wide_steps) if wide else (self.slots, self.steps)
        known: dict[torch.fx.Node, Any] = dict(zip((slot.node for slot in slots), self.values(tensors), strict=True))
        for step in steps:
            args, kwargs = torch.fx.map_arg((step.args, step.kwargs), known.__getitem__)
            if step.result is None:
                return args[0]
            known[step.result] = step.call(step.target, args, kwargs)
        raise AssertionError("a graph ends with its output")

    def values(self, tensors: Sequence[Tensor]) -> list[Any]:
        """What dynamo's graph takes, in its order, for these tensors and the weights held."""
        found: list[Any] = []
        for slot in self.slots:
            if slot.weight:
                store, leaf = self.owners[slot.weight]
                found.append(store[leaf])
            elif slot.input >= 0:
                found.append(tensors[slot.input])
            else:
                found.append(slot.number if slot.place is None else tensors[slot.place[0]].shape[slot.place[1]])
        return found


_EMPTY = nn.Module()


def _holder() -> nn.Module:
    """An empty module, made as a copy of one: its own constructor takes 20 us, and a layer of every lane is held by many."""
    made = nn.Module.__new__(nn.Module)
    made.__dict__.update({name: value.copy() if isinstance(value, (dict, set)) else value for name, value in _EMPTY.__dict__.items()})
    return made


def _alias(tensor: Tensor) -> Tensor:
    made, needed = tensor.detach(), tensor.requires_grad
    return nn.Parameter(made, needed) if isinstance(tensor, nn.Parameter) else made.requires_grad_(needed)


def _is_narrow(tensors: Sequence[Tensor]) -> bool:
    """Is no floating number in float64?"""
    return not any(tensor.dtype in (torch.float64, torch.complex128) for tensor in tensors)


def _buffer_writes(slots: list[Slot], graph: torch.fx.Graph) -> frozenset[torch.fx.Node]:
    """The calls that write into buffers, or views of them, where the graph itself does not switch gradient tracking.

    A graph that is compiled where the caller tracks nothing does not say so, nor where forward's own ``no_grad`` began. It is recorded
    and compared with tracking on, and there a buffer would take on the history of what is written into it.
    """
    if any(getattr(node.target, "__name__", "") == "_set_grad_enabled" for node in graph.nodes):
        return frozenset()
    held = {key for slot in slots if slot.weight and (key := _memory(slot.node)) is not None}
    calls = [node for node in graph.nodes if node.op in ("call_function", "call_method") and writes_first(node)]
    return frozenset(node for node in calls if isinstance(node.args[0], torch.fx.Node) and _memory(node.args[0]) in held)


def _memory(node: torch.fx.Node) -> Any:
    """Whose memory a value lies in, by dynamo's stand-in for it; None where that is not known."""
    value = node.meta.get("example_value")
    return storage_key(value.untyped_storage()) if isinstance(value, Tensor) and value.layout is torch.strided else None


_PARTS = re.compile(r"_(?:modules|parameters|buffers)_")
_OWN = "slots wide_slots given symbols steps wide_steps narrow tracked owners autocast constants".split()
_TAKEN = frozenset((*dir(nn.Module()), *vars(Captured), *_OWN))


class _Names:
    """Readable names, none the path to another: ``L_self_modules_nets_modules_0_parameters_weight_`` is ``nets.0.weight``.

    >>> names = _Names()
    >>> names.of("L_self_modules_nets_modules_0_parameters_weight_"), names.of("L_self_modules_nets_modules_0_parameters_weight_")
    ('nets.0.weight', 'nets.0.weight_')
    """

    def __init__(self) -> None:
        self.known: set[str] = set()
        self.paths: set[str] = set()  # to those

    def of(self, target: str) -> str:
        """A name for this placeholder of dynamo's."""
        parts = [part for part in _PARTS.split(target.rstrip("_"))[1:] if part] or [target]
        name = ".".join(f"{part}_" if part in _TAKEN or (not part.isidentifier() and not part.isdigit()) else part for part in parts)
        while name in self.known or name in self.paths or any(path in self.known for path in _paths(name)):
            name += "_"
        self.known.add(name)
        self.paths.update(_paths(name))
        return name


def _paths(name: str) -> list[str]:
    """``a`` and ``a.b`` of ``a.b.c``."""
    return list(accumulate(name.split(".")[:-1], "{}.{}".format))


def _symbols(slots: list[Slot], given: list[Tensor]) -> list[Symbol]:
    """The sizes that dynamo left open, the wanted ones first. Raises ``Uncaptured`` for one that shows in a sum or product only."""
    places: dict[str, list[tuple[int, int]]] = {}
    for slot in slots:
        value = slot.node.meta.get("example_value")
        if isinstance(value, Tensor) and (slot.weight or slot.input >= 0):
            for dim, size in enumerate(value.shape):
                if is_open(size):
                    if slot.weight:
                        raise Uncaptured(f"the size of a weight is open ({slot.weight})")
                    if not str(size).isidentifier():
                        raise Uncaptured(f"an input has a size that is computed ({size})")
                    places.setdefault(str(size), []).append((slot.input, dim))
    symbols = [Symbol(name, tuple(found), any(is_wanted_open(given[i], dim) for i, dim in found)) for name, found in places.items()]
    return sorted(symbols, key=lambda symbol: not symbol.wanted)
