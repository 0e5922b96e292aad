"""Source text of generated classes: what ``__init__`` makes, and what ``forward`` says line by line.

``Scope`` is where the body of a lane writes its lines: into a class of its own (``class Lane``: ``self.m1``), or into the loop of the class
around it (``self.m1[i]``).
"""

from __future__ import annotations

import itertools
import math
import textwrap
from dataclasses import dataclass, field

Shape = tuple[int, ...]


@dataclass
class Program:
    """The classes of one model, in the order in which they are to be defined."""

    classes: list[str] = field(default_factory=list)
    numbers: itertools.count[int] = field(default_factory=itertools.count)
    random: bool = False  # training draws random numbers: only eval mode can be compared

    def fresh(self, stem: str) -> str:
        return f"{stem}{next(self.numbers)}"

    def define(self, name: str, arguments: str, scope: Scope, forward: str = "self, h", result: str = "return h") -> None:
        """A class whose ``__init__`` and ``forward`` hold what ``scope`` collected."""
        init = ["super().__init__()", *scope.init]
        if "common" not in arguments and any("common" in line for line in init):
            init.insert(1, "common = {}")
        self.classes.append(
            f"class {name}(nn.Module):\n"
            f"    def __init__({arguments}):\n{textwrap.indent(chr(10).join(init), ' ' * 8)}\n\n"
            f"    def forward({forward}):\n{textwrap.indent(chr(10).join([*scope.lines, result]), ' ' * 8)}\n"
        )


@dataclass
class Scope:
    """``lanes``: how many lanes hold their parts in lists of this class, indexed by ``index``; 0 in a class of the lane's own."""

    program: Program
    index: str = "self.index"
    lanes: int = 0
    init: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    indent: int = 0

    def write(self, line: str) -> None:
        self.lines.append("    " * self.indent + line)

    def inner(self, index: str, lanes: int) -> Scope:
        """The body of a loop of this class, whose lanes hold their parts here."""
        return Scope(self.program, index, lanes, self.init, self.lines, self.indent + 1)

    def module(self, made: str) -> str:
        """A module per lane; the expression that reads it."""
        return self._hold("m", made, "nn.ModuleList")

    def parameter(self, made: str) -> str:
        return self._hold("p", f"nn.Parameter({made})", "nn.ParameterList")

    def shared(self, made: str) -> str:
        """A Parameter that all lanes have in common."""
        name = self.program.fresh("p")
        self.init.append(
            f"self.{name} = nn.Parameter({made})" if self.lanes else f"self.{name} = common.setdefault({name!r}, nn.Parameter({made}))"
        )
        return f"self.{name}"

    def buffer(self, made: str) -> str:
        name = self.program.fresh("b")
        if not self.lanes:
            self.init.append(f"self.register_buffer({name!r}, {made})")
            return f"self.{name}"
        key = f'f"{name}_{{{self.index}}}"'
        self.init += [f"for {self.index} in range({self.lanes}):", f"    self.register_buffer({key}, {made})"]
        return f"getattr(self, {key})"

    def _hold(self, stem: str, made: str, container: str) -> str:
        name = self.program.fresh(stem)
        if not self.lanes:
            self.init.append(f"self.{name} = {made}")
            return f"self.{name}"
        self.init.append(f"self.{name} = {container}({made} for {self.index} in range({self.lanes}))")
        return f"self.{name}[{self.index}]"


def fit(scope: Scope, shape: Shape, target: Shape) -> None:
    """Lines that bring ``h`` from rows of ``shape`` to rows of ``target``: any model can be put together, whatever its parts."""
    if shape == target:
        return
    have, want = math.prod(shape), math.prod(target)
    if not shape:
        scope.write("h = h.unsqueeze(1)")
    elif len(shape) > 1:
        scope.write("h = h.flatten(1)")
    if want > have:
        scope.write(f"h = h.repeat(1, {-(-want // have)})" + (f"[:, :{want}]" if want % have else ""))
    elif want < have:
        scope.write(f"h = h[:, :{want}]")
    if not target:
        scope.write("h = h.squeeze(1)")
    elif len(target) > 1:
        scope.write(f"h = h.unflatten(1, {target})")
