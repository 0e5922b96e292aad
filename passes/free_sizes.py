"""Sizes that may differ at another call: which they are, what the recorded run took for granted of them, and guards for it.

Comes in: the trace, the frame, and the dims that were found to be free. Goes out: ``FreeSizes``, a layer of the lifter: it tells
whether a size expression is free, and collects the ``SizeCheck``s; a comparison that no guard can hold fixes every size.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx

from fxfuse.graph import Place, SizeCheck
from fxfuse.recording.sizes import SizeOf, SizeOp
from fxfuse.recording.trace import Frame, Ref, Trace

from .lifted import SizeDependent, Sizes
from .size_source import SizeSources


class FreeSizes:
    """What is known of sizes while a frame is lifted."""

    def __init__(self, trace: Trace, frame: Frame, sizes: Sizes, opaque: frozenset[int]) -> None:
        self.trace, self.frame, self.sizes, self.opaque = trace, frame, sizes, opaque
        self.dynamic = _merged(sizes)
        self.checks: list[SizeCheck] = []
        self.place: Place | None = None
        self.size_sources: SizeSources | None = None

    def _input_dim(self, value: int, dim: int) -> tuple[int, int] | None:
        """(leaf, dim) of an input that has the same free size as ``dim`` of ``value``; None where no input shows it."""
        size = self.trace.values[value].shape[dim]
        for dims in self.sizes:
            if dim in dims.get(value, ()):
                for index, leaf in enumerate(self.frame.leaves):
                    if isinstance(leaf, Ref):
                        for own in sorted(dims.get(leaf.value, ())):
                            if self.trace.values[leaf.value].shape[own] == size:
                                return index, own
        return None

    def _check_value(self, value: int, dim: int, op: Any, bound: int) -> None:
        """Guard what the recorded run took for granted of a free size."""
        found = self._input_dim(value, dim)
        if found is None:
            raise SizeDependent("a free size does not come from the inputs", self.place)
        self.checks.append(SizeCheck(*found, op, bound))

    def _check(self, node: torch.fx.Node, dim: int, op: Any, bound: int) -> None:
        value = node.meta.get("value")
        if value is None:
            raise SizeDependent("a free size does not come from the inputs", self.place)
        self._check_value(value, dim, op, bound)

    def _comparisons(self) -> None:
        """Comparisons of free sizes that Python made in this frame become guards, or fix every size."""
        signs = {"lt": ("<", ">="), "le": ("<=", ">"), "gt": (">", "<="), "ge": (">=", "<"), "eq": ("==", "!="), "ne": ("!=", "==")}
        mirrored = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "eq": "eq", "ne": "ne"}
        for comparison, frame, place in self.trace.comparisons:
            if not self._inside(frame):
                continue
            left, right, op = comparison.left, comparison.right, comparison.op
            if not self._free(left) and not self._free(right):
                continue
            if self._free(right):
                left, right, op = right, left, mirrored[op]
            if self._free(right) or not isinstance(left, SizeOf):
                if isinstance(left, SizeOf) and (left == right or self._one_size(left, right)):
                    continue
                raise SizeDependent("forward compares sizes", place)
            bound = right if isinstance(right, int) else self._number(right)
            sign = signs[op][0 if comparison.result else 1]
            value, dim, factor = self._sources().of(left.value, left.dim) if op in ("eq", "ne") else (left.value, left.dim, 1)
            if factor == 1:
                self._check_value(left.value, left.dim, sign, bound)
            elif bound % factor == 0:  # else no size at all makes them equal
                self._check_value(value, dim, sign, bound // factor)

    def _sources(self) -> SizeSources:
        if self.size_sources is None:
            self.size_sources = SizeSources(self.trace)
        return self.size_sources

    def _one_size(self, left: SizeOf, right: Any) -> bool:
        """Two dims that have one free size, by whatever name: the guard holds them equal."""
        values = self.trace.values
        if not isinstance(right, SizeOf) or values[left.value].shape[left.dim] != values[right.value].shape[right.dim]:
            return False
        return any(left.dim in dims.get(left.value, ()) and right.dim in dims.get(right.value, ()) for dims in self.sizes)

    def _free(self, expr: Any) -> bool:
        if isinstance(expr, SizeOf):
            return expr.dim in self.dynamic.get(expr.value, ())
        return isinstance(expr, SizeOp) and any(self._free(a) for a in expr.args)

    def _inside(self, frame: int) -> bool:
        while frame >= 0:
            if frame in self.opaque:
                return False
            if frame == self.frame.index:
                return True
            frame = self.trace.frames[frame].parent
        return False

    def _number(self, expr: Any) -> int:
        return recorded_number(self.trace, expr)


def recorded_number(trace: Trace, expr: Any) -> int:
    """A size expression without free sizes, as recorded."""
    if isinstance(expr, SizeOf):
        return trace.values[expr.value].shape[expr.dim]
    if isinstance(expr, SizeOp):
        return int(getattr(operator, expr.op)(*[recorded_number(trace, arg) for arg in expr.args]))
    return int(expr)


def _merged(sizes: Sizes) -> dict[int, frozenset[int]]:
    found: dict[int, frozenset[int]] = {}
    for dims in sizes:
        for value, free in dims.items():
            found[value] = found.get(value, frozenset()) | free
    return found
