"""Measured side by side: the loop, the fused model, ``vmap`` where possible, ``torch.compile``: time, launches and memory.

Comes in: a model with an example call. Goes out: ``Bench``; its table on a screen.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import fxfuse
from fxfuse.checking.runs import named_leaves
from fxfuse.errors import FxfuseError
from fxfuse.launches import count
from fxfuse.models.inputs import clone_inputs
from fxfuse.planning.memory import peak_bytes
from fxfuse.planning.timing import medians

from .by_vmap import NotPossible, by_vmap, flat_call
from .compare import compare, expected
from .failure import said
from .fusing import fuse, nothing_fused
from .options import Asked
from .prepare import Subject, described
from .screen import Screen, Stage
from .specs import Call

ORDER = ("loop", "fused", "vmap", "torch.compile")
COLUMNS = ["", "median", "speed", "launches", "matmul-like", "peak memory", "difference"]


@dataclass
class Candidate:
    """One way to compute the model, measured; ``why`` says why it could not be."""

    name: str
    seconds: float | None = None
    launches: int | None = None
    heavy: int | None = None
    peak_bytes: int | None = None
    max_rel: float | None = None
    why: str = ""


@dataclass
class Bench:
    """What was measured: ``rows`` in the order loop, fused, vmap, torch.compile."""

    what: str
    rows: list[Candidate]
    report: fxfuse.Report

    def to_dict(self) -> dict[str, Any]:
        """Data for ``json.dumps``."""
        return {"measured": self.what, "candidates": [asdict(row) for row in self.rows], "report": self.report.to_dict()}


def measure(subject: Subject, asked: Asked, *, seconds: float, without: tuple[str, ...], stage: Stage) -> Bench:
    """Make the candidates, see that each computes the model's numbers, and time them in turn."""
    stage("fusing")
    fused = fuse(subject, asked)
    report = fxfuse.report(fused)
    runs: dict[str, tuple[Callable[..., Any], Call]] = {"loop": (subject.model, subject.call), "fused": (fused, subject.call)}
    why: dict[str, str] = {}
    if not report.fused:
        why["fused"] = nothing_fused(report)
    if "vmap" not in without:
        stage("rewriting with vmap")
        try:
            runs["vmap"] = by_vmap(subject.model, subject.call), (tuple(flat_call(subject.call)), {})
        except NotPossible as error:
            why["vmap"] = f"not possible: {error}"
        except Exception as error:
            why["vmap"] = f"not possible: {said(error)}"
    if "compile" not in without:
        stage("compiling")
        compiled = compiled_model(subject, asked)
        if isinstance(compiled, str):
            why["torch.compile"] = compiled
        else:
            runs["torch.compile"] = compiled, subject.call
    train = asked.mode == "train"
    wanted = expected(subject.model, [subject.call], seed=asked.seed)
    rows = {name: Candidate(name, why=why.get(name, "")) for name in ORDER if name in {*runs, *why}}
    steps: dict[str, Callable[[], object]] = {}
    for name, (model, call) in runs.items():
        stage(f"checking {name}")
        result = compare([replace(wanted[0], call=call)], model, seed=asked.seed)
        rows[name].max_rel = max((row.max_rel for row in result.rows if math.isfinite(row.max_rel)), default=None)
        if not result.ok:
            rows[name].why = f"left out, it computes something else: {result.sentence()}"
            continue
        step = one_step(model, call, train)
        rows[name].peak_bytes = _peak(step, asked.device)
        if name != "torch.compile":  # what is inside of its kernels cannot be counted
            launched = count(step, bound=False)
            rows[name].launches, rows[name].heavy = launched.total, launched.heavy
        steps[name] = step
    stage("timing")
    for name, median in zip(steps, medians(list(steps.values()), budget=seconds, most=100_000), strict=True):
        rows[name].seconds = median
    what = f"{'forward and backward' if train else 'forward'} of {subject.name} at {described(subject.call)} on {asked.device}"
    return Bench(f"{what}, {torch.get_num_threads()} threads, torch {torch.__version__}", list(rows.values()), report)


def compiled_model(subject: Subject, asked: Asked) -> Callable[..., Any] | str:
    """``torch.compile`` of a copy, compiled by one step; or why that is not possible."""
    try:
        compiled = torch.compile(copy.deepcopy(subject.model))
        one_step(compiled, subject.call, asked.mode == "train")()
        with torch.no_grad():
            compiled(*subject.call[0], **subject.call[1])
    except Exception as error:
        return f"not possible: {said(error)}"
    return compiled


def one_step(model: Callable[..., Any], call: Call, train: bool) -> Callable[[], object]:
    """What is timed: a forward without gradients, or a forward and the gradients of all parameters."""
    args, kwargs = call

    def infer() -> object:
        with torch.no_grad():
            return model(*args, **kwargs)

    if not train:
        return infer
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    args, kwargs = clone_inputs(call, requires_grad=False)

    def step() -> None:
        out = model(*args, **kwargs)
        ends = [leaf for _, leaf in named_leaves(out, "") if isinstance(leaf, Tensor) and leaf.requires_grad]
        torch.autograd.backward(ends, [torch.ones_like(end) for end in ends])
        for parameter in parameters:  # after, not before: each step frees what it took
            parameter.grad = None

    return step


def _peak(step: Callable[[], object], device: str) -> int | None:
    try:
        return peak_bytes(step, device=device)
    except (FxfuseError, RuntimeError):  # somebody's profiler is on
        return None


def show(screen: Screen, found: Bench) -> None:
    """The table, and beneath it what could not be measured."""
    loop = next(row.seconds for row in found.rows if row.name == "loop")
    rows = []
    for row in found.rows:
        if row.seconds is None:
            continue
        speed = f"{loop / row.seconds:.2f}x" if loop else "-"
        counts = [_number(row.launches), _number(row.heavy), _bytes(row.peak_bytes)]
        rows.append([row.name, _time(row.seconds), speed, *counts, _difference(row)])
    screen.table(COLUMNS, rows, title=found.what)
    for row in found.rows:
        if row.why:
            screen.text(f"{row.name}: {row.why}")


def _difference(row: Candidate) -> str:
    return "-" if row.max_rel is None or row.name == "loop" else f"{row.max_rel:.1e}"


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} us" if seconds < 1e-2 else f"{seconds * 1e3:,.1f} ms" if seconds < 10 else f"{seconds:,.1f} s"


def _bytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1024:,.1f} KiB" if value < 1 << 20 else f"{value / (1 << 20):,.1f} MiB"
