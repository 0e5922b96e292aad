"""What a forward read that no guard of its arguments sees: globals, attributes of classes, what lies in configurations and lists.

Comes in: the code that ran in a region while it was recorded (``ran.Ran``), and the region's modules. Goes out: ``Piece``s, snapshots of
one holder each, and ``Around``, a generated function that compares them with what is there now. Where something was changed since, a
recorded program would go on with what was; the call runs the original forward, for as long as that is so.

A name counts that the code which ran spells: ``self.config.scale`` makes ``scale`` count in the object ``config``. Where code asks by names
that it computes (``getattr``, ``vars``), all attributes of such objects count. Tensors and modules are watched elsewhere.
"""

from __future__ import annotations

import operator
import os
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from fxfuse.graph import Program
from fxfuse.recording.outside import Cell, function_of
from fxfuse.recording.own_fields import books_of, of_own_fields
from fxfuse.recording.ran import Ran, of_library

from .runtime import walk

_PLAIN = frozenset((int, float, bool, str, bytes, complex, type(None), type(Ellipsis), slice, range, torch.dtype, torch.device, torch.Size))
_CLOSED = (torch.Tensor, nn.Module, types.ModuleType, types.BuiltinFunctionType, torch.Generator)
_COMPUTED = frozenset(("getattr", "hasattr", "vars", "__dict__", "eval", "exec", "globals", "operator", "attrgetter"))
_MOST = 2000  # objects that are looked into
_LARGE = 10_000  # items of a container; of a larger one only their number counts
_BYTES = 4096  # of an array; a larger one is not compared
_SET_BY_TORCH = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")  # in the environment, when its compiler is first imported
_MISSING: Any = object()


@dataclass
class Piece:
    """What one thing held: the values of some ``names`` in it, or all that is in it (``names`` is None)."""

    said: str
    thing: Any  # a container, an object, a class, an array, a dict of globals, a cell
    names: tuple[str, ...] | None
    values: Any
    attributes: bool = False  # of an object, not the items of a container
    apart: frozenset[Any] = frozenset()  # names that do not count where ``names`` is None

    def now(self) -> Any:
        """What it holds now, as ``values``."""
        holder = _attributes(self.thing) if self.attributes else self.thing
        if self.names is not None:
            return [holder.get(name, _Gone()) for name in self.names]
        return _items(_without(holder, self.apart))

    def changed(self) -> str:
        """What is another now, in words; empty where nothing is. Equal numbers and strings are as good as the same."""
        now = self.now()
        if self.names is not None:
            for name, one, other in zip(self.names, now, self.values, strict=True):
                if not _same(one, other):
                    return f"{self.said}{name}"
        elif not _same_items(now, self.values):
            return self.said.rstrip(".")
        self.values = now
        return ""


@dataclass(frozen=True)
class _Gone:
    """Stands for a name that is not there; all are equal."""


@dataclass(frozen=True)
class Slots:
    """The attributes of an object without a ``__dict__``, looked up as in one."""

    thing: Any

    def get(self, name: str, default: Any = None) -> Any:
        """The attribute, or ``default``."""
        return getattr(self.thing, name, default)

    def __getitem__(self, name: str) -> Any:
        return getattr(self.thing, name)


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _attributes(thing: Any) -> Any:
    return vars(thing)


def _without(holder: Any, apart: frozenset[Any]) -> Any:
    return {name: value for name, value in holder.items() if name not in apart} if apart else holder


def _items(holder: Any) -> Any:
    if isinstance(holder, dict):
        return [list(dict.keys(holder)), list(dict.values(holder))] if len(holder) <= _LARGE else len(holder)
    if hasattr(holder, "tobytes"):
        return holder.tobytes()
    if len(holder) > _LARGE:
        return len(holder)
    return set(holder) if isinstance(holder, set) else list(holder)


def _same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and (type(one) in _PLAIN or isinstance(one, _Gone)) and bool(one == other))


def _same_items(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same_items, one, other))
    return _same(one, other) or (isinstance(one, set) and one == other)


# -- what to look at --------------------------------------------------------------------------------------------------------------------


@dataclass
class Spelled:
    """The names that the code of a run spells; ``computed``: it also asks by names that it makes up."""

    names: frozenset[str]
    computed: bool

    @staticmethod
    def of(ran: Ran) -> Spelled:
        """Those of the user's code: libraries keep books of their own, which say nothing of a model."""
        names: set[str] = set()
        computed = False
        own = of_own_fields()
        for code in ran:
            if not of_library(code.co_filename):
                names.update(code.co_names, (constant for constant in code.co_consts if isinstance(constant, str)))
                computed = computed or (code not in own and not _COMPUTED.isdisjoint(code.co_names))
        return Spelled(frozenset(names), computed)

    def chosen(self, attributes: Any) -> list[str]:
        """The names among these that count."""
        return [name for name in attributes if isinstance(name, str) and (self.computed or name in self.names)]


@dataclass
class _Looker:
    spelled: Spelled
    codes: frozenset[CodeType]
    pieces: list[Piece] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)

    def open(self, value: Any, said: str) -> None:
        """Look into a value that some name stands for."""
        pending = [(value, said)]
        while pending and len(self.seen) < _MOST:
            thing, said = pending.pop()
            if type(thing) in _PLAIN or isinstance(thing, _CLOSED) or id(thing) in self.seen:
                continue
            self.seen.add(id(thing))
            if isinstance(thing, type):
                self.open_class(thing)
            elif isinstance(thing, FunctionType):
                self.open_function(thing)
            elif isinstance(thing, (tuple, frozenset)):
                pending.extend((item, said) for item in thing)
            elif isinstance(thing, os._Environ):
                data: Any = thing._data  # type: ignore[attr-defined]
                apart = frozenset(thing.encodekey(name) for name in _SET_BY_TORCH)
                self.pieces.append(Piece(said, data, None, _items(_without(data, apart)), apart=apart))
            elif type(thing).__module__ == "numpy":
                if hasattr(thing, "tobytes") and getattr(thing, "nbytes", _BYTES + 1) <= _BYTES:
                    self.pieces.append(Piece(said, thing, None, _items(thing)))
            else:
                pending.extend(self._opened(thing, said))

    def _opened(self, thing: Any, said: str) -> Iterator[tuple[Any, str]]:
        if isinstance(thing, (list, dict, set, deque)):
            self.pieces.append(Piece(f"{said}.", thing, None, _items(thing)))
            items = thing.values() if isinstance(thing, dict) else thing
            yield from ((item, said) for item in (items if len(thing) <= _LARGE else ()))
        slots = [name for base in type(thing).__mro__ for name in _names(vars(base).get("__slots__", ())) if hasattr(thing, name)]
        chosen = tuple(self.spelled.chosen(slots))
        if chosen and type(thing).__module__.partition(".")[0] not in sys.stdlib_module_names:
            self.pieces.append(Piece(f"{said}.", Slots(thing), chosen, [getattr(thing, name) for name in chosen]))
            yield from ((getattr(thing, name), f"{said}.{name}") for name in chosen)
        attributes = getattr(thing, "__dict__", None)
        top = type(thing).__module__.partition(".")[0]
        if type(attributes) is not dict or top == "torch" or (top in sys.stdlib_module_names and top not in ("types", "argparse")):
            return
        apart = books_of(type(thing), self.spelled.names)
        names = tuple(name for name in self.spelled.chosen(attributes) if name not in apart)
        if names:
            everything = self.spelled.computed
            values = _items(_without(attributes, apart)) if everything else [attributes[name] for name in names]
            self.pieces.append(Piece(f"{said}.", thing, None if everything else names, values, attributes=True, apart=apart))
        yield from ((attributes[name], f"{said}.{name}") for name in names)

    def name(self, space: Any, name: str, value: Any, said: str) -> None:
        """A name in a namespace (globals, a class, a cell): what it stands for, and what lies in that."""
        if isinstance(value, types.ModuleType):
            self.open_module(value)
        elif isinstance(value, (FunctionType, types.BuiltinFunctionType)) or _is_data(value):
            self.pieces.append(Piece(said, space, (name,), [value]))
            self.open(value, f"{said}{name}")
        elif isinstance(value, type):
            self.open(value, name)

    def open_module(self, module: types.ModuleType) -> None:
        """A module of Python's that the code names: what it holds under names that the code spells."""
        top = module.__name__.partition(".")[0]
        if id(module) in self.seen or top in ("torch", "fxfuse", "numpy") or (top in sys.stdlib_module_names and top != "os"):
            return
        self.seen.add(id(module))
        for name in sorted(self.spelled.names & vars(module).keys()):
            if top != "os" or name == "environ":
                self.name(vars(module), name, vars(module)[name], f"{module.__name__}.")

    def open_class(self, kind: type) -> None:
        """Attributes of a class, and of its bases, that the code spells; its methods, where they ran."""
        self.seen.add(id(kind))
        for base in kind.__mro__:
            top = base.__module__.partition(".")[0]
            if top in ("torch", "fxfuse", "numpy") or top in sys.stdlib_module_names:
                continue
            for name, value in list(vars(base).items()):
                function = function_of(value)
                if function is not None:
                    if function.__code__ in self.codes:
                        self.pieces.append(Piece(f"{base.__name__}.", base, (name,), [value], attributes=True))
                        self.open_function(function)
                elif name in self.spelled.names and not name.startswith("__") and _is_data(value):
                    self.pieces.append(Piece(f"{base.__name__}.", base, (name,), [value], attributes=True))
                    self.open(value, f"{base.__name__}.{name}")

    def open_function(self, function: FunctionType) -> None:
        """Variables of outer functions and defaults that a function which ran reads."""
        if function.__code__ not in self.codes:
            return
        self.seen.add(id(function))
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
            if name != "__class__":
                space = Cell(cell)
                value = space.get(name, _MISSING)
                if value is not _MISSING and id(cell) not in self.seen:
                    self.seen.add(id(cell))
                    self.name(space, name, value, f"{function.__name__}: ")
        for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self.open(default, f"a default of {function.__name__}")


def _is_data(value: Any) -> bool:
    """Something that code reads, and neither calls nor binds."""
    return type(value) in _PLAIN or not (callable(value) or isinstance(value, _CLOSED) or hasattr(type(value), "__get__"))


def closed_modules(programs: Iterable[Program], region: nn.Module) -> set[nn.Module]:
    """The modules of ``region`` that programs call as they are, and those inside: what these read, they read when they are called."""
    paths = {str(node.target) for program in programs for node in program.graph.nodes if node.op == "call_module"}
    return {module for path in paths for module in walk(region, path).modules()}


def outside(modules: Iterable[nn.Module], ran: Ran, spelled: Spelled) -> list[Piece]:
    """Globals, classes and variables of outer functions that the run of these modules could read, as they are now."""
    looker = _Looker(spelled, frozenset(ran))
    for kind in dict.fromkeys(type(module) for module in modules):
        looker.open_class(kind)
    named: set[tuple[int, str]] = set()
    for code, space in ran.items():
        if of_library(code.co_filename):
            continue
        for name in code.co_names:
            if name in space and not name.startswith("__") and (id(space), name) not in named:
                named.add((id(space), name))
                looker.name(space, name, space[name], "the global ")
    return looker.pieces


def inside(modules: Iterable[tuple[str, nn.Module]], spelled: Spelled, sets: frozenset[tuple[str, str]]) -> list[Piece]:
    """What lies in containers and objects that these modules (with their paths) hold as attributes; not in those that forward ``sets``."""
    looker = _Looker(spelled, frozenset())
    for path, module in modules:
        if type(module).__module__.startswith("torch."):
            continue
        own = vars(module)
        for name in spelled.chosen(own):
            if name in _OF_EVERY_MODULE or (path, name) in sets or name.startswith("_fxfuse"):
                continue
            if not isinstance(own[name], (type, FunctionType)):
                looker.open(own[name], f"{path}.{name}" if path else name)
    return looker.pieces


_OF_EVERY_MODULE = frozenset(vars(nn.Module())) | {"forward"}


# -- at every call ----------------------------------------------------------------------------------------------------------------------


class Around:
    """The pieces of a region, compared at every call.

    >>> scale = [2.0]
    >>> around = Around([Piece("scale", scale, None, _items(scale))])
    >>> around.changed()
    ''
    >>> scale[0] = 3.0
    >>> around.changed()
    'scale was changed after fusing'
    """

    def __init__(self, pieces: list[Piece]) -> None:
        self.pieces = pieces
        self.same = _generated(pieces)
        self.traced = _traced(pieces)

    def changed(self) -> str:
        """A sentence on what is another than when the region was fused; empty where nothing is."""
        try:
            if self.traced() if torch.compiler.is_compiling() else self.same():
                return ""
        except Exception:  # values whose equality is no bool
            pass
        for piece in self.pieces:
            try:
                said = piece.changed()
            except Exception as error:
                said = f"{piece.said.rstrip('.')} ({type(error).__name__})"
            if said:
                return f"{said} was changed after fusing"
        self.same, self.traced = _generated(self.pieces), _traced(self.pieces)  # equal, but other objects
        return ""


def _generated(pieces: list[Piece]) -> Callable[[], bool]:
    """A function of no arguments: do all hold the very objects that they held? Raises where a name is gone."""
    space: dict[str, Any] = {"is_": operator.is_}
    tests: list[str] = []
    named: dict[int, tuple[Any, list[str], list[Any]]] = {}  # by holder: one look for all names in it
    for i, piece in enumerate(pieces):
        holder = _attributes(piece.thing) if piece.attributes else piece.thing
        if piece.names is not None:
            key = id(piece.thing) if piece.attributes else id(holder)
            _, names, values = named.setdefault(key, (holder, [], []))
            names += piece.names
            values += piece.values
            continue
        space[f"t{i}"], space[f"v{i}"] = holder, piece.values
        if isinstance(piece.values, int):
            tests.append(f"len(t{i}) == v{i}")
        elif isinstance(holder, dict):
            space[f"k{i}"], space[f"v{i}"] = piece.values
            if piece.apart:
                space[f"a{i}"] = piece.apart
                tests.append(f"[k for k in t{i} if k not in a{i}] == k{i} and all(map(is_, [t{i}[k] for k in k{i}], v{i}))")
            else:
                tests.append(f"[*t{i}] == k{i} and all(map(is_, t{i}.values(), v{i}))")
        elif isinstance(piece.values, bytes):
            tests.append(f"t{i}.tobytes() == v{i}")
        elif isinstance(holder, set):
            tests.append(f"t{i} == v{i}")
        else:
            tests.append(f"len(t{i}) == {len(piece.values)} and all(map(is_, t{i}, v{i}))")
    for i, (holder, names, values) in enumerate(named.values()):
        space[f"n{i}"] = holder
        if len(names) == 1:
            space[f"w{i}"] = values[0]
            tests.append(f"n{i}[{names[0]!r}] is w{i}")
        else:
            space[f"w{i}"], space[f"get{i}"] = values, operator.itemgetter(*names)
            tests.append(f"all(map(is_, get{i}(n{i}), w{i}))")
    exec(f"def same():\n    return {' and '.join(tests) or 'True'}", space)
    same: Callable[[], bool] = space["same"]
    return same


def _traced(pieces: list[Piece]) -> Callable[[], bool]:
    """The same in words that dynamo takes, which guards what it reads."""
    space: dict[str, Any] = {}
    tests: list[str] = []
    for i, piece in enumerate(pieces):
        space[f"t{i}"] = _attributes(piece.thing) if piece.attributes else piece.thing
        space[f"v{i}"] = piece.values
        if piece.names is not None:
            space.update((f"v{i}_{n}", value) for n, value in enumerate(piece.values))
            tests += [f"t{i}[{name!r}] is v{i}_{n}" for n, name in enumerate(piece.names)]
        elif isinstance(piece.values, int):
            tests.append(f"len(t{i}) == v{i}")
        elif isinstance(space[f"t{i}"], dict):
            space[f"k{i}"], space[f"v{i}"] = piece.values
            if piece.apart:
                space[f"a{i}"] = sorted(piece.apart)
                tests.append(f"[k for k in t{i} if k not in a{i}] == k{i} and [t{i}[k] for k in k{i}] == v{i}")
            else:
                tests.append(f"[*t{i}.values()] == v{i} and [*t{i}] == k{i}")
        elif not isinstance(piece.values, bytes):  # of an array, dynamo reads no bytes
            tests.append(f"t{i} == v{i}" if isinstance(piece.thing, (set, list)) else f"[*t{i}] == v{i}")
    exec(f"def same():\n    return {' and '.join(tests) or 'True'}", space)
    same: Callable[[], bool] = space["same"]
    return same


class Outside(list[Piece]):
    """Pieces that lie outside of a model. Saved are those that a name finds again, and whose values are plain."""

    def __reduce__(self) -> Any:
        kept = []
        for piece in self:
            plain = piece.names is not None and all(type(value) in _PLAIN for value in piece.values)
            if plain and isinstance(piece.thing, type):
                kept.append((piece.said, piece.thing.__module__, piece.thing.__qualname__, piece.names, piece.values))
            elif plain and isinstance(piece.thing, dict) and not piece.attributes and isinstance(piece.thing.get("__name__"), str):
                kept.append((piece.said, piece.thing["__name__"], "", piece.names, piece.values))
        return _found_again, (kept,)


def _found_again(kept: list[tuple[str, str, str, tuple[str, ...], list[Any]]]) -> Outside:
    found = Outside()
    for said, module, qualname, names, values in kept:
        thing: Any = sys.modules.get(module)
        for part in qualname.split(".") if qualname else ():
            thing = getattr(thing, part, None)
        if thing is not None:
            found.append(Piece(said, thing if qualname else vars(thing), names, values, attributes=bool(qualname)))
    return found
