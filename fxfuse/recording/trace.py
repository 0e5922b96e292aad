"""What one recorded run looked like, as data.

Comes in: nothing. Goes out: ``Trace``: values (every tensor that was seen), events (every torch call), frames (every module call), in the
order of the run. Arguments are trees of Python containers in which a tensor is a ``Ref`` and a tracked size an expression.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch

from fxfuse.graph import Place

from .sizes import Comparison

MOST_NUMBERS = 4096  # of a tensor that a graph may spell out


@dataclass(frozen=True, slots=True)
class Ref:
    """The recorded value with this number."""

    value: int


@dataclass(slots=True)
class Value:
    """One tensor of the run. ``origin`` is how it came in: an input, an attribute of a module, a constant, or made by an event."""

    tensor: torch.Tensor
    origin: str  # "made" | "input" | "attribute" | "constant"
    name: str = ""  # of an attribute: its path in the model; of a constant: the call that read it out of data
    storage: int = 0  # equal for tensors that share memory
    shape: tuple[int, ...] = ()  # as it was when first seen: an in-place resize would show
    stride: tuple[int, ...] | None = None  # as it was then; None where it has none (sparse tensors)
    numbers: bool = False  # a constant made anew in every run, of the same numbers: to be spelled out
    more: tuple[tuple[int, ...], tuple[int, ...]] | None = None  # where a free size is 1: shape and strides that another run had

    def order(self) -> tuple[int, ...] | None:
        """Strides that say in what order the dims lie in memory; those of one row as they lie in more."""
        return self.more[1] if self.more is not None else self.stride


@dataclass(slots=True)
class Event:
    """One torch call. ``mutated`` are the values whose contents it changed."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    mutated: tuple[int, ...]
    place: Place | None
    frame: int
    poison: str = ""  # why a region must not contain this call; empty: it may
    untracked: bool = False  # called under ``no_grad``; what it gives is detached by the next events


@dataclass(slots=True)
class Frame:
    """One call of a module: events ``start:end``, its flattened arguments and results."""

    index: int
    parent: int
    path: str
    module: torch.nn.Module
    leaves: list[Any]
    in_spec: Any
    start: int
    end: int = -1
    out: list[Any] = field(default_factory=list)
    out_spec: Any = None
    place: Place | None = None
    poison: str = ""  # why this module's forward cannot be a region, or part of one
    children: list[int] = field(default_factory=list)
    raw: tuple[Any, Any] | None = None  # the args and kwargs themselves
    untracked: bool = False  # called under ``no_grad``
    saved_hooks: Any = None  # what autograd keeps goes through, where it is called
    switched: str = ""  # called under another switch that a graph does not repeat: which
    sets_own: bool = False  # an attribute of the module was another object after the call


Key = tuple[str, str]  # of an attribute: the path of its module, and its name


@dataclass(slots=True)
class Touch:
    """A read or a write of an attribute that forward sets. ``leaves``: what was written, flattened; None where no graph can give it."""

    path: str
    name: str
    write: bool
    value: Any  # what is written, until the run is over
    frame: int
    event: int  # the next one
    place: Place | None
    leaves: list[Any] | None = None
    spec: Any = None

    @property
    def key(self) -> Key:
        return self.path, self.name


@dataclass(slots=True)
class Assignment:
    """A registered buffer that forward assigns: ``self.center = value``. ``before``: the value that is registered when the run begins."""

    path: str
    name: str
    before: int
    value: int
    frame: int
    event: int  # the next one
    place: Place | None

    @property
    def key(self) -> Key:
        return self.path, self.name


@dataclass
class Trace:
    """One recorded run of a model."""

    values: list[Value]
    events: list[Event]
    frames: list[Frame]
    comparisons: list[tuple[Comparison, int, Place | None]]  # with the frame and the line in which it was made
    reads_dtype: bool = False
    draws: bool = False  # Python's or numpy's random numbers were drawn
    unregistered: frozenset[str] = frozenset()  # names of Parameters that no module registers: its lists and dicts hold them
    moves: bool = False  # a module was moved to the device on which it is
    autocast: tuple[str, torch.dtype] | None = None  # the caller's: kind of device, dtype
    casts: bool = False  # some call was made under autocast, the caller's or forward's own
    failure: str = ""  # the run raised: why
    touches: list[Touch] = field(default_factory=list)  # of the attributes that were watched
    assigned: list[Assignment] = field(default_factory=list)  # to the registered buffers that were watched
    unfit: dict[Key, tuple[str, Place | None]] | None = None  # passes.assignable: which of these have no form in a graph, found once
    tracked: set[int] | None = None  # passes.assignable: the values that may have a gradient history, found once
    changed: set[Key] = field(default_factory=set)  # attributes, and registered buffers, that the run changed
    reached: tuple[set[int] | None] | None = None  # passes.updating: from which memory gradients can come, found once
    updates: dict[int, Any] | None = None  # passes.updates: which events update buffers, found once
    ran: dict[int, dict[CodeType, dict[str, Any]]] = field(default_factory=dict)  # by frame: the code that ran there, and its globals
    strides: set[int] = field(default_factory=set)  # frames that read how a tensor lies in memory
    untracked_views: set[int] = field(default_factory=set)  # values: views made under ``no_grad``
    # Where forward switched gradient tracking on: the call that did, the events from and up to which.
    switched_on: list[tuple[int, int, int]] = field(default_factory=list)
    ran_known: bool = True  # False: somebody's profiler was on, and ``ran`` is empty


def refs_in(tree: Any) -> list[int]:
    """The values among arguments or results."""
    if isinstance(tree, Ref):
        return [tree.value]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return [value for part in parts for value in refs_in(part)]
