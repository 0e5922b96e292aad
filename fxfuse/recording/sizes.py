"""Sizes that remember where they came from.

Comes in: the sizes of a recorded tensor. Goes out: ``TracedInt``, an ``int`` that carries the expression it was computed by, so that
``x.view(x.shape[0] * 2, -1)`` is recorded as an expression of ``x`` and holds for other batch sizes. Arithmetic gives exact
expressions; every comparison is logged, because the recorded run took one of its branches. What leaves the tracked world
(``int(n)``, ``n / 2``, ``n & 1``, a key of a dict) becomes a plain number, of which nobody sees what is made: it is logged as a comparison
with itself, which holds the size to the recorded one. What reads an ``int`` behind its back (numpy, an index of a list) leaves no trace;
where it matters, the second recording (``unify``) and the validation at other sizes differ.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class SizeOf:
    """``value.shape[dim]`` of the recorded value with that number."""

    value: int
    dim: int


@dataclass(frozen=True, slots=True)
class SizeOp:
    """An arithmetic operation on sizes: ``op`` is a name in the ``operator`` module."""

    op: str
    args: tuple[Any, ...]  # of SizeOf, SizeOp, int


@dataclass(frozen=True, slots=True)
class Comparison:
    """A comparison of sizes that the recorded run made, and how it came out."""

    op: str
    left: Any
    right: Any
    result: bool


class TracedInt(int):
    """An ``int`` with the expression it stands for. torch, numpy and Python take it as the number it is.

    >>> log = []
    >>> n = TracedInt.make(6, SizeOf(0, 0), log)
    >>> (n * 2 + 1, (n * 2 + 1).expr.op, n > 4, len(log))
    (13, 'add', True, 1)
    """

    expr: SizeOf | SizeOp
    log: list[Comparison]

    @classmethod
    def make(cls, value: int, expr: SizeOf | SizeOp, log: list[Comparison]) -> TracedInt:
        traced = cls(value)
        traced.expr = expr
        traced.log = log
        return traced

    # A size that ends up in copied or pickled state is the plain number: the recording it belonged to is over.
    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return (int, (plain(self),))

    def __copy__(self) -> int:
        return plain(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> int:
        return plain(self)


def plain(size: int) -> int:
    """The number alone, of which nothing is logged."""
    return int.__int__(size)



def _expr(value: Any, log: list[Comparison]) -> Any:
    # A size of another recording, which a cache of somebody's kept, is the number it is: its expression speaks of other values.
    return value.expr if isinstance(value, TracedInt) and value.log is log else plain(value)


def fixed(size: int) -> int:
    """The number alone, which the recorded run from here on takes for granted."""
    if isinstance(size, TracedInt):
        size.log.append(Comparison("eq", size.expr, plain(size), True))
    return plain(size)


def _leaving(name: str) -> Callable[..., Any]:
    compute = getattr(int, name)

    def method(self: TracedInt, *others: Any) -> Any:
        return compute(fixed(self), *(fixed(other) if isinstance(other, TracedInt) else other for other in others))

    return method


def _arithmetic(name: str, reflected: bool) -> Callable[..., Any]:
    compute = getattr(operator, name)

    def method(self: TracedInt, *others: Any) -> Any:
        if any(type(other) is not int and not isinstance(other, TracedInt) for other in others):
            numbers = [fixed(self), *others]
            return compute(*(reversed(numbers) if reflected else numbers))
        operands = (self, *others)
        if reflected:
            operands = operands[::-1]
        value = compute(*(plain(o) for o in operands))
        return TracedInt.make(value, SizeOp(name, tuple(_expr(o, self.log) for o in operands)), self.log)

    return method


def _comparison(name: str) -> Callable[..., Any]:
    compute = getattr(operator, name)

    def method(self: TracedInt, other: Any) -> Any:
        if type(other) is not int and not isinstance(other, TracedInt):
            return compute(fixed(self), other)
        if isinstance(other, TracedInt) and other.log is not self.log and name in ("eq", "ne"):
            return name == "ne"  # sizes of two recordings are no key to each other: a cache by shape computes anew
        result = bool(compute(plain(self), plain(other)))
        self.log.append(Comparison(name, self.expr, _expr(other, self.log), result))
        return result

    return method


def _truth(self: TracedInt) -> bool:
    result = plain(self) != 0
    self.log.append(Comparison("ne", self.expr, 0, result))
    return result


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    setattr(TracedInt, f"__{_name}__", _arithmetic(_name, False))
    setattr(TracedInt, f"__r{_name}__", _arithmetic(_name, True))
setattr(TracedInt, "__neg__", _arithmetic("neg", False))  # noqa: B010
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(TracedInt, f"__{_name}__", _comparison(_name))
setattr(TracedInt, "__bool__", _truth)  # noqa: B010


for _name in (
    *("truediv", "rtruediv", "pow", "rpow", "divmod", "rdivmod", "and", "rand", "or", "ror", "xor", "rxor", "lshift", "rlshift"),
    *("rshift", "rrshift", "float", "int", "round", "trunc", "floor", "ceil", "str", "format", "invert", "abs", "index"),
):
    setattr(TracedInt, f"__{_name}__", _leaving(f"__{_name}__"))
setattr(TracedInt, "bit_length", _leaving("bit_length"))  # noqa: B010
setattr(TracedInt, "bit_count", _leaving("bit_count"))  # noqa: B010


def _hash(self: TracedInt) -> int:
    # einops caches by shape, and computes without its cache where a shape cannot be hashed (its way with symbolic sizes). A number from
    # that cache would fix the size; dicts of everybody else must find their keys.
    if sys._getframe(1).f_globals.get("__name__") == "einops.einops":
        raise TypeError("a size under recording")
    return int.__hash__(fixed(self))


setattr(TracedInt, "__hash__", _hash)  # noqa: B010
