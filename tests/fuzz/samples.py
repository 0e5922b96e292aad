"""The rules' samples (tests/rule_samples.py) as steps of a body: every op that has a rule stands in a lane sooner or later.

A sample knows nothing of rows. Where it can, it is called on ``h`` as it is, its first size being the rows (``rows``); else on numbers
made from all rows, and what it gives is added to every row. Its other operands are weights of the lane, of all lanes, or ``h`` again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from rule_samples import BETWEEN, SAMPLES, normal
from torch import Tensor

from .parts import pieces
from .source import Scope, Shape, fit

# Not those that give other numbers at each call.
OPS = sorted(op for op in SAMPLES.keys() - BETWEEN if not op.startswith("fractional"))


def sample(scope: Scope, shape: Shape, op: str, number: int, rows: bool, places: list[int]) -> Shape:
    """A step: sample ``number`` of ``op``. ``places``: for each operand 0 own, 1 common to all lanes, 2 made from ``h``."""
    number %= len(SAMPLES[op])
    chosen = SAMPLES[op][number]
    call = f'SAMPLES["{op}"][{number}].function('
    if chosen.module is not None:
        call += f'{scope.module(f"""SAMPLES["{op}"][{number}].module()""")}, '
    if rows:
        width = _width(op, number)
        if width is not None:
            fit(scope, shape, chosen.operands[0].shape[1:])
            scope.write("dtype = h.dtype")
            scope.write(f"h = {call}h)")
            scope.write("h = torch.cat([piece.to(torch.float64).reshape(piece.shape[0], -1) for piece in pieces(h)], 1).to(dtype)")
            return (width,)
    if not shape:
        scope.write("h = h.unsqueeze(1)")
        shape = (1,)
    have, operands = math.prod(shape), []
    scope.write(f"v = h.mean(0){'.flatten()' if len(shape) > 1 else ''}")
    for index, operand in enumerate(chosen.operands):
        place = places[index % len(places)] if places else 2
        made = f'drawn("{op}", {number}, {index})'
        if operand.draw is normal and (place == 2 or index == 0):
            want = math.prod(operand.shape)
            text = "v" if want == have else f"v[:{want}]" if want < have else f"v.repeat({-(-want // have)})[:{want}]"
            operands.append(f"{text}.reshape({operand.shape})")
        elif operand.draw is normal:
            operands.append(scope.shared(made) if place == 1 else scope.parameter(made))
        else:
            operands.append(scope.buffer(made))
    scope.write(f"v = {call}{', '.join(operands)})")
    scope.write("v = torch.cat([piece.to(torch.float64).flatten() for piece in pieces(v)]).to(h.dtype)")
    length = _length(op, number)
    fit(scope, shape, (length,))
    scope.write("h = h + v / (1 + v.abs())")
    return (length,)


def _call(op: str, number: int, tensors: list[Tensor]) -> list[Tensor]:
    chosen = SAMPLES[op][number]
    own = [chosen.module().double()] if chosen.module is not None else []
    with torch.random.fork_rng(devices=[]):
        return pieces(chosen.function(*own, *tensors))


def _width(op: str, number: int) -> int | None:
    """How many numbers a row has after the sample, its first operand's first size being free; None where it is not."""
    operands = SAMPLES[op][number].operands
    if len(operands) != 1 or operands[0].draw is not normal or not operands[0].shape:
        return None
    widths = set()
    for rows in (2, 3, 6):
        try:
            found = _call(op, number, [normal((rows, *operands[0].shape[1:]), torch.Generator().manual_seed(rows))])
        except (RuntimeError, ValueError, IndexError):
            return None
        if not found or any(piece.ndim == 0 or piece.shape[0] != rows for piece in found):
            return None
        widths.add(sum(piece.numel() for piece in found) // rows)
    return widths.pop() if len(widths) == 1 else None


def _length(op: str, number: int) -> int:
    generator = torch.Generator().manual_seed(0)
    return sum(piece.numel() for piece in _call(op, number, [o.draw(o.shape, generator) for o in SAMPLES[op][number].operands]))


def samples() -> st.SearchStrategy[Any]:
    """A sample of any op that has a rule, and some that have none."""
    places = st.lists(st.integers(0, 2), max_size=3)
    return st.tuples(st.just("sample"), st.sampled_from(OPS), st.integers(0, 6), st.booleans(), places)
