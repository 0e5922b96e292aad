"""What runs while torch.compile traces a call, and is not traced itself.

Private: ``torch._dynamo.comptime``, of which the documented part does not give objects, only numbers and tensors;
``UnspecializeRestartAnalysis``, by which dynamo traces a call once more, whatever way it goes then; ``torch._guards.TracingContext``, one
for each trace; the flag behind ``torch.compiler.is_compiling``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch.fx import Proxy

from .dynamo import example_of
from .pytree import tree_map_only


def comptime() -> Any:
    """What calls a function with a context while dynamo traces the call, and does nothing else. Imported late: dynamo takes a second."""
    from torch._dynamo.comptime import comptime

    return comptime


def local_object(context: Any, name: str) -> Any:
    """The object that a local variable holds in the function that is being traced. ``context``: what ``comptime()`` calls with."""
    return _variable(context, name).realize().value


def local_example(context: Any, name: str) -> Any:
    """Numbers, tensors, containers and objects that a local variable may hold in the call that is being traced: the caller's own where they
    are inputs of the graph, else random numbers that lie alike. Raises (what, is torch's) where dynamo holds something in another way.
    """
    return _example(_variable(context, name))


def _example(variable: Any) -> Any:
    variable = variable.realize()
    kind = variable.python_type()
    if kind in (tuple, list):
        return kind([_example(item) for item in variable.items])
    if kind in (dict, OrderedDict):
        held = getattr(variable, "_base_vt", None) or getattr(variable, "_dict_vt", variable)  # of an OrderedDict, as torch names it
        return kind((key.vt.as_python_constant(), _example(item)) for key, item in held.items.items())
    try:
        return tree_map_only(Proxy, lambda proxy: example_of(proxy.node), variable.as_proxy())
    except Exception:
        return variable.value


def _variable(context: Any, name: str) -> Any:
    return context.get_local(name)._i_will_not_complain_if_bc_breaks_VariableTracker()


def trace_now() -> Any:
    """An object that stands for the trace that runs now: another one where dynamo starts anew."""
    from torch._guards import TracingContext

    return TracingContext.try_get()


def start_anew(reason: str) -> NoReturn:
    """Leave what was traced so far, and trace the call from its beginning."""
    from torch._dynamo.exc import UnspecializeRestartAnalysis

    raise UnspecializeRestartAnalysis(restart_reason=reason)


@contextmanager
def not_compiling() -> Iterator[None]:
    """``torch.compiler.is_compiling()`` is False: the code inside is run, not traced."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = False
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before
