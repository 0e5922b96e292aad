"""A failure inside fxfuse costs nobody their model.

Comes in: a model, and what was raised while it was fused. Goes out: the model, or a copy, with what to tell a bug tracker in its report.
"""

from __future__ import annotations

import traceback

from torch import nn

from .graph import Refusal
from .models.copies import independent_copy
from .report import Report
from .store import set_report
from .weights.weights import carry_over


def failed(model: nn.Module, error: Exception, report: Report, inplace: bool) -> nn.Module:
    """The model as it was; in the report what was raised, and where."""
    report.fused = []
    said = str(error).splitlines()[0] if str(error) else ""
    report.refused.append(Refusal(f"fxfuse failed ({type(error).__name__}: {said}); please report it"))
    report.notes.append(_traceback(error))
    result = model if inplace else spare(model, report)
    try:
        set_report(result, report)
    except Exception:  # whatever failed before: a working model matters more than what is said of it
        return result
    return result


def spare(model: nn.Module, report: Report) -> nn.Module:
    """An independent copy of the model, or the model itself where it cannot be copied."""
    try:
        copied = independent_copy(model)
        carry_over(model, copied)
        return copied
    except MemoryError:
        raise
    except Exception as error:
        report.notes.append(f"the model cannot be copied ({error}): it is returned itself")
        return model


def _traceback(error: BaseException) -> str:
    lines = traceback.format_exception(error)
    return "for a bug report: " + " ".join("".join(lines[-3:]).split())
