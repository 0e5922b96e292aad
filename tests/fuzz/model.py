"""From a case to a model: its source, the class that the source defines, an instance with numbers that no two lanes share."""

from __future__ import annotations

import functools
import hashlib
import linecache
import math
import sys
import types
from dataclasses import dataclass
from typing import Any

import torch
from rule_samples import SAMPLES
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from . import bodies, inputs, parts, structure
from .joins import JOINS
from .loops import fork_of, write_loop
from .source import Program, Scope, Shape, fit

DTYPES = {**{name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "complex128")}, "int64": torch.float64}
EXAMPLE = 0  # the seed of the inputs that fxfuse is shown


@dataclass
class Made:
    """A case's class and what its inputs look like."""

    case: dict[str, Any]
    text: str
    module: types.ModuleType
    shape: Shape
    random: bool

    def model(self) -> nn.Module:
        """An instance: the same numbers each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.case["seed"])
            previous = torch.get_default_dtype()
            torch.set_default_dtype(torch.float64)
            try:
                model: nn.Module = self.module.Model()
                _unlike(model)
            finally:
                torch.set_default_dtype(previous)
        model = model.to(DTYPES[self.case["inputs"]["dtype"]])
        for change in self.case["changes"]:
            structure.change(model, *change)
        return model

    def arguments(self, rows: int | None = None, seed: int = EXAMPLE, dtype: torch.dtype | None = None) -> tuple[Any, dict[str, Any]]:
        """``(args, kwargs)`` of a call."""
        given = self.case["inputs"]["rows"] if rows is None else rows
        return inputs.arguments(self.case, self.shape, self.case["loop"]["lanes"], given, seed, dtype)


def build(case: dict[str, Any]) -> Made:
    """Write and define the case's classes. Raises what torch raises where the parts do not fit together."""
    text, shape, random = source(case)
    name = f"fuzzed_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    module = types.ModuleType(name)
    space = {
        "torch": torch, "F": functional, "nn": nn, "math": math, "functools": functools, "SAMPLES": SAMPLES, "checkpoint": checkpoint,
        "halved": lambda layer: nn.utils.parametrizations.parametrize.register_parametrization(layer, "weight", parts.Halved()),
        **{key: value for key, value in vars(parts).items() if not key.startswith("_")},
    }  # fmt: skip
    vars(module).update(space)
    file = f"{name}.py"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    exec(compile(text, file, "exec"), vars(module))
    sys.modules[name] = module  # where pickle looks for the class
    return Made(case, text, module, shape, random)


def discard(made: Made) -> None:
    """Forget the classes."""
    sys.modules.pop(made.module.__name__, None)
    linecache.cache.pop(f"{made.module.__name__}.py", None)


def source(case: dict[str, Any]) -> tuple[str, Shape, bool]:
    """The source of the case's classes, the shape of a row of the model's input, and whether training draws random numbers."""
    program = Program()
    scope, loop, given = Scope(program, index="1"), case["loop"], case["inputs"]
    container = given["container"]
    shape = fork_of(loop, container).shape
    current = shape
    if given["dtype"] == "int64":
        scope.write(_each("{}.double() / 2", container))
    if not container:
        current = bodies.write(scope, current, case["before"])
    if case["again"]:
        scope.write("given = h")
    result = write_loop(scope, current, loop, container)
    other = JOINS[loop["join"]].shape == "other"
    if case["again"] == "same" and not container:  # the same modules, called a second time
        again = list(scope.lines)
        start = again.index("given = h")
        scope.lines += ["first = h", "h = given * 0.5", *again[start + 1 :], "h = (first, h)"]
        other = True
    elif case["again"] == "second" and not container:
        scope.write("first = h")
        scope.write("h = given")
        write_loop(scope, current, {**loop, "join": "list"})
        scope.write("h = (first, h)")
        other = True
    elif case["again"] == "outside" and not other and not container:
        extra = scope.module(f"nn.Linear({math.prod(current)}, {result[-1]})")
        scope.write("first = h")
        scope.write("h = given")
        fit(scope, current, (math.prod(current),))
        scope.write(f"h = (first, {extra}(h))")
        other = True
    if not other:
        bodies.write(scope, result, case["after"])
    arguments = "self, h"
    if inputs.has_optional(given):
        arguments += ", z=None"
        part = "real" if given["dtype"] == "complex128" else "double()" if given["dtype"] == "int64" else "tanh()"
        times = _each(f"{{}} * (1 + z.{part}).view(-1, *[1] * {len(shape)})", container)
        scope.lines[:0] = ["if z is not None:", f"    {times}"]
    program.define("Model", "self", scope, arguments)
    return "\n\n".join(program.classes), shape, program.random


def _each(expression: str, container: str) -> str:
    """``h`` with the expression done to each of its tensors."""
    if container == "list":
        return f"h = [{expression.format('x')} for x in h]"
    if container == "dict":
        return f"h = {{name: {expression.format('x')} for name, x in h.items()}}"
    return f"h = {expression.format('h')}"


def _unlike(model: nn.Module) -> None:
    """Numbers of their own for whatever begins as ones or zeros: scales, biases, running statistics, counters."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(torch.randn_like(parameter) * 0.3)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(torch.rand_like(buffer) + 0.5)
            elif name.endswith("num_batches_tracked"):
                buffer.copy_(torch.randint(9, ()))
