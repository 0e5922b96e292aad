"""A loop over lanes: fork, body, join, and what makes one lane unlike the others.

``{"lanes": 3, "shape": [2], "fork": "slice", "join": "cat", "body": [...], "style": "for", "odd": None, "chain": False}``. ``style``: how
the loop is written and where its modules are held; ``odd``: ``[lane, steps]``, a lane with another body; ``chain``: each lane also
reads the one before.
"""

from __future__ import annotations

import math
from typing import Any

from hypothesis import strategies as st

from . import bodies
from .forks import CONTAINERS, FORKS, Fork
from .joins import JOINS, TENSORS, joined_shape
from .source import Scope, Shape, fit

MOST = 64  # numbers in a row of a lane's result
# "inline": the lanes' layers are held by the class of the loop; the others have a class of their own for a lane.
STYLES = ("for", "inline", "comprehension", "zip", "dict", "attributes", "list", "map")


def fork_of(loop: dict[str, Any], container: str = "") -> Fork:
    """The loop's fork; ``container``: the model's input has an entry for each lane."""
    shape = tuple(loop["shape"])
    return Fork(shape, CONTAINERS[container]) if container else FORKS[loop["fork"]](shape, loop["lanes"])


def write_loop(scope: Scope, shape: Shape, loop: dict[str, Any], container: str = "") -> Shape:
    """The loop, in a class's own scope, over rows of ``shape`` (of a container's entries); the shape of the joined rows."""
    join, i = JOINS[loop["join"]], scope.program.fresh("i")
    fork = fork_of(loop, container)
    if not container:
        fit(scope, shape, fork.shape)
    if fork.line:
        scope.write(fork.line)
    lane_shape = tuple(loop["shape"])
    if not container and loop["fork"] == "joined":
        lane_shape = (*lane_shape[:-1], 2 * lane_shape[-1])
    if loop["chain"]:
        scope.write("y = 0")
    written = _inline if loop["style"] == "inline" else _of_modules
    lines, result = written(scope, lane_shape, loop, i, fork.expression.format(i=i))
    one = {"": "h", "dict": 'h["f0"]'}.get(container, "h[0]")
    words = {"i": i, "g": loop["lanes"], "t": result[0], "rest": "".join(f", {n}" for n in result[1:]), "x": one}
    if join.before:
        scope.write(_filled(join.before, words))
        lines.append(f"    {_filled(join.inside, words)}")
    elif lines[0].startswith("for"):
        scope.write("ys = []")
        lines.append("    ys.append(y)")
    scope.lines += lines
    if loop["style"] == "inline":
        scope.write(f"h = x{i}")
    scope.write(_filled(join.after, words))
    return joined_shape(join, result, loop["lanes"])


def _filled(line: str, words: dict[str, Any]) -> str:
    for word, value in words.items():
        line = line.replace(f"{{{word}}}", str(value))
    return line


def _inline(scope: Scope, shape: Shape, loop: dict[str, Any], i: str, given: str) -> tuple[list[str], Shape]:
    """The loop up to ``y``, its layers held in lists; ``h`` is the lanes' input under another name."""
    scope.write(f"x{i} = h")
    body = scope.inner(i, loop["lanes"])
    body.lines = []
    body.write(f"h = {given}")
    if loop["chain"]:
        body.write("h = h + y")
    result = _body(body, shape, loop["body"], shape if loop["chain"] else None)
    body.write("y = h")
    if loop["odd"]:
        lane, steps = loop["odd"]
        body.write(f"if {i} == {lane}:")
        body.write("    continue" if not steps and "total" in JOINS[loop["join"]].before else "    y = y.tanh()")
    return [f"for {i} in range({loop['lanes']}):", f"    h = x{i}", *body.lines], result


def _of_modules(scope: Scope, shape: Shape, loop: dict[str, Any], i: str, given: str) -> tuple[list[str], Shape]:
    """The loop up to ``y``, or to all ``ys``, over modules, one for each lane."""
    program, style, lanes = scope.program, loop["style"], loop["lanes"]
    name, result = _lane_class(scope, shape, loop["body"], shape if loop["chain"] else None)
    made = f"{name}({i}, common)"
    if loop["odd"]:
        other, _ = _lane_class(scope, shape, loop["odd"][1], result)
        made = f"({other} if {i} == {loop['odd'][0]} else {name})({i}, common)"
    held, numbers = program.fresh("nets"), f"for {i} in range({lanes})"
    whole = not loop["chain"] and not JOINS[loop["join"]].before  # the results can be one list
    given = f"{given} + y" if loop["chain"] else given
    net = f"self.{held}[{i}]"
    if style == "dict":
        scope.init.append(f'self.{held} = nn.ModuleDict({{f"n{{{i}}}": {made} {numbers}}})')
        return [f"for {i}, net in enumerate(self.{held}.values()):", f"    y = net({given})"], result
    if style == "attributes":
        scope.init += [f"{numbers}:", f'    setattr(self, f"{held}_{{{i}}}", {made})']
        net = f'getattr(self, f"{held}_{{{i}}}")'
    else:
        scope.init.append(f"self.{held} = {f'[{made} {numbers}]' if style == 'list' else f'nn.ModuleList({made} {numbers})'}")
    if style == "comprehension" and whole:
        return [f"ys = [net({given}) for {i}, net in enumerate(self.{held})]"], result
    if style == "map" and whole:
        return [f"ys = list(map(lambda net, {i}: net({given}), self.{held}, range({lanes})))"], result
    if style == "zip":
        scope.write(f"given = [{given.removesuffix(' + y')} {numbers}]")
        part = "part + y" if loop["chain"] else "part"
        return [f"for {i}, (net, part) in enumerate(zip(self.{held}, given)):", f"    y = net({part})"], result
    return [f"{numbers}:", f"    y = {net}({given})"], result


def _body(scope: Scope, shape: Shape, steps: list[Any], wanted: Shape | None) -> Shape:
    """A lane's lines: to the shape that is ``wanted``, else of at least one dim, and cut where it has become large."""
    shape = bodies.write(scope, shape, steps)
    if wanted is None:
        wanted = shape if shape and math.prod(shape) <= MOST else (min(math.prod(shape), 6),)
    fit(scope, shape, wanted)
    return wanted


def _lane_class(scope: Scope, shape: Shape, steps: list[Any], wanted: Shape | None) -> tuple[str, Shape]:
    lane = Scope(scope.program, init=["self.index = index"])
    result = _body(lane, shape, steps, wanted)
    name = scope.program.fresh("Lane")
    scope.program.define(name, "self, index, common", lane)
    return name, result


def loop_class(scope: Scope, shape: Shape, loop: dict[str, Any]) -> tuple[str, Shape]:
    """A class that holds the loop, for rows of that shape: how it is made, and the shape of what it returns."""
    inner = Scope(scope.program, index="1")
    result = write_loop(inner, shape, loop)
    name = scope.program.fresh("Loop")
    scope.program.define(name, "self", inner)
    return f"{name}()", result


def loops(depth: int = 1, inner: bool = False) -> st.SearchStrategy[dict[str, Any]]:
    """Loops; ``inner``: inside of a lane, where they must give a tensor."""
    matrices = st.tuples(st.integers(1, 3), st.integers(2, 4)).map(list)
    shapes = st.one_of(st.integers(1, 4).map(lambda n: [n]), st.integers(1, 3).map(lambda n: [n]), matrices, st.just([2, 4, 4]))
    return st.fixed_dictionaries({
        "lanes": st.integers(2, 3 if inner else 5),
        "shape": shapes,
        "fork": st.sampled_from(list(FORKS)),
        "join": st.sampled_from(TENSORS if inner else list(JOINS)),
        "body": bodies.bodies(depth),
        "style": st.sampled_from(STYLES),
        "odd": st.one_of(st.none(), st.none(), st.none(), st.tuples(st.integers(0, 4), st.one_of(st.just([]), bodies.bodies(0))).map(list)),
        "chain": st.sampled_from([False] * 9 + [True]),
    })  # fmt: skip
