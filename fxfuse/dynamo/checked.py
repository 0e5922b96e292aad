"""One graph of dynamo's rewritten and checked, or the reason why it stays; and how that is told.

Comes in: a graph, its inputs, the settings. Goes out: ``Captured`` and ``Rewritten``, or a ``Refusal``. Never an exception.
"""

from __future__ import annotations

import logging
import operator
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor

from fxfuse.graph import Refusal
from fxfuse.models.collector import paused
from fxfuse.models.determinism import preserved_state
from fxfuse.models.exclusive import alone
from fxfuse.models.quiet import quiet
from fxfuse.private.dynamo import is_open, without_compiled_autograd
from fxfuse.private.saved_hooks import unseen_by_hooks

from .captured import NUMBERS, Captured
from .check import check
from .rewrite import NO_LOOP, Rewritten, rewrite
from .settings import Settings
from .steps import Uncaptured

log = logging.getLogger(__name__)

# Reasons that are no failure: there is no loop, or it is better left as it is. They are logged.
NO_PIECE = "no piece of it can be fused"  # a piece that fails is told of by itself
DECISIONS = (NO_LOOP, NO_PIECE, NUMBERS, "left as a loop: ", " stays a loop: ")


def rewritten_or_refused(graph: torch.fx.Graph, inputs: Sequence[Any], settings: Settings) -> tuple[Captured, Rewritten] | Refusal:
    """The graph rewritten and checked, or why it stays. Never raises; what was done is logged."""
    start = time.perf_counter()
    try:
        # A collection goes through all that dynamo holds: 0.3 s for 128 lanes.
        with alone(), unseen_by_hooks(), without_compiled_autograd(), paused():
            made = _rewritten(graph, inputs, settings)
    except Exception as error:  # a failure inside fxfuse must not cost anybody a compilation
        log.debug("failed", exc_info=True)
        made = Refusal(f"fxfuse failed ({type(error).__name__}: {first_line(error)}); please report it")
    if not isinstance(made, Refusal):
        for op in made[1].ops:
            log.info("%d lanes of %s as one: %s %s (%s)", op.lanes, op.op, op.lowering, op.detail, op.place)
        for refusal in made[1].refusals:
            log.info("%s", refusal)
    log.info("looked at, rewritten and checked in %.2f s", time.perf_counter() - start)
    return made


def tell(refusal: Refusal) -> None:
    """One warning that a graph goes to the inner backend as it is; where that is no failure, a line of the log."""
    text = f"fxfuse leaves a graph to the inner backend as it is: {refusal}"
    log.info("%s", text)
    if not any(said in refusal.reason for said in DECISIONS):
        warnings.warn(text, UserWarning, stacklevel=2)


def first_line(error: Exception) -> str:
    """What an error says, without what follows."""
    return str(error).partition("\n")[0]


def _rewritten(graph: torch.fx.Graph, inputs: Sequence[Any], settings: Settings) -> tuple[Captured, Rewritten] | Refusal:
    """The graph rewritten and checked, or why it stays."""
    try:
        captured = Captured(graph, inputs)
    except Uncaptured as reason:
        return Refusal(str(reason))
    with quiet(), torch.inference_mode(False), preserved_state(captured):
        rewritten = rewrite(captured, settings)
    if isinstance(rewritten, Refusal):
        return rewritten
    if settings.validate:
        outcome = check(captured, rewritten)
        log.debug("%s", outcome)
        if not outcome.ok:
            return Refusal(f"undone: the rewritten form differs: {outcome.reason}")
    return _unguarded(captured, rewritten) or (captured, rewritten)


_COMPARE = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt, "!=": operator.ne}


def _unguarded(captured: Captured, rewritten: Rewritten) -> Refusal | None:
    """What the rewritten form takes for granted of open sizes becomes a guard of dynamo's; why it cannot, where it cannot."""
    nodes = {slot.input: slot.node for slot in captured.slots if slot.input >= 0}
    for symbol in rewritten.held:
        index, dim = symbol.places[0]
        operator.index(nodes[index].meta["example_value"].shape[dim])  # guards
    for given in rewritten.program.guard.sizes:
        example = nodes[given.input].meta.get("example_value")
        size = example.shape[given.dim] if isinstance(example, Tensor) else None
        if not is_open(size):
            continue
        if given.op == "==":
            return Refusal(f"the fused form would hold the size {size} at {given.bound}, which is open here")
        compare: Any = _COMPARE[given.op]
        if not compare(size, given.bound):  # guards
            return Refusal(f"the fused form is for sizes {size} {given.op} {given.bound}")
    return None
