"""Every task in a process of its own: a bug may loop for ever, write into foreign memory or leave fxfuse changed.

Comes in: tasks and what to do with each, both known before; what was imported and surveyed is there, as the processes are forked.
Goes out: number and result of each, as they finish; ``Died`` for a process that did not come to its end.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

T = TypeVar("T")
WALL = 900.0  # seconds before a process is ended; what it does is limited by its processor time long before


@dataclass(frozen=True)
class Died:
    """``code``: the exit code, the negative number of a signal where one ended the process."""

    code: int | None


def each(tasks: Sequence[T], work: Callable[[T], Any], jobs: int) -> Iterator[tuple[int, Any]]:
    """The position of every task and its result (pickled on its way), ``jobs`` at a time."""
    context = multiprocessing.get_context("fork")
    running: dict[Any, tuple[int, Any, float]] = {}
    waiting = iter(enumerate(tasks))
    left = True
    while left or running:
        while left and len(running) < jobs:
            position, task = next(waiting, (-1, None))
            left = position >= 0
            if left:
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_answer, args=(theirs, work, task))
                process.start()
                theirs.close()
                running[ours] = position, process, time.monotonic()
        for ready in wait(list(running), timeout=1.0):
            position, process, _ = running.pop(ready)
            assert isinstance(ready, Connection)
            try:
                value = ready.recv()
            except EOFError:
                process.join()
                value = Died(process.exitcode)
            process.join()
            ready.close()
            yield position, value
        for _, process, since in running.values():
            if time.monotonic() - since > WALL:
                process.kill()


def _answer(pipe: Connection, work: Callable[[Any], Any], task: Any) -> None:
    pipe.send(work(task))
