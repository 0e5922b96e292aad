"""Inputs by whose order in memory results lie: of a transposed ``x``, ``x + net(x)`` is transposed too.

Comes in: a program, and the recorded call that it repeats. Goes out: the program, whose guard holds such inputs to the order of dims that
they were recorded in; a call in another order runs the original. A packed form makes results that lie as in the recording, and torch
has no rule by which an op passes strides on: so the call runs a few times more, on inputs that lie otherwise, and the results show it.
The packed form is asked, too, without numbers: lanes that a loop adds into rows of zeros lie in rows, their sum may lie as the inputs do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.graph import Program, TensorGuard
from fxfuse.models.containers import opened
from fxfuse.models.determinism import preserved_state
from fxfuse.models.inputs import clone_inputs
from fxfuse.models.module_tree import all_modules
from fxfuse.models.silent_hooks import hooks_silent
from fxfuse.passes.lifted import Lifted
from fxfuse.passes.returned import is_a_view_of_an_input
from fxfuse.private.pytree import tree_flatten, tree_unflatten
from fxfuse.private.torch_function import DisableTorchFunction
from fxfuse.running.guards import order_of

# Of more inputs it is not asked which of them it is.
MOST_INPUTS = 4
MOST_ORDERS = 5  # in which one input is laid


def held_to_order(program: Program, lifted: Lifted, root: nn.Module, flags: Sequence[bool]) -> Program:
    """``program`` with the order of such inputs in its guard. ``flags``: the modes of all modules of ``root`` in the recording.

    The forward of the recorded call runs once and up to five times more; with several inputs, as often again for each. Nothing of it stays.
    """
    if lifted.frame.raw is None:
        return program
    with preserved_state(root), torch.enable_grad(), DisableTorchFunction(), hooks_silent(root):
        for each, training in zip(all_modules(root), flags, strict=True):
            each.training = training
        try:
            found = _Runs(program, lifted).shown()
        except Exception:  # a call that cannot be repeated
            return program
    return _held(program, found)


def held_to_own_order(program: Program, lifted: Lifted) -> Program:
    """``program`` with the order of such inputs in its guard by which its own results lie, and not the original's (``held_to_order``)."""
    if lifted.frame.raw is None:
        return program
    try:
        found = _OnMeta(program, lifted).shown()
    except Exception:  # an op that needs numbers, or has no meta kernel
        return program
    return _held(program, found)


def _held(program: Program, found: dict[int, Tensor]) -> Program:
    leaves = [
        replace(leaf, layout="by results", order=order_of(found[index])) if index in found and not leaf.layout else leaf
        for index, leaf in enumerate(program.guard.leaves)
    ]
    return replace(program, guard=replace(program.guard, leaves=tuple(leaves))) if found else program


class _Runs:
    """The calls of one recorded frame."""

    def __init__(self, program: Program, lifted: Lifted) -> None:
        self.module, self.graph = lifted.frame.module, program.graph
        (output,) = [node for node in lifted.graph.nodes if node.op == "output"]
        # Views of inputs are made from them at every call, and lie as those do.
        given = list(output.args[0])[: len(lifted.frame.out)]
        self.told = [index for index, node in enumerate(given) if isinstance(node, torch.fx.Node) and not is_a_view_of_an_input(node)]
        self.leaves, self.spec = tree_flatten(lifted.frame.raw)
        self.same = program.guard.same
        self.inputs: dict[int, Tensor] = {}  # those that can lie in more than one order, of more than one row
        for index, (guard, leaf) in enumerate(zip(program.guard.leaves, self.leaves, strict=True)):
            if isinstance(guard, TensorGuard) and not guard.layout and leaf.layout is torch.strided and self.same[index] == index:
                times = [2 if free is None and size == 1 else 1 for free, size in zip(guard.shape, leaf.shape, strict=True)]
                self.leaves[index] = _repeated(leaf.detach(), times)
                if sum(size > 1 for size in self.leaves[index].shape) > 1:
                    self.inputs[index] = self.leaves[index]

    def shown(self) -> dict[int, Tensor]:
        """The inputs by whose order results lie."""
        if not self.told or not self.inputs:
            return {}
        usual = self._strides({})
        every = list(self.inputs)
        if not self._differs(usual, every):
            return {}
        several = 1 < len(every) <= MOST_INPUTS
        return {index: self.inputs[index] for index in every if not several or self._differs(usual, [index])}

    def _differs(self, usual: Any, which: list[int]) -> bool:
        for turned in range(MOST_ORDERS):
            other = {index: _relaid(self.inputs[index], turned) for index in which}
            if any(tensor is not None for tensor in other.values()):
                try:
                    if self._strides({index: tensor for index, tensor in other.items() if tensor is not None}) != usual:
                        return True
                except RuntimeError:  # forward calls ``view``
                    return True
        return False

    def _strides(self, other: dict[int, Tensor]) -> list[Any]:
        leaves = [other.get(self.same[index], self.leaves[self.same[index]]) for index in range(len(self.leaves))]
        args, kwargs = clone_inputs(tree_unflatten(leaves, self.spec), requires_grad=False)
        results = tree_flatten(opened(type(self.module).forward(self.module, *args, **kwargs)))[0]
        return [_seen(results[index]) if index < len(results) else None for index in self.told]


class _OnMeta(_Runs):
    """The same calls of the packed form, without numbers."""

    def __init__(self, program: Program, lifted: Lifted) -> None:
        super().__init__(program, lifted)
        (output,) = program.graph.find_nodes(op="output")
        self.results = [output.args[0][index] for index in self.told]
        placeholders = program.graph.find_nodes(op="placeholder")
        given = tree_flatten(lifted.frame.raw)[0]
        recorded = all(new.shape == old.shape for new, old in zip(self.leaves, given, strict=True) if isinstance(new, Tensor))
        self.leaves = [_without_numbers(leaf) for leaf in self.leaves]
        self.inputs = {index: self.leaves[index] for index in self.inputs}
        self.places = {node: index for index, node in enumerate(placeholders)}
        self.nodes = self._asked(recorded)
        if not any(node in self.places for node in self.nodes):
            self.told = []

    def _asked(self, recorded: bool) -> list[torch.fx.Node]:
        """What the results' strides may come from, in order. ``recorded``: the sizes are, so that what lies as ever is known."""
        found: set[torch.fx.Node] = set()
        pending = [node for node in self.results if isinstance(node, torch.fx.Node)]
        while pending:
            node = pending.pop()
            if node not in found:
                found.add(node)
                pending += () if recorded and _lies_as_ever(node) else node.all_input_nodes
        return [node for node in self.graph.nodes if node in found]

    def _strides(self, other: dict[int, Tensor]) -> list[Any]:
        values: dict[torch.fx.Node, Any] = {}
        for node in self.nodes:
            if node in self.places:
                index = self.same[self.places[node]]
                values[node] = other.get(index, self.leaves[index])
            elif node.op in ("get_attr", "call_module") or any(source not in values for source in node.all_input_nodes):
                values[node] = _without_numbers(node.meta["val"])
            else:
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                function: Any = getattr(Tensor, str(node.target)) if node.op == "call_method" else node.target
                values[node] = _without_numbers(function(*args, **kwargs))
        return [_seen(values[node]) if isinstance(node, torch.fx.Node) else None for node in self.results]


# Products, look-ups and calls lie in rows whatever they read; what they say of their results is in ``meta["val"]``.
_IN_ROWS = frozenset("bmm baddbmm mm addmm linear embedding index_select".split())


def _lies_as_ever(node: torch.fx.Node) -> bool:
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    return "val" in node.meta and (name in _IN_ROWS or node.op in ("call_module", "get_attr"))


def _without_numbers(value: Any) -> Any:
    return value.detach().to("meta") if isinstance(value, Tensor) else value


def _seen(value: Any) -> Any:
    """Strides where they can be seen: in dims of more than one element."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return None
    return tuple(value.shape), tuple(stride for stride, size in zip(value.stride(), value.shape, strict=True) if size > 1)


def _repeated(tensor: Tensor, times: list[int]) -> Tensor:
    """The tensor so many times along each dim, its dims in the same order."""
    if all(each == 1 for each in times):
        return tensor
    order = order_of(tensor) or tuple(range(tensor.dim()))
    return _in_order(tensor.repeat(times), order)


def _in_order(tensor: Tensor, order: Sequence[int]) -> Tensor:
    return tensor.permute(*order).contiguous().permute(*(order.index(dim) for dim in range(tensor.dim())))


def _relaid(tensor: Tensor, turned: int) -> Tensor | None:
    """The same numbers with their dims in another order in memory; None where that is one of the others."""
    order = order_of(tensor) or tuple(range(tensor.dim()))
    orders = list(dict.fromkeys(_orders(order)))
    return _in_order(tensor, orders[turned]) if turned < len(orders) and orders[turned] != order else None


def _orders(order: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    yield (order[0], *order[2:], order[1])  # channels last
    yield (*order[:-2], order[-1], order[-2])
    yield (order[1], order[0], *order[2:])
    yield order[::-1]
    yield (0, *range(2, len(order)), 1)  # channels last, in whatever order it was recorded
