"""One rewrite at a time.

Comes in: nothing. Goes out: ``alone``: a context that one thread at a time is in, and ``alone_now``, which does not wait. Two threads
may optimize at once, the same model too: trial runs silence hooks and put random state back, and no two things should be timed at once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.RLock()


def _renew() -> None:
    """In the child of a fork the thread that held the lock is gone."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


@contextmanager
def alone() -> Iterator[None]:
    """Within, no other thread is in here; the same thread may enter again."""
    with _lock:
        yield


@contextmanager
def alone_now() -> Iterator[bool]:
    """As ``alone`` where no other thread is in there (True); else at once, with False, beside that thread.

    >>> with alone_now() as mine:
    ...     mine
    True
    """
    lock = _lock
    mine = lock.acquire(blocking=False)
    try:
        yield mine
    finally:
        if mine:
            lock.release()
