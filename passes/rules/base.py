"""What a rule is, and the register of all rules.

A rule says, for one op: given which operands carry a lane axis and where, what single op computes all lanes, and where the lane axis
ends up (JAX's batching rules, written on operands so that they serve modules, functional calls and computed weights alike).

To add an op: write a function ``(emitter, bundle) -> Packed`` in a file of this folder and decorate it with ``@rule("name", ...)``.
Raise ``CannotVectorize(reason)`` for a case it does not cover: the lanes then stay as they are and the report says why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..bundle import Bundle, Node
from ..emit import Emitter
from ..writer import CannotVectorize, Packed

Vectorize = Callable[[Emitter, Bundle], "Packed | tuple[Packed, str]"]


@dataclass(frozen=True)
class Rule:
    """``view``: launches nothing. ``heavy``: carries parameters or a product. ``lowering``: the name used in reports by default."""

    ops: tuple[str, ...]
    vectorize: Vectorize
    view: bool = False
    heavy: bool = False
    lowering: str = ""

    def apply(self, emitter: Emitter, bundle: Bundle) -> tuple[Packed, str]:
        """The packed result and the lowering used; checks that shape and dtype are what the lanes had."""
        result = self.vectorize(emitter, bundle)
        value, lowering = result if isinstance(result[1], str) else (result, self.lowering or bundle.name)
        assert isinstance(value, Packed)
        member = bundle.members[0]
        made: Any = value.node.meta.get("val")
        if bundle.apart is not None:
            _check_end_to_end(bundle, made)
        elif hasattr(made, "shape") and member.meta.get("shape") is not None:
            shape = list(made.shape)
            if value.dim is not None:
                lanes = shape.pop(value.dim)
                if lanes != len(bundle.members):
                    raise CannotVectorize(f"{bundle.name}: packed {lanes} lanes instead of {len(bundle.members)}")
            if tuple(shape) != tuple(member.meta["shape"]):
                raise CannotVectorize(f"{bundle.name}: lanes would have shape {tuple(shape)} instead of {tuple(member.meta['shape'])}")
            if made.dtype is not member.meta["dtype"]:
                raise CannotVectorize(f"{bundle.name}: lanes would have dtype {made.dtype} instead of {member.meta['dtype']}")
        return value, lowering


def _check_end_to_end(bundle: Bundle, made: Any) -> None:
    assert bundle.apart is not None
    expected = list(bundle.members[0].meta["shape"])
    expected[bundle.apart] = sum(member.meta["shape"][bundle.apart] for member in bundle.members)
    if list(made.shape) != expected or made.dtype is not bundle.members[0].meta["dtype"]:
        raise CannotVectorize(f"{bundle.name}: lanes end to end would be {list(made.shape)} {made.dtype} instead of {expected}")


RULES: dict[str, Rule] = {}


def rule(*ops: str, view: bool = False, heavy: bool = False, lowering: str = "") -> Callable[[Vectorize], Vectorize]:
    """Register a function as the rule of these ops (canonical names, as ``passes.ops.op_name`` gives them)."""

    def register(vectorize: Vectorize) -> Vectorize:
        made = Rule(ops, vectorize, view, heavy, lowering)
        for op in ops:
            if op in RULES:
                raise ValueError(f"two rules for {op}")
            RULES[op] = made
        return vectorize

    return register


def rank(node: Any) -> int:
    """The rank of a lane's own value."""
    return len(node.meta["shape"])


def physical(dim: int, lane: int | None) -> int:
    """Where a lane's dimension ``dim`` is in a packed value whose lane axis is at ``lane``."""
    return dim if lane is None or dim < lane else dim + 1


def numbers(arg: Any) -> Any:
    """Sizes in an argument: each must be the same in every lane."""
    if isinstance(arg, Packed):
        if arg.dim is not None:
            raise CannotVectorize("lanes use sizes that differ")
        return arg.node
    if isinstance(arg, list):  # fx makes lists of a class of its own
        return [numbers(a) for a in arg]
    return tuple(numbers(a) for a in arg) if isinstance(arg, tuple) else arg


def sizes_of(emitter: Emitter, value: Packed, lane: Node) -> tuple[Any, ...]:
    """A lane's own sizes: numbers where they are fixed, read from the packed ``value`` where they are free."""
    shape, free = lane.meta["shape"], lane.meta["dyn"]
    return tuple(emitter.call("size", value.node, physical(d, value.dim)) if d in free else int(n) for d, n in enumerate(shape))


def tensors(emitter: Emitter, bundle: Bundle) -> dict[str, Any]:
    """All arguments by name: ``Packed`` where they are tensors, anything else as ``numbers`` gives it."""
    assert bundle.op is not None
    column = dict(zip(bundle.op.names, bundle.members[0].args, strict=True))
    given = {name: emitter.operand(bundle, name) for name in bundle.op.names}
    return {name: value if is_tensor(column[name]) else numbers(value) for name, value in given.items()}


def is_tensor(arg: Any) -> bool:
    """True for a node that holds a tensor, rather than a number."""
    return isinstance(arg, Node) and arg.meta.get("shape") is not None


def unpacked(args: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments as nodes, for a call in which no layout matters."""
    return tuple(value.node if isinstance(value, Packed) else value for value in args.values())


def shared(*values: Any) -> bool:
    """True where no operand carries a lane axis: one computation serves all lanes."""
    return all(not isinstance(v, Packed) or v.dim is None for v in values)
