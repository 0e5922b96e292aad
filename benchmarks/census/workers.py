"""A process for every subject, forked with torch and transformers loaded: one that crashes, hangs or eats the memory ends alone.

Comes in: subjects and what to do with one. Goes out: a dict of facts for each, as they finish. What a subject told before it died is kept.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from census.subject import Subject, Tell

MOST_BYTES = 12 << 30
PATIENCE = 4  # a machine may be busy with something else


def run(subjects: list[Subject], work: Callable[[Subject, Tell], None], jobs: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Examine ``jobs`` at a time, each for ``seconds`` of a processor (``PATIENCE`` times that by the clock); yields facts."""
    context = multiprocessing.get_context("fork")
    waiting = list(reversed(subjects))
    running: dict[Connection, tuple[Any, dict[str, Any], float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            subject = waiting.pop()
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(subject, work, theirs, seconds), daemon=True)
            process.start()
            theirs.close()
            running[ours] = (process, {"name": subject.name, "kind": subject.kind}, time.monotonic())
        for connection in wait(list(running), timeout=0.2):
            assert isinstance(connection, Connection)
            process, facts, started = running[connection]
            try:
                facts.update(connection.recv())
            except EOFError:
                process.join()
                if process.exitcode == -signal.SIGXCPU:
                    facts.update(error=f"still at {facts.get('stage')} after {seconds:g} s", late=True)
                elif process.exitcode:
                    facts["error"] = facts.get("error", f"the process ended with {process.exitcode} at {facts.get('stage')}")
                facts["all seconds"] = round(time.monotonic() - started, 2)
                del running[connection]
                yield facts
        for connection, (process, facts, started) in list(running.items()):
            if time.monotonic() - started > PATIENCE * seconds:
                process.kill()
                process.join()
                facts.update(error=f"still at {facts.get('stage')} after {PATIENCE * seconds:g} s", late=True)
                del running[connection]
                yield facts


def _child(subject: Subject, work: Callable[[Subject, Tell], None], connection: Connection, seconds: float) -> None:
    """In the process of a subject: quiet, on one thread, in bounded memory."""
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    used = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    resource.setrlimit(resource.RLIMIT_CPU, (int(used + seconds) + 1, int(used + seconds) + 10))
    torch.set_num_threads(1)
    stage = ["prepare"]

    def tell(facts: dict[str, Any]) -> None:
        stage[0] = facts.get("stage", stage[0])
        connection.send(facts)

    try:
        work(subject, tell)
    except BaseException as error:  # anything: it belongs in the record
        said = f"{type(error).__name__}: {error}"[:400]
        tell({"error": said, "at": stage[0], "traceback": "".join(traceback.format_exception(error)[-6:])[-3000:]})
    connection.close()
