"""What a forward changes outside of its model: random generators of Python and numpy, and globals.

Comes in: a model about to run, and its run. Goes out: what the run changed, each with a sentence and the line; no graph repeats it, and a
second recording need not show it, as a choice by chance may fall out alike. Tensors and attributes are the recorder's business, torch's own
generators too: what they give reaches Python through a read of data.
"""

from __future__ import annotations

import dis
import functools
import os
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FrameType, FunctionType
from typing import Any

from torch import nn

from fxfuse.graph import Place
from fxfuse.models.module_tree import all_modules

_PLAIN = (int, float, complex, str, bytes, type(None))
_NOT_THE_USERS = frozenset({"torch", "builtins", "fxfuse", "typing", "abc"})
_MOST_ITEMS = 10_000
_SOURCES = {"Random": "random", "RandomState": "numpy.random", "Generator": "numpy.random"}


@dataclass(frozen=True)
class Change:
    """Something that a run changed: ``kind`` is a class whose modules do so (None: ``module`` alone)."""

    reason: str
    place: Place | None
    kind: type | None = None
    module: nn.Module | None = None


# -- random generators ----------------------------------------------------------------------------------------------------------------


def is_generator(value: Any) -> bool:
    """Is this a random generator of Python's or numpy's? (torch's draw tensors, which are seen.)"""
    return isinstance(value, random.Random) or (
        type(value).__module__.startswith("numpy.random") and type(value).__name__ in ("RandomState", "Generator")
    )


@dataclass
class Generators:
    """The generators that a forward may draw from: the global ones, and those that modules hold."""

    held: list[Any]

    def states(self) -> list[tuple[str, Any]]:
        """The state of each, comparable, with what it is called."""
        found: list[tuple[str, Any]] = [("random", random.getstate())]
        numpy_random = getattr(sys.modules.get("numpy"), "random", None)
        if numpy_random is not None:
            found.append(("numpy.random", _comparable(numpy_random.get_state(legacy=False))))
        return [*found, *((_SOURCES.get(type(each).__name__, "random"), _comparable(_state(each))) for each in self.held)]

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Put those that modules hold back on leaving."""
        before = [_state(each) for each in self.held]
        try:
            yield
        finally:
            for each, state in zip(self.held, before, strict=True):
                _restore(each, state)


def _state(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.get_state(legacy=False) if hasattr(generator, "get_state") else generator.bit_generator.state


def _restore(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "set_state"):
        generator.set_state(state)
    else:
        generator.bit_generator.state = state


def _comparable(state: Any) -> Any:
    return repr(_lists(state)) if isinstance(state, dict) else state


def _lists(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _lists(value) for key, value in state.items()}
    return state.tobytes() if hasattr(state, "tobytes") else state


def draws_itself(file: str) -> bool:
    """Is this source of Python's or numpy's random numbers? The line that counts is that of whoever calls it."""
    return file == random.__file__ or f"{os.sep}numpy{os.sep}" in file


def drawing(generators: Generators, internal: Callable[[str], bool], call: Callable[[], object]) -> list[Change]:
    """Run ``call`` line by line and say in which lines generators moved. ``internal``: files that are not the user's."""
    last: list[Any] = [generators.states(), None, None]  # the states, the line that runs now, and whose forward it is in
    found: dict[tuple[Place | None, str], Change] = {}

    def look() -> None:
        states, place, module = last
        now = generators.states()
        for (name, one), (_, other) in zip(states, now, strict=True):
            if one != other:
                reason = f"draws random numbers outside of torch ({name})"
                found.setdefault((place, reason), Change(reason, place, None, module))
        last[0] = now

    def step(frame: FrameType, event: str, arg: Any) -> Any:
        if internal(frame.f_code.co_filename):
            return None
        look()
        at: FrameType | None = frame.f_back if event == "return" else frame
        if at is not None and not internal(at.f_code.co_filename):
            last[1], last[2] = Place(at.f_code.co_filename, at.f_lineno), _owner(at)
        return step

    before = sys.gettrace()
    sys.settrace(step)
    try:
        call()
    finally:
        sys.settrace(before)
        look()
    return list(found.values())


def _owner(frame: FrameType | None) -> nn.Module | None:
    """The module whose method runs: that of the innermost frame with a ``self`` that is one."""
    while frame is not None:
        held = frame.f_locals.get("self")
        if isinstance(held, nn.Module):
            return held
        frame = frame.f_back
    return None


# -- globals --------------------------------------------------------------------------------------------------------------------------


@dataclass
class _Held:
    """A global, or an attribute of a class, as it was."""

    space: Any  # the dict, or mapping, in which it lies
    name: str
    value: Any
    items: Any  # of a container
    kind: type  # the class whose code names it
    owner: type  # the class whose attribute it is, if it is one
    place: Place

    def changed(self) -> bool:
        now = self.space.get(self.name)
        if now is not self.value:
            return not (type(now) is type(self.value) and isinstance(now, _PLAIN) and now == self.value)
        return self.items is not None and not _same(self.items, _items(now))


def _items(value: Any) -> Any:
    if isinstance(value, dict):
        return [*value.keys()], [*value.values()]
    return [*value]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple):
        return all(_same(a, b) for a, b in zip(one, other, strict=True))

    def alike(a: Any, b: Any) -> bool:
        return a is b or (type(a) is type(b) and isinstance(a, _PLAIN) and bool(a == b))

    return len(one) == len(other) and all(map(alike, one, other))


class Globals:
    """Numbers, strings and containers that the code of a model's classes names: globals, and attributes of the classes."""

    def __init__(self, model: nn.Module) -> None:
        self.held: list[_Held] = []
        seen: set[tuple[int, str]] = set()
        for kind in dict.fromkeys(type(module) for module in all_modules(model)):
            for space, name, owner, place in _named(kind):  # type: ignore[arg-type]  # classes are hashable
                value = space.get(name)
                container = isinstance(value, (list, dict, set, deque))
                at = id(space.cell) if isinstance(space, Cell) else id(space)
                if (at, name) in seen or not (container or isinstance(value, _PLAIN)) or (container and len(value) > _MOST_ITEMS):
                    continue
                seen.add((at, name))
                self.held.append(_Held(space, name, value, _items(value) if container else None, kind, owner, place))

    def changes(self) -> list[Change]:
        """What is not as it was."""
        return [
            Change(f"forward changes {_said(held)}", held.place, held.kind) for held in self.held if held.changed()
        ]

    def restore(self) -> None:
        """Put back what can be: what a forward changes at every call, it changes when it is called."""
        for held in self.held:
            if not held.changed():
                continue
            if isinstance(held.space, dict):
                held.space[held.name] = held.value
            elif isinstance(held.space, Cell):
                held.space.cell.cell_contents = held.value
            else:
                setattr(held.owner, held.name, held.value)
            if held.items is not None:
                held.value.clear()
                if isinstance(held.value, dict):
                    held.value.update(zip(*held.items, strict=True))
                else:
                    getattr(held.value, "update" if isinstance(held.value, set) else "extend")(held.items)


def _said(held: _Held) -> str:
    if isinstance(held.space, dict):
        return f"the global {held.name}"
    return f"{held.name} of an outer function" if isinstance(held.space, Cell) else f"{held.owner.__name__}.{held.name}"


@dataclass(frozen=True)
class Cell:
    """A variable of an outer function, looked up as in a dict."""

    cell: Any

    def get(self, name: str, default: Any = None) -> Any:
        """Its value, or ``default`` where it is not bound."""
        try:
            return self.cell.cell_contents
        except ValueError:
            return default

    def __getitem__(self, name: str) -> Any:
        return self.cell.cell_contents


def line_of_attribute(module: nn.Module, name: str) -> Place | None:
    """The last line of the module's own methods that names this attribute: where it is changed, mostly."""
    for base in type(module).__mro__:
        if base.__module__.partition(".")[0] in _NOT_THE_USERS:
            continue
        codes = [function.__code__ for value in vars(base).values() if (function := function_of(value)) is not None]
        codes.sort(key=lambda code: code.co_name in ("__init__", "reset_parameters"))
        while codes:
            code = codes.pop(0)
            line = dict(_lines(code)).get(name)
            if line is not None and code.co_name != "__init__":
                return Place(code.co_filename, line)
            codes.extend(constant for constant in code.co_consts if isinstance(constant, CodeType))
    return None


@functools.cache
def _named(kind: type) -> tuple[tuple[Any, str, type, Place], ...]:
    """What the methods of a class, torch's own aside, name outside of themselves: where it lies, its name, a line that names it."""
    found: dict[tuple[int, str], tuple[Any, str, type, Place]] = {}
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] in _NOT_THE_USERS:
            continue
        functions = [function for value in vars(base).values() if (function := function_of(value)) is not None]
        done: set[CodeType] = set()
        while functions:
            function = functions.pop()
            space = function.__globals__
            codes = [function.__code__]
            for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
                line = dict(_lines(function.__code__)).get(name, function.__code__.co_firstlineno)
                found.setdefault((id(cell), name), (Cell(cell), name, base, Place(function.__code__.co_filename, line)))
            while codes:
                code = codes.pop()
                if code in done or len(done) > 200:
                    continue
                done.add(code)
                codes.extend(constant for constant in code.co_consts if isinstance(constant, CodeType))
                for name, line in _lines(code):
                    place = Place(code.co_filename, line)
                    inner = function_of(space.get(name))
                    if inner is not None and inner.__globals__ is space:
                        functions.append(inner)
                    if name in space:
                        found.setdefault((id(space), name), (space, name, base, place))
                    if name in vars(base):
                        found.setdefault((id(base), name), (vars(base), name, base, place))
    return tuple(found.values())


def function_of(value: Any) -> FunctionType | None:
    """The function of a method, a property or a static method; None for anything else."""
    value = getattr(value, "__func__", getattr(value, "fget", value))
    return value if isinstance(value, FunctionType) else None


def _lines(code: CodeType) -> Iterator[tuple[str, int]]:
    """The names that code reads, sets or looks up as attributes, each with its last line: where it is changed, mostly."""
    line, found = code.co_firstlineno, {}
    names = {*code.co_names, *code.co_freevars}
    for instruction in dis.get_instructions(code):
        start = getattr(instruction, "line_number", None) or instruction.starts_line
        line = start if type(start) is int else line
        if isinstance(instruction.argval, str) and instruction.argval in names:
            found[instruction.argval] = line
    yield from found.items()
