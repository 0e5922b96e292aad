"""The sharded model tried on a copy, before the model itself is sharded.

Comes in: a fused model, and a way to shard a copy. Goes out: what is to be said of it in the report; or ``FxfuseError`` on every process,
where copies sharded and unsharded differ in outputs, input gradients, gradients by the original's names, buffers, strides, or where one
of them raises on any process. In float64 where the model takes it; a large model in its own dtype, on twins that share its weights.

Each process computes the unsharded copy whole, by itself, and compares what it has of the sharded one. Nothing waits for a process that
failed: see ``in_step``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fxfuse.checking.runs import Run, coarsest, run
from fxfuse.checking.validate import Example, other_examples
from fxfuse.distributed.in_step import InStep, OutOfStep
from fxfuse.errors import FxfuseError
from fxfuse.fused import accept_any_dtype, regions
from fxfuse.graph import Guard, TensorGuard
from fxfuse.models.held import Kept
from fxfuse.models.inputs import clone_inputs, to_dtype
from fxfuse.models.unregistered import unregistered
from fxfuse.private.pytree import tree_unflatten
from fxfuse.running.entries import FORWARD, Entry
from fxfuse.running.region import RegionState
from fxfuse.running.runtime import walk
from fxfuse.weights.large import COMPARED, LARGE, twin, weight_bytes

from .agreement import Processes
from .apart import apart
from .drawn import Drawn, rows_to_try

KEPT = "the model stays as it was, its lanes are not divided"
_EXAMPLES = 2  # batch sizes per program


@dataclass
class _Case:
    """One call that the unsharded copy answers by its programs, and what it answered."""

    region: str | None  # the path of the region that is called; None: the model
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mode: str
    gradients: bool
    expected: Run
    autocast: tuple[str, torch.dtype] | None = None  # kind of device, and dtype

    def __str__(self) -> str:
        rows = next((value.shape[0] for value in self.args if isinstance(value, torch.Tensor) and value.ndim), None)
        where = "the model" if not self.region else self.region
        return f"{where}{'' if self.name == FORWARD else '.' + self.name}, {self.mode}{'' if rows is None else f', {rows} rows'}"


class Rehearsal:
    """``shard`` shards a fused model, in place, without anything that the processes would have to do together."""

    def __init__(self, fused: nn.Module, shard: Callable[[nn.Module], None], processes: Processes, lanes: Any) -> None:
        self.fused, self.shard, self.processes, self.lanes = fused, shard, processes, lanes
        self.large = weight_bytes(fused) > LARGE

    def sentences(self, example: Example | None) -> list[str]:
        """What was compared. Raises ``FxfuseError``, on every process, where sharded and unsharded differ."""
        said = ""
        for wide in (True, False) if not self.large else (False,):
            found = self._tried(example, wide, autocast=False)
            if isinstance(found, list):
                return [*found, *self._under_autocast()]
            said = said or found
        return [f"not compared with the unsharded model as a whole, only op by op ({said}): give example_inputs", *self._under_autocast()]

    def _under_autocast(self) -> list[str]:
        if not any(program.guard.autocast for state in regions(self.fused).values() for program in state.plan.all_programs()):
            return []
        found = self._tried(None, False, autocast=True)
        return found if isinstance(found, list) else [f"under autocast compared op by op only ({found})"]

    def _tried(self, example: Example | None, wide: bool, autocast: bool) -> list[str] | str:
        """What was compared, or why nothing can be. Raises ``FxfuseError`` where something differs."""
        cases: list[_Case] = []
        missing: list[str] = []
        error = ""
        try:
            one = self._copy(wide)
            if wide:
                accept_any_dtype(one)
            cases, missing = self._cases(one, example, wide, autocast)
        except Exception as raised:  # a model that takes no float64, or that cannot be copied
            error = f"{type(raised).__name__}: {str(raised).partition(chr(10))[0]}"
        # All go on alike, or none does: what one process cannot run, nobody waits for.
        said = self.processes.failure(error)
        same = self.processes.alike(repr([*map(str, cases), missing]))
        if said or not same or not cases or (missing and wide):
            return said or ("; ".join(missing) or "no program could be called" if same else "the processes do not run the same programs")
        self._compared(cases, wide)
        dtype = "under autocast" if autocast else "in float64" if wide else "in the model's dtype"
        return [f"compared with the unsharded model in {len(cases)} calls, {dtype}, before it was kept", *missing]

    def _copy(self, wide: bool) -> nn.Module:
        made = self._copied(wide)
        for state in regions(made).values():  # programs that it would make at a call are none that the sharded model has
            state.plan, state.strict = replace(state.plan, making=None), False
        return made

    def _copied(self, wide: bool) -> nn.Module:
        if self.large:
            made, total = twin(self.fused), 0.0
            for parameter in sorted(made.parameters(), key=torch.Tensor.numel):
                total += parameter.numel() * parameter.element_size()
                parameter.requires_grad_(parameter.requires_grad and total <= COMPARED * weight_bytes(made))
            return made
        made = copy.deepcopy(self.fused)
        if wide:
            for module in [made, *(each for _, each in unregistered(made))]:
                module._apply(_double)  # type: ignore[no-untyped-call]
        return made

    # -- what to call ---------------------------------------------------------------------------------------------------------------------

    def _cases(self, one: nn.Module, example: Example | None, wide: bool, autocast: bool) -> tuple[list[_Case], list[str]]:
        """Calls that the unsharded copy answers by its programs, and what is to be said of programs without one."""
        found: list[_Case] = []
        missing: list[str] = []
        if example is not None:
            for args, kwargs in [example, *other_examples(example)[1:3]]:
                for mode in ("train", "eval"):
                    for gradients in (True, None):  # of the inputs too, where they may ask for them
                        given = clone_inputs(to_dtype((args, kwargs), torch.float64) if wide else (args, kwargs), requires_grad=gradients)
                        case = _answered(one, None, FORWARD, *given, mode)
                        if isinstance(case, _Case):
                            found.append(case)
                            break
        for path, state in regions(one).items():
            for name, flags, guard, spec in _programs(state):
                if (example is not None and name == FORWARD and found) or bool(guard.autocast) is not autocast:
                    continue
                mode = "given" if len(set(flags)) > 1 else "train" if flags[0] else "eval"
                if mode == "given" and flags != state.flags():
                    missing.append(f"{path or 'the model'}: a program for other training flags was not tried")
                    continue
                tries: list[_Case | str] = []
                for seed, rows in enumerate(rows_to_try(guard)):
                    args, kwargs = tree_unflatten(_drawn(guard, rows, seed, wide), spec)
                    tries.append(_answered(one, path, name, args, kwargs, mode, guard.autocast))
                    if sum(isinstance(each, _Case) for each in tries) == _EXAMPLES:
                        break
                found += [each for each in tries if isinstance(each, _Case)]
                if all(isinstance(each, str) for each in tries):
                    where = f"{path or 'the model'}{'' if name == FORWARD else '.' + name}, {mode}"
                    missing.append(f"{where}: not tried as a whole, drawn inputs do not fit ({tries[0]})")
        return found, missing

    # -- the comparison -------------------------------------------------------------------------------------------------------------------

    def _compared(self, cases: Sequence[_Case], wide: bool) -> None:
        two: nn.Module | None = None
        with self.processes.all_or_none():
            two = self._copy(wide)
            self.shard(two)
            if wide:
                accept_any_dtype(two)
        assert two is not None
        steps = InStep(self.lanes, self.processes.device)
        said = ""
        with steps.trial():
            for case in cases:
                try:
                    found = _called(two, case)
                    said = "" if isinstance(found.error, OutOfStep) else _difference(case, found)
                except Exception as error:  # the others are told, whatever it is
                    said = f"{case}: {type(error).__name__}: {error}"
                with suppress(OutOfStep):
                    steps.meet("failed" if said else f"ran {case}")
                if steps.broken or said:
                    break
        told = self.processes.failure(said) or self.processes.failure("the processes call other collectives" if steps.broken else "")
        if told:
            raise FxfuseError(f"{KEPT}: the sharded form differs from the unsharded one: {told}")


def _programs(state: RegionState) -> Iterator[tuple[str, tuple[bool, ...], Guard, Any]]:
    for flags, program in state.plan.programs.items():
        yield FORWARD, flags, state.resolved(program).guard, program.in_spec
    for name, modes in state.plan.methods.items():
        for flags, programs in modes.items():
            for program in programs:
                yield name, flags, state.resolved(program).guard, program.in_spec


def _drawn(guard: Guard, rows: int, seed: int, wide: bool) -> list[Any]:
    values = Drawn(seed, wide).inputs(guard, rows)
    for index, (leaf, value) in enumerate(zip(guard.leaves, values, strict=True)):
        if isinstance(leaf, TensorGuard):
            inexact = value.is_floating_point() or value.is_complex()
            value.requires_grad_(inexact and (True if leaf.requires_grad is None else leaf.requires_grad))
        elif type(value) is Kept:
            values[index] = value.value
    return values


def _answered(
    one: nn.Module, region: str | None, name: str, args: Any, kwargs: Any, mode: str, autocast: tuple[str, torch.dtype] | None = None
) -> _Case | str:
    """The call as a case, or why it is none."""
    case = _Case(region, name, args, kwargs, mode, True, Run(), autocast)
    case.expected = _called(one, case)
    if case.expected.error is not None:
        case.gradients = False
        case.expected = _called(one, case)
    if case.expected.error is not None:
        return f"{type(case.expected.error).__name__}: {str(case.expected.error).partition(chr(10))[0]}"
    if case.expected.fallbacks:
        return next(iter(case.expected.fallbacks))
    return case


def _called(model: nn.Module, case: _Case) -> Run:
    called: nn.Module = model if case.region is None else walk(model, case.region)
    root = Entry(case.name, (), {}).root(called)
    kind, dtype = case.autocast or ("cpu", torch.bfloat16)
    with torch.autocast(kind, dtype=dtype) if case.autocast else nullcontext():
        return run(
        root, case.args, case.kwargs, mode=case.mode, gradients=case.gradients, requires_grad=None,
        cotangents=coarsest((case.args, case.kwargs), model),
    )  # fmt: skip


def _difference(case: _Case, found: Run) -> str:
    """How the sharded model differs in a call, in a sentence; empty where it does not."""
    if found.error is not None:
        return f"{case}: {type(found.error).__name__}: {str(found.error).partition(chr(10))[0]}"
    if found.fallbacks:
        return f"{case}: it runs its loop: {next(iter(found.fallbacks))}"
    worst = apart(case.expected, found)
    return f"{case}: {worst}" if worst else ""


def _double(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.to(torch.float64) if tensor.is_floating_point() else tensor
