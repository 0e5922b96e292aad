"""Bugs in how a file of fxfuse is written: each is one small change of its syntax tree, put into the functions that run.

Comes in: a file. Goes out: ``SourceBug``: a number one more, a flag or condition turned round, a comparison, a sum or an ``and`` replaced
by its neighbour, two arguments exchanged. ``active`` gives the functions that were imported the code of the changed file, and takes it
back; statements outside of functions run at import alone and are left as they are.
"""

from __future__ import annotations

import ast
import builtins
import functools
import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any

import fxfuse
from mutants.suite import ROOT, source_of

# What puts weights and layouts together; the rules are all files of passes/rules that register one.
_PASSES = "joins picks views writes writer weights emit unequal bundle buffers".split()
CORE = (*(f"passes/{name}.py" for name in _PASSES), "fxfuse/weights/recipes.py", "fxfuse/weights/packing.py")
NOT_RULES = frozenset({"__init__", "table"})


@dataclass(frozen=True)
class SourceBug:
    """``change``: what is written there instead; ``number`` tells equal changes of one function apart."""

    file: str
    function: str
    change: str
    number: int
    line: int = field(compare=False)
    firstline: int = field(compare=False)
    make: Callable[[], ast.Module] = field(compare=False, repr=False)

    @property
    def name(self) -> str:
        """What the tables and the file of equivalent mutants call it: no line number, so that it outlives edits elsewhere."""
        return f"{self.file} {self.function}: {self.change}{f' ({self.number})' if self.number > 1 else ''}"

    @property
    def family(self) -> str:
        """The rule family, or the file with its folder."""
        return self.file.removeprefix("passes/rules/").removesuffix(".py")

    @property
    def covered(self) -> str:
        """As ``suite.Facts.functions`` names the function."""
        return f"{self.file}:{self.firstline}"


def files() -> list[str]:
    """All files that bugs are put into."""
    rules = sorted(path.name for path in (ROOT / "passes" / "rules").glob("*.py") if path.stem not in NOT_RULES)
    return [*(f"passes/rules/{name}" for name in rules), *CORE]


def bugs_of(file: str) -> list[SourceBug]:
    """Every change of one file, in the order of its lines."""
    text = (ROOT / file).read_text(encoding="utf-8")
    tree = ast.parse(text)
    found: list[SourceBug] = []
    seen: Counter[tuple[str, str]] = Counter()
    for function, name in _functions(tree):
        start = min([function.lineno, *(d.lineno for d in getattr(function, "decorator_list", []))])
        for place, change, edit in _edits(function):
            seen[name, change] += 1
            found.append(SourceBug(file, name, change, seen[name, change], place, start, functools.partial(_edited, tree, edit)))
    return found


@contextmanager
def active(bug: SourceBug) -> Iterator[bool]:
    """fxfuse has the bug inside of this context. False where the function cannot be replaced (none was made, or its closure differs)."""
    live = _live().get(bug.covered, [])
    assert _own()
    codes = [c for c in _codes(compile(bug.make(), bug.file, "exec")) if c.co_firstlineno == bug.firstline and _is(c, bug.function)]
    fits = len(codes) == 1 and bool(live) and all(f.__code__.co_freevars == codes[0].co_freevars for f in live)
    before = [f.__code__ for f in live]
    try:
        for function in live if fits else ():
            function.__code__ = codes[0].replace(co_filename=function.__code__.co_filename)
        yield fits
    finally:
        for function, own in zip(live, before, strict=True):
            function.__code__ = own


@contextmanager
def paused(bug: SourceBug) -> Iterator[None]:
    """The functions as they are written, for a moment inside of ``active``."""
    live = _live().get(bug.covered, [])
    changed = [function.__code__ for function in live]
    for function in live:
        function.__code__ = _own()[id(function)]
    try:
        yield
    finally:
        for function, code in zip(live, changed, strict=True):
            function.__code__ = code


def ready() -> None:
    """Look for the functions now, not in every process that is forked."""
    assert _own()


def place(function: Any) -> str:
    """A function as ``suite.Facts.functions`` names it."""
    return f"{source_of(function.__code__)}:{function.__code__.co_firstlineno}"


@functools.cache
def _own() -> dict[int, CodeType]:
    """The code of every function of fxfuse as it was imported."""
    return {id(function): function.__code__ for functions in _live().values() for function in functions}


@functools.cache
def _live() -> dict[str, list[FunctionType]]:
    """The functions of fxfuse, by file and first line."""
    assert fxfuse
    found: dict[str, list[FunctionType]] = {}
    for thing in gc.get_objects():
        if type(thing) is FunctionType and source_of(thing.__code__):
            found.setdefault(place(thing), []).append(thing)
    return {key: functions for key, functions in found.items() if len({f.__code__.co_name for f in functions}) == 1}


def _codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


def _is(code: CodeType, function: str) -> bool:
    return code.co_name == function.rpartition(".")[2]


def _functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[Any, str]]:
    """Functions, methods and lambdas that are in no other function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            yield node, prefix + getattr(node, "name", "<lambda>")
        else:
            yield from _functions(node, f"{prefix}{node.name}." if isinstance(node, ast.ClassDef) else prefix)


# -- one change ------------------------------------------------------------------------------------------------------------------------

Edit = tuple[Any, str, Any]  # of this node, this field, to that value

_COMPARISONS = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Is: ast.IsNot,
    ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_SUMS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv}
_STRINGS = {"cat": "stack", "stack": "cat", "rows": "cat"}


def _edited(tree: ast.Module, edit: Edit) -> ast.Module:
    """The tree with one change. It is shared: compile it before the next change."""
    node, name, value = edit
    _undo()
    _last.append((node, name, getattr(node, name)))
    setattr(node, name, value)
    return ast.fix_missing_locations(tree)


_last: list[Edit] = []


def _undo() -> None:
    while _last:
        node, name, value = _last.pop()
        setattr(node, name, value)


def _edits(function: Any) -> Iterator[tuple[int, str, Edit]]:
    """Line, description, edit. Docstrings, annotations, decorators, defaults, messages and assertions are left alone."""
    body = function.body if isinstance(function.body, list) else [function.body]
    for statement in body:
        if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
            yield from _walk(statement)


def _walk(node: Any) -> Iterator[tuple[int, str, Edit]]:
    if isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)):
        return
    for edit in _here(node):
        target, name, value = edit
        before = getattr(target, name)
        if name == "test":  # not the whole of what depends on it
            old, new = ast.unparse(before), ast.unparse(value)
        else:
            old = ast.unparse(target)
            setattr(target, name, value)
            new = ast.unparse(target)
            setattr(target, name, before)
        yield getattr(node, "lineno", getattr(getattr(node, "target", None), "lineno", 0)), f"`{_short(old)}` -> `{_short(new)}`", edit
    skipped = {"annotation", "returns", "decorator_list", "type_comment"}
    for name, value in ast.iter_fields(node):
        if name in skipped or (isinstance(node, (ast.FunctionDef, ast.Lambda)) and name == "args"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _walk(child)


def _here(node: Any) -> Iterator[Edit]:
    if isinstance(node, ast.Constant):
        if type(node.value) is bool:
            yield node, "value", not node.value
        elif type(node.value) is int:
            yield node, "value", node.value + 1
            if node.value == 1:
                yield node, "value", 0
        elif isinstance(node.value, str) and node.value in _STRINGS:
            yield node, "value", _STRINGS[node.value]
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield node, "ops", [_COMPARISONS[type(node.ops[0])]()]
    elif isinstance(node, ast.BinOp) and type(node.op) in _SUMS:
        yield node, "op", _SUMS[type(node.op)]()
    elif isinstance(node, ast.BoolOp):
        yield node, "op", ast.Or() if isinstance(node.op, ast.And) else ast.And()
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        yield node, "operand", ast.Constant(0)
    elif isinstance(node, ast.Call) and len(node.args) >= 2 and not _needs_order(node):
        yield node, "args", [*node.args[:-2], node.args[-1], node.args[-2]]
    if isinstance(node, (ast.If, ast.IfExp)) and not isinstance(node.test, (ast.Compare, ast.BoolOp)):
        yield node, "test", node.test.operand if isinstance(node.test, ast.UnaryOp) else ast.UnaryOp(ast.Not(), node.test)
    if isinstance(node, ast.comprehension) and node.ifs:
        yield node, "ifs", []


def _needs_order(call: ast.Call) -> bool:
    """Calls that only raise with their arguments exchanged, and those of which nobody knows how many they are."""
    builtin = isinstance(call.func, ast.Name) and hasattr(builtins, call.func.id)
    return builtin or any(isinstance(arg, ast.Starred) for arg in call.args)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:50]} ... {text[-25:]}"
