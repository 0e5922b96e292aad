"""Record a model often enough to know what its structure depends on.

Comes in: a model in one mode (train or eval) and example inputs. Goes out: an ``Observation``: the trace of the example, the dims that are
free (a second run with another batch size and other data took the same steps), and, marked on its frames, what cannot be trusted:
a frame whose steps depend on the data is poisoned, one whose steps depend on sizes is held to the recorded sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .inputs import batch_size, resample
from .trace import Frame, Trace
from .tracer import record
from .unify import Mismatch, Unifier


@dataclass
class Observation:
    """One mode of a model. ``dynamic``: value number -> dims whose size is free. ``fixed``: frame -> why its sizes are not."""

    trace: Trace
    flags: tuple[bool, ...]
    dynamic: dict[int, frozenset[int]] = field(default_factory=dict)
    fixed: dict[int, Mismatch] = field(default_factory=dict)

    @property
    def failure(self) -> str:
        return self.trace.failure


def second_batch(size: int) -> int:
    """Another batch size, cheap to run and far enough away that halves and remainders of the two differ."""
    return 2 * size + 1 if size <= 16 else size // 2 + 1


def observe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Observation:
    """Record ``model`` on the example and on resampled inputs, and hold the runs against each other, module call by module call."""
    flags = tuple(module.training for module in model.modules())
    trace = record(model, args, kwargs)
    observation = Observation(trace, flags)
    if trace.failure or not trace.frames:
        return observation
    size = batch_size(args, kwargs)
    others: list[Trace] = []
    if size is not None:
        others.append(record(model, *resample(args, kwargs, batch=second_batch(size), seed=1)))
    checker = _Checker(observation, model, args, kwargs, others[0] if others and not others[0].failure else None)
    if others and others[0].failure:
        checker.why = Mismatch(f"the forward fails at batch size {second_batch(size or 0)}: {others[0].failure}", None, 0)
    checker.check(trace.frames[0])
    return observation


class _Checker:
    def __init__(
        self, observation: Observation, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], resized: Trace | None
    ) -> None:
        self.observation, self.model, self.args, self.kwargs = observation, model, args, kwargs
        self.resized = resized
        self.resized_frames = _by_call(resized) if resized is not None else {}
        self.calls = {frame.index: key for key, frame in _by_call(observation.trace).items()}
        self.same_size: Trace | None = None
        self.same_size_frames: dict[tuple[str, int], Frame] = {}
        self.why: Mismatch | None = None

    def check(self, frame: Frame) -> None:
        """Compare ``frame`` in all runs; where the runs disagree, look at the calls inside it one by one."""
        key = self.calls[frame.index]
        difference = self.why
        if self.resized is not None and key in self.resized_frames:
            unifier = Unifier(self.observation.trace, self.resized)
            difference = unifier.compare(frame, self.resized_frames[key])
            if difference is None:
                self.observation.dynamic.update(unifier.dynamic())
                return
        other = self._same_size()
        mismatch: Mismatch | None = None
        if key in self.same_size_frames:
            mismatch = Unifier(self.observation.trace, other).compare(frame, self.same_size_frames[key])
        elif other.failure:
            mismatch = Mismatch(f"the forward fails on other data of the same size: {other.failure}", frame.place, frame.start)
        else:
            mismatch = Mismatch("it is called depending on the data", frame.place, frame.start)
        if mismatch is None:
            if difference is not None:
                self.observation.fixed[frame.index] = difference
            if self.resized is None:
                return
        else:
            frame.poison = frame.poison or f"its steps depend on the data: {mismatch.reason}"
            frame.place = mismatch.place or frame.place
        for child in frame.children:
            self.check(self.observation.trace.frames[child])

    def _same_size(self) -> Trace:
        if self.same_size is None:
            self.same_size = record(self.model, *resample(self.args, self.kwargs, batch=None, seed=2))
            self.same_size_frames = {} if self.same_size.failure else _by_call(self.same_size)
        return self.same_size


def _by_call(trace: Trace) -> dict[tuple[str, int], Frame]:
    """Frames by module path and number of the call."""
    count: dict[str, int] = {}
    found: dict[tuple[str, int], Frame] = {}
    for frame in trace.frames:
        number = count.get(frame.path, 0)
        count[frame.path] = number + 1
        found[(frame.path, number)] = frame
    return found
