"""What torch.compile cannot trace is done beside the trace: programs are looked for, and made, before the trace reads which there are.

Comes in: a region and a call of it that dynamo traces. Goes out: the region as its own code would leave it before such a call: ready, with
a program for the call's dtypes under autocast and for the order of its inputs in memory. What then runs the loop is counted as a fallback.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any
from weakref import ref

from fxfuse.private.while_traced import comptime, local_example, local_object, not_compiling, start_anew, trace_now

from .entries import FORWARD
from .runtime import Compiled

if TYPE_CHECKING:
    from .region import RegionState

log = logging.getLogger(__name__)


def prepare_while_traced(state: RegionState, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Called in the traced code, before it looks at ``state``. What is read first is guarded, and must not change any more."""
    comptime()(_prepare)


def count_while_traced(state: RegionState, reason: str) -> None:
    """Note that the traced call runs the loop; how often the compiled code does so is not known."""
    comptime()(_count)


def _prepare(context: Any) -> None:
    state: RegionState | None = None
    before: Any = None
    try:
        state = local_object(context, "state")
        name: str = local_object(context, "name")
        state.traced_reason, before = "", _shown(state)
        with not_compiling():
            if state.ready is None:
                state.prepare()
            programs = _programs(state, name) if state.ready is not None else []
            if programs:
                args, kwargs = local_example(context, "args"), local_example(context, "kwargs")
                state.traced_reason = _made_to_fit(state, programs, name, tuple(args), dict(kwargs))
    except Exception:  # an argument that is no tensor, number, or container of such, as torch says in many ways: the trace goes on without
        log.debug("nothing is prepared for a traced call", exc_info=True)
    if state is not None:
        trace = trace_now()
        if _shown(state) != before and state.traced_by is not None and state.traced_by() is trace:
            start_anew("a program was made for a later call of a region")
        state.traced_by = None if trace is None else ref(trace)


def _shown(state: RegionState) -> Any:
    """What the traced code finds, as it is now."""
    return id(state.ready), id(state.current), {name: [*map(id, programs)] for name, programs in state.methods.items()}


def _programs(state: RegionState, name: str) -> list[Compiled]:
    if name == FORWARD:
        return [] if state.current is None else [state.current, *state.methods.get(FORWARD, ())]
    return list(state.methods.get(name, ()))


def _made_to_fit(state: RegionState, programs: list[Compiled], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Let a program fit the call; why none fitted, where it should run the loop all the same. Asks as the traced code does."""
    forward = getattr(state.region._fxfuse_base, name)
    spelled = [program.rebound(forward, args, kwargs) or (args, kwargs) for program in (programs[:1] if name == FORWARD else programs)]
    if any(program.fits(*call) for program in programs for call in ((args, kwargs), *spelled)):
        return ""
    return state.adapt(name, programs[0] if name == FORWARD else programs[-1], *spelled[-1])[1]


def _count(context: Any) -> None:
    state: RegionState = local_object(context, "state")
    reason: str = state.traced_reason or local_object(context, "reason")
    state.fallbacks.setdefault(f"{reason} (in what torch.compile made of it, uncounted)", 1)
