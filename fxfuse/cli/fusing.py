"""``fxfuse.optimize`` for a command line.

Comes in: a model with an example call, and the options. Goes out: the fused model; why nothing fused.
"""

from __future__ import annotations

from torch import nn

import fxfuse
from fxfuse.report import Report

from .options import Asked
from .prepare import Subject


def fuse(subject: Subject, asked: Asked, *, inplace: bool = False) -> nn.Module:
    """``fxfuse.optimize`` as the command line asks for it."""
    args, kwargs = subject.call
    return fxfuse.optimize(
        subject.model, args, example_kwargs=kwargs, mode=asked.mode, objective=asked.objective, lowering=asked.lowering, inplace=inplace,
    )  # fmt: skip


def nothing_fused(report: Report) -> str:
    """Why nothing fused, in a sentence; empty where something did."""
    if report.fused:
        return ""
    reasons = [str(refusal) for refusal in report.refused]
    return f"nothing was fused: {reasons[0]}" if reasons else "nothing was fused: no loop was found"
