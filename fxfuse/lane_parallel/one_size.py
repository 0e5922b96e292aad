"""One program for all sizes, where a region has several.

Comes in: a ``RegionPlan`` that ``tune_for=[...]`` made. Goes out: the plan without those of its programs that are there only for being
faster at some sizes: all are right at any, and the first of them computes most of its lanes as one.
"""

from __future__ import annotations

from dataclasses import replace

from fxfuse.graph import Program, RegionPlan
from fxfuse.running.entries import FORWARD


def for_any_size(plan: RegionPlan) -> RegionPlan:
    """The plan with one program where it has one for each range of sizes; itself where it has none such."""
    if not plan.by_size:
        return plan
    programs = {flags: _unasked(program) for flags, program in plan.programs.items()}
    methods = {}
    for name, modes in plan.methods.items():
        known = {flags: [program] for flags, program in programs.items()} if name == FORWARD else {}
        methods[name] = {flags: _one_of_each(found, known.get(flags, [])) for flags, found in modes.items()}
    return replace(plan, programs=programs, methods=methods, by_size=[])


def _unasked(program: Program) -> Program:
    """The program, whatever the sizes that the planner chose it for."""
    return replace(program, guard=replace(program.guard, sizes=tuple(check for check in program.guard.sizes if not check.chosen)))


def _one_of_each(found: tuple[Program, ...], known: list[Program]) -> tuple[Program, ...]:
    """The first program of each form of call that ``known`` does not have."""
    kept: list[Program] = []
    for program in map(_unasked, found):
        if not any(program.in_spec == other.in_spec and _same_guard(program, other) for other in (*known, *kept)):
            kept.append(program)
    return tuple(kept)


def _same_guard(one: Program, other: Program) -> bool:
    try:
        return bool(one.guard == other.guard)
    except Exception:  # constants whose equality is no bool
        return False
