"""The calls of one of dynamo's graphs, ready to be made one after the other.

Comes in: a graph. Goes out: ``Step``s: what is called, with what, and from which line of the user's source; or ``Uncaptured`` for a graph
that holds modules, or graphs of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx

from fxfuse.models.internal_files import is_internal
from fxfuse.private.dynamo import is_higher_order
from fxfuse.private.torch_function import DisableTorchFunction


class Uncaptured(Exception):
    """This graph cannot be looked at; the message says why."""


@dataclass(frozen=True)
class Step:
    """One call of the graph. ``call`` makes it from the line of the user's source that it came from, where the recorder finds it."""

    result: torch.fx.Node | None  # None: the output
    target: Callable[..., Any]
    args: Any
    kwargs: Any
    call: Callable[[Any, Any, Any], Any]


_AUTOCAST = frozenset(("_enter_autocast", "_exit_autocast"))


def steps_of(graph: torch.fx.Graph, untracked: frozenset[torch.fx.Node] = frozenset()) -> list[Step]:
    """The calls of a graph. Raises ``Uncaptured`` for one that holds modules, or graphs of its own."""
    steps: list[Step] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            continue
        target = node.target
        if node.op == "call_method":
            target = _method(node.target)
            target = _under_no_grad(target) if node in untracked else target
        elif node.op == "output":
            steps.append(Step(None, _nothing, node.args, {}, _call))
            continue
        elif held := next((n.target for n in (node, *node.users) if is_higher_order(n.target)), None):
            raise Uncaptured(f"the graph calls {getattr(held, '__name__', held)}, which holds a graph of its own")
        elif node.op != "call_function":
            raise Uncaptured(f"the graph holds {node.target}, a module or a tensor that is no input")
        elif getattr(target, "__name__", "") in _AUTOCAST:
            target = _unseen(target)
        elif node in untracked:
            target = _under_no_grad(target)
        steps.append(Step(node, target, node.args, node.kwargs, _from_line(node.meta.get("stack_trace") or "")))
    return steps


def _nothing() -> None:
    return None


def _call(target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return target(*args, **kwargs)


def _unseen(target: Callable[..., Any]) -> Callable[..., Any]:
    """A switch, as itself: it is no call of a torch function."""

    def switch(*args: Any, **kwargs: Any) -> Any:
        with DisableTorchFunction():
            return target(*args, **kwargs)

    return switch


def _under_no_grad(target: Callable[..., Any]) -> Callable[..., Any]:
    def write(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return target(*args, **kwargs)

    return write


def _method(name: str) -> Callable[..., Any]:
    def method(owner: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(owner, name)(*args, **kwargs)

    return method


_lines: dict[tuple[str, int], Callable[[Any, Any, Any], Any]] = {}
_LINE = re.compile(r'File "([^"]+)", line (\d+)')


def _from_line(stack: str) -> Callable[[Any, Any, Any], Any]:
    """``_call``, made in the innermost line of ``stack`` that is the user's."""
    for file, number in reversed(_LINE.findall(stack)):
        if not is_internal(file):
            place = file, int(number)
            found = _lines.get(place)
            if found is None:
                space: dict[str, Any] = {}
                head = "\n" * (place[1] - 1)
                exec(compile(f"{head}def call(target, args, kwargs): return target(*args, **kwargs)", file, "exec"), space)
                found = _lines[place] = space["call"]
            return found
    return _call
