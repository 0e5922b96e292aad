"""Python's cyclic garbage collector, out of the way.

Comes in: nothing. Goes out: ``paused``: a context in which it does not run.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_before: ContextVar[bool] = ContextVar("_before", default=False)  # was it on, outside of all ``paused``?


@contextmanager
def paused() -> Iterator[None]:
    """No automatic collection within. For work that makes a million objects and no garbage: each pass over them would find nothing.

    What is not part of a reference cycle (every tensor, as a rule) is freed at once as always. Contexts may be nested.

    >>> with paused():
    ...     gc.isenabled()
    False
    """
    was = gc.isenabled()
    gc.disable()
    token = _before.set(_before.get() or was)
    try:
        yield
    finally:
        _before.reset(token)
        if was:
            gc.enable()


@contextmanager
def collecting() -> Iterator[None]:
    """Within ``paused``, the collector as it was outside: for work that runs somebody's model, whose garbage may be large.

    >>> with paused(), collecting():
    ...     gc.isenabled()
    True
    """
    now = gc.isenabled()
    if _before.get() and not now:
        gc.enable()
    try:
        yield
    finally:
        if not now:
            gc.disable()
