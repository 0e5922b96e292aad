"""Python's cyclic garbage collector, out of the way.

Comes in: nothing. Goes out: ``paused``: a context in which it does not run.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


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
    try:
        yield
    finally:
        if was:
            gc.enable()
