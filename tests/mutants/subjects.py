"""The models on which a bug is shown: the samples of tests/rule_samples.py in a loop, and the joins and forks of the test tables.

Comes in: the op whose rule has the bug. Goes out: ``Subject``: how to build a model that uses the op in its lanes, as a user would have it
(weights as their modules initialise them: ones, zeros, statistics that no batch has touched), and its inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from rule_samples import SAMPLES, Sample
from test_forks import CASES as FORKS
from test_joins_containers import CASES as CONTAINERS
from test_joins_extremes import CASES as EXTREMES
from test_joins_sums import CASES as SUMS
from test_joins_writes import CASES as WRITES
from test_rules_generated import Layout, Loop, cases, flat
from torch import Tensor, nn

import checks
from fxfuse.passes.rules.base import RULES

MOST = 6  # subjects of one op
CHOOSING = frozenset("linear conv bilinear recurrent".split())  # families with rules of several lowerings

# Samples of ops that no rule names: of those that torch.vmap computes. The others are tagged pointwise by their schema.
BY_VMAP = frozenset({"kron", "cov", "trapezoid"})


@dataclass(frozen=True)
class Subject:
    """``inputs(seed)``: other data for other seeds; 0 is the example that it is fused on."""

    name: str
    op: str
    model: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Any, ...]]
    option: int = 0  # which of the lowerings that a rule has


class Lanes(Loop):
    """The sample once per lane, then one more op, so that there is something to launch; lanes are stacked."""

    def __init__(self, sample: Sample, layout: tuple[Layout, ...], lanes: int, seed: int) -> None:
        super().__init__(sample, layout, lanes, False, seed)
        for module in self.nets.modules() if self.nets is not None else ():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()

    def forward(self, *inputs: Tensor) -> Any:
        lanes = [[_finished(leaf) for leaf in flat(outputs)] for outputs in super().forward(*inputs)]
        return [torch.stack(column) for column in zip(*lanes, strict=True)]


def _finished(leaf: Tensor) -> Tensor:
    return torch.tanh(leaf if leaf.is_floating_point() or leaf.is_complex() else leaf.double())


def family_of(op: str) -> str:
    """The file of the rule: "conv", "shape"; of an op without a rule of its own the one that serves it."""
    if op in RULES:
        return RULES[op].vectorize.__module__.rpartition(".")[2]
    return "fallback" if op in BY_VMAP else "elementwise"


def ops() -> list[str]:
    """Every op that has a sample, sorted by family."""
    return sorted(SAMPLES, key=lambda op: (family_of(op), op))


@functools.cache
def subjects_of(op: str) -> list[Subject]:
    """A few models that use ``op``: each sample with its operands as slices, as weights, and one of them shared."""
    by_sample = [_turned(list(_of_sample(op, number, sample)), number) for number, sample in enumerate(SAMPLES[op]) if not sample.never]
    turns = [one[turn] for turn in range(MOST) for one in by_sample if turn < len(one)]
    options = 5 if family_of(op) in CHOOSING else 1
    others = [replace(one, name=f"{one.name}, lowering {n}", option=n) for n in range(1, options) for one in turns[:MOST]]
    return [*turns[:MOST], *others, *_tables(op)]


def _turned(found: list[Subject], number: int) -> list[Subject]:
    """Each sample begins with another layout, as only some of all are tried."""
    return [*found[number % len(found) :], *found[: number % len(found)]]


def _of_sample(op: str, number: int, sample: Sample) -> Iterator[Subject]:
    layouts = [layout for layout, _, wide in cases(sample, number == 0) if not wide]
    plain = [layout for layout in layouts if "shared" not in layout and "own" not in layout]
    own = [one for one in layouts if "own" in one and "shared" not in one]
    shared = [one for one in layouts if "shared" in one]
    mixed = [one for one in shared if "own" in one]
    chosen = [*plain[:1], *mixed[:2], *own[:1], *plain[-1:], *[one for one in shared if one not in mixed][:1]]
    for layout in dict.fromkeys(chosen or layouts[:1]):
        # As many lanes as a dim of the sample's is long: a misplaced lane axis then has the right shape.
        sizes = [size for operand in sample.operands for size in operand.shape if 2 <= size <= 5] or [3]
        for lanes in (sizes[0],):
            yield Subject(
                f"{op}, sample {number}, {layout}, {lanes} lanes", op, functools.partial(_lanes, sample, layout, lanes),
                lambda seed, layout=layout, lanes=lanes: tuple(Loop(sample, layout, lanes, False, seed + 1).inputs),
            )  # fmt: skip


def _lanes(sample: Sample, layout: tuple[Layout, ...], lanes: int) -> Lanes:
    torch.manual_seed(0)
    return Lanes(sample, layout, lanes, 1)


@functools.cache
def table_models() -> list[Subject]:
    """Joins and forks as users write them, from the tables of the tests."""
    found = []
    for table in (WRITES, SUMS, EXTREMES, CONTAINERS, FORKS):
        for name, case in table.items():
            if not case.options.get("kwargs") and not case.options.get("make"):
                found.append(Subject(name, "", functools.partial(_case, case), functools.partial(_drawn, case)))
    return found


def _case(case: checks.Case) -> nn.Module:
    torch.manual_seed(0)
    return case.model().double()


def _drawn(case: checks.Case, seed: int) -> tuple[Any, ...]:
    return checks.as_args(case.x if seed == 0 else checks.fresh(case.x, None, seed + 20))


def _tables(op: str) -> list[Subject]:
    """Lane joins and forks have no operands to lay out: whole models show them."""
    return table_models()[:: 6] if family_of(op) in ("joins", "slicing") else []
