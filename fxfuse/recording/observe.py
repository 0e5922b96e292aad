"""Record a model often enough to know what its structure depends on.

Comes in: a model and example inputs. Goes out: an ``Observation`` for each mode (train, eval): the trace of the example, the dims that are
free (a second run with another batch size and other data took the same steps), and, marked on its frames, what cannot be trusted:
a frame whose steps depend on the data is poisoned, one whose steps depend on sizes is held to the recorded sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

from torch import nn

from fxfuse.errors import FxfuseError
from fxfuse.models.collector import paused
from fxfuse.models.inputs import batch_size, other_variations, resample, vary
from fxfuse.models.module_tree import all_modules, named_modules

from .fast_path import holds_attention
from .trace import Frame, Key, Ref, Trace
from .tracer import record
from .unify import Mismatch, Unifier, interchangeable

# How often a model is observed anew because a run set attributes that were not watched. (One may set another in every run.)
MOST_ROUNDS = 4

# Sizes other than the batch are varied only where a recording is cheap.
FEW_EVENTS = 2000


@dataclass
class Observation:
    """One mode of a model. ``dynamic``: value number -> dims whose size is free. ``fixed``: frame -> why its sizes are not.

    ``sizes``: the same dims, apart for each size that was varied by itself: dims of one entry are one size.

    ``same_as``: the observation of another mode, whose trace, dims and marks this one shares: the model does not depend on the mode.
    """

    trace: Trace
    flags: tuple[bool, ...]
    dynamic: dict[int, frozenset[int]] = field(default_factory=dict)
    fixed: dict[int, Mismatch] = field(default_factory=dict)
    same_as: Observation | None = None
    sizes: list[dict[int, frozenset[int]]] = field(default_factory=list)

    @property
    def failure(self) -> str:
        return self.trace.failure


def second_batch(size: int) -> int:
    """Another batch size, cheap to run and far enough away that halves and remainders of the two differ."""
    return 2 * size + 1 if size <= 16 else size // 2 + 1


def observe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Observation:
    """Record ``model`` as it is on the example and on resampled inputs, and hold the runs against each other, call by call.

    Where a run is seen to assign registered buffers, all runs are made anew with these watched.
    """
    keys: frozenset[Key] = frozenset()
    held = {(path, name) for path, module in named_modules(model) for name in vars(module).get("_buffers", ())}
    with paused():
        for left in reversed(range(MOST_ROUNDS)):
            seen = _Seen(keys)
            found = _observed(_Runs(model, args, kwargs, None, [], seen))
            assigned = seen.changed & held
            if assigned <= keys or not left:
                break
            keys |= assigned
        return found


def observe_modes(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], modes: Sequence[bool], attributes: bool = True
) -> list[Observation]:
    """Observations in the ``modes`` given (True: train), the first of which counts most, and as the model is where that is another.

    Where the second mode, on other data and another batch size, takes the very steps of the first, two runs in all show the
    dependence on both; else each mode is observed by itself. The model's mode is the same afterwards. ``attributes``: where a run is seen
    to set attributes, all runs are made anew with these watched, so that none of them reads what another sets unseen.
    """
    given = _flags(model)
    keys: frozenset[Key] = frozenset()
    try:
        with paused():
            for left in reversed(range(MOST_ROUNDS if attributes else 1)):
                seen = _Seen(keys)
                entered: list[_Mode] = []
                first, *others = [_Runs(model, args, kwargs, _Mode(mode), entered, seen) for mode in modes]
                first.example()
                found: list[Observation] = []
                if seen.changed <= keys or not left:
                    if given not in [first.flags, *(runs.enter() for runs in others)]:
                        others.append(_Runs(model, args, kwargs, _Mode(given[0], given), entered, seen))
                    found = _together(first, others)
                if found and (seen.changed <= keys or not left):
                    break
                keys |= seen.changed
            return found
    finally:
        _Mode(given[0], given).enter(model)


@dataclass
class _Seen:
    """The attributes that are watched in all runs, and those that any run changed."""

    keys: frozenset[Key] = frozenset()
    changed: set[Key] = field(default_factory=set)


def _together(first: _Runs, others: list[_Runs]) -> list[Observation]:
    base = Observation(first.example(), first.flags)
    matches: list[Unifier | None] = [None] * len(others)
    if not base.failure and not _asks_for_mode(first.model):
        matches = [interchangeable(base.trace, runs.other()) for runs in others]
    alike = next((match for match in matches if match is not None), None)
    if alike is not None:
        base.dynamic = alike.dynamic()
        base.sizes = [base.dynamic]
        _vary_others(base, first)
    else:
        base = _observed(first)
    return [
        base,
        *(
            _observed(runs) if match is None else Observation(base.trace, runs.flags, base.dynamic, base.fixed, base, base.sizes)
            for runs, match in zip(others, matches, strict=True)
        ),
    ]


def reads_offsets(trace: Trace) -> bool:
    """Does the model read where bags begin? These are in order: drawn anew by rows they mean nothing, though the model may take them."""
    return any(
        event.func.__name__ == "embedding_bag" and any(isinstance(given, Ref) for given in (*event.args[2:3], event.kwargs.get("offsets")))
        for event in trace.events
    )


class ModeError(FxfuseError):
    """A model that cannot be trained, or evaluated: it says so when it is asked."""


@dataclass(frozen=True)
class _Mode:
    """``train()`` or ``eval()``, as the model's own method does it, and then the flags, where they are neither."""

    training: bool
    flags: tuple[bool, ...] | None = None

    def enter(self, model: nn.Module) -> None:
        try:
            model.train(self.training)
        except Exception as error:
            said = str(error).splitlines()[0] if str(error) else ""
            raise ModeError(f"its train({self.training}) raises {type(error).__name__}: {said}") from error
        if self.flags is not None:
            for module, flag in zip(all_modules(model), self.flags, strict=True):
                module.__dict__["training"] = flag


class _Runs:
    """The runs of a model in one mode (None: as it is), each made when it is first asked for. ``entered``: the model's modes so far."""

    def __init__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mode: _Mode | None, entered: list[_Mode], seen: _Seen
    ) -> None:
        self.model, self.args, self.kwargs, self.mode, self.entered, self.seen = model, args, kwargs, mode, entered, seen
        self.size = batch_size(args, kwargs) or None  # no rows: nothing to draw another batch from
        self.made: dict[str, Trace] = {}
        self.flags: tuple[bool, ...] = ()

    def enter(self) -> tuple[bool, ...]:
        """Put the model into this mode; its flags there."""
        if self.mode is not None and self.entered[-1:] != [self.mode]:
            self.mode.enter(self.model)
            self.entered.append(self.mode)
        if not self.flags:
            self.flags = _flags(self.model)
        return self.flags

    def _run(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
        if name not in self.made:
            self.made[name] = self.record(args, kwargs)
        return self.made[name]

    def record(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
        """One more run in this mode."""
        self.enter()
        trace = record(self.model, args, kwargs, self.seen.keys)
        self.seen.changed |= trace.changed
        return trace

    def example(self) -> Trace:
        return self._run("example", self.args, self.kwargs)

    def resized(self) -> Trace | None:
        """Other data, and another batch size; None where the inputs have none."""
        if self.size is None:
            return None
        return self._run("resized", *resample(self.args, self.kwargs, batch=second_batch(self.size), seed=1))

    def same_size(self) -> Trace:
        """Other data. Integers stay as they are where the model does not take their rows in another order."""
        if not reads_offsets(self.example()):
            other = self._run("same size", *resample(self.args, self.kwargs, batch=None, seed=2))
            if not other.failure:
                return other
        return self._run("same integers", *resample(self.args, self.kwargs, batch=None, seed=2, keep_integers=True))

    def other(self) -> Trace:
        """As different from the example as it can be."""
        return self.resized() or self.same_size()


def _observed(runs: _Runs) -> Observation:
    """One mode by itself."""
    trace = runs.example()
    observation = Observation(trace, runs.flags)
    if trace.failure or not trace.frames:
        return observation
    resized = runs.resized()
    checker = _Checker(observation, runs, resized if resized is not None and not resized.failure else None)
    if resized is not None and resized.failure:
        checker.why = Mismatch(f"the forward fails at batch size {second_batch(runs.size or 0)}: {resized.failure}", None, 0)
    checker.check(trace.frames[0])
    observation.sizes = [observation.dynamic]
    _vary_others(observation, runs)
    return observation


def _vary_others(observation: Observation, runs: _Runs) -> None:
    """Inputs whose first size is another one are varied by themselves: a batch of images beside one code for all of them.

    Where the first variation failed (its size is none that can change), its tensors are tried one at a time too.
    """
    trace = observation.trace
    if not trace.frames or trace.frames[0].poison:
        return
    whole = 0 not in observation.fixed and bool(observation.dynamic)
    shown = [observation.dynamic] if whole else []
    for dim, chosen in other_variations(runs.args, runs.kwargs, first_too=not whole):
        if dim and len(trace.events) > FEW_EVENTS:
            break
        other = runs.record(*vary(runs.args, runs.kwargs, chosen, second_batch, dim=dim, seed=4))
        if other.failure or not other.frames:
            continue
        unifier = Unifier(trace, other)
        if unifier.compare(trace.frames[0], other.frames[0]) is None and unifier.dynamic():
            shown.append(unifier.dynamic())
    if len(shown) > whole:
        observation.fixed = {}
        observation.sizes = shown
        merged: dict[int, frozenset[int]] = {}
        for dims in shown:
            for value, free in dims.items():
                merged[value] = merged.get(value, frozenset()) | free
        observation.dynamic = merged


class _Checker:
    def __init__(self, observation: Observation, runs: _Runs, resized: Trace | None) -> None:
        self.observation, self.runs, self.resized = observation, runs, resized
        self.resized_frames = _by_call(resized) if resized is not None else {}
        self.calls = {frame.index: key for key, frame in _by_call(observation.trace).items()}
        self.same_size_frames: dict[tuple[str, int], Frame] | None = None
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
        other = self.runs.same_size()
        if self.same_size_frames is None:
            self.same_size_frames = {} if other.failure else _by_call(other)
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


def _flags(model: nn.Module) -> tuple[bool, ...]:
    return tuple([module.training for module in all_modules(model)])


def _by_call(trace: Trace) -> dict[tuple[str, int], Frame]:
    """Frames by module path and number of the call."""
    count: dict[str, int] = {}
    found: dict[tuple[str, int], Frame] = {}
    for frame in trace.frames:
        number = count.get(frame.path, 0)
        count[frame.path] = number + 1
        found[(frame.path, number)] = frame
    return found


def _asks_for_mode(model: nn.Module) -> bool:
    """Does the source of a class of the model, torch's aside, mention ``training``, or ``train()`` do more than torch's?

    Then Python may take sizes into account in one mode only, which one run in each mode does not show. (torch's own modules hand
    the flag to the call that depends on it, where it is seen.)
    """
    if holds_attention(model):  # its results lie in another way in eval mode
        return True
    classes = {base for module in all_modules(model) for base in type(module).__mro__}
    own = [cls for cls in classes if cls is not object and not cls.__module__.startswith("torch.")]
    replaced = [vars(module)["forward"] for module in all_modules(model) if "forward" in vars(module)]
    if any("train" in vars(cls) or "eval" in vars(cls) for cls in own):
        return True
    return any(_mentions(value, 0) for value in (*replaced, *(value for cls in own for value in vars(cls).values())))


def _mentions(value: Any, depth: int) -> bool:
    """Is ``training`` among the names in the code of a function, property, or wrapped function?"""
    code = getattr(value, "__code__", None)
    if isinstance(code, CodeType):
        pending = [code]
        while pending:
            code = pending.pop()
            if "training" in code.co_names or "training" in code.co_consts:
                return True
            pending.extend(constant for constant in code.co_consts if isinstance(constant, CodeType))
    inner = [getattr(value, name, None) for name in ("__func__", "__wrapped__", "fget", "func")]
    return depth < 5 and any(part is not None and _mentions(part, depth + 1) for part in inner)
