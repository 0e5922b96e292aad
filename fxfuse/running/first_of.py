"""Which of a region's programs answers a call.

Comes in: compiled programs, in the order in which they are asked. Goes out: one function of a call, that of the first whose guard holds.
Where programs serve ranges of sizes, the size is read once and the right one asked first: half a microsecond, however many there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fxfuse.graph import Program

from .runtime import MISS, Compiled

Run = Callable[[tuple[Any, ...], dict[str, Any]], Any]


def always_miss(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Of no program."""
    return MISS


def first_of(programs: Sequence[Compiled]) -> Run:
    """The first program whose guard holds."""
    if len(programs) == 1:
        return programs[0].run

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for program in programs:
            out = program.run(args, kwargs)
            if out is not MISS:
                break
        return out

    return _by_size(programs, run) or run


def _by_size(programs: Sequence[Compiled], otherwise: Run) -> Run | None:
    """As ``otherwise``, but where an argument tells, the program for its size comes first; None where none was chosen for a size."""
    told = _told_by(programs[0].program)
    if told is None:
        return None
    position, dim, spec = *told, programs[0].program.in_spec
    # Of calls like the first program's; the first of two for one range.
    last: dict[float, Run] = {}
    for compiled in programs:
        if _told_by(compiled.program) == told and compiled.program.in_spec == spec:
            bounds = [check.bound for check in compiled.program.guard.sizes if check.chosen and check.op == "<="]
            last.setdefault(min(bounds, default=math.inf), compiled.run)
    bounded = [(int(bound), run) for bound, run in sorted(last.items(), key=lambda item: item[0]) if bound < math.inf]
    largest = last.get(math.inf, otherwise)

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[position] if len(args) > position else None
        if not isinstance(x, Tensor) or x.dim() <= dim:
            return otherwise(args, kwargs)
        size, chosen = x.size(dim), largest
        for bound, run in bounded:
            if size <= bound:
                chosen = run
                break
        out = chosen(args, kwargs)
        return otherwise(args, kwargs) if out is MISS else out

    return run


def _told_by(program: Program) -> tuple[int, int] | None:
    """The positional argument, and its dim, whose size the planner chose the program for; None where that is no argument itself."""
    check = next((check for check in program.guard.sizes if check.chosen), None)
    leaves = 0
    for position, argument in enumerate(program.in_spec.children()[0].children()):
        if check is not None and leaves == check.input and argument.is_leaf():
            return position, check.dim
        leaves += argument.num_leaves
    return None
