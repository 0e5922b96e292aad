"""Where the report on a model is kept.

Comes in: a model that ``optimize`` returned, and its report. Goes out: the report again, with the fallbacks counted so far. It lies in the
module's ``__dict__`` (so that copies and pickles carry it), outside of its registered attributes.
"""

from __future__ import annotations

from collections import Counter

from torch import nn

from . import fused
from .errors import ArgumentError
from .report import Report

_FIELD = "_fxfuse_report"


def set_report(model: nn.Module, report: Report) -> None:
    """Keep ``report`` with ``model``."""
    model.__dict__[_FIELD] = report


def get_report(model: nn.Module) -> Report:
    """The report on a model that ``optimize`` returned, fused or not. Raises ``ArgumentError`` for any other.

    >>> get_report(nn.Linear(1, 1)).fused
    []
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"report needs a model that fxfuse.optimize returned; a {type(model).__name__} came")
    states = fused.regions(model)
    report = model.__dict__.get(_FIELD)
    if not isinstance(report, Report):
        report = Report(type(model).__name__, fused=[state.plan for state in states.values()])
        if not states:
            report.notes.append("fxfuse.optimize has not seen this model")
    report.fallbacks = Counter()
    for path, state in states.items():
        for reason, count in state.fallbacks.items():
            report.fallbacks[f"{path}: {reason}" if path else reason] += count
    return report
