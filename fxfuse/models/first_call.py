"""Models that wait for their first call, among the modules of another.

Comes in: a model. Goes out: the same, whose parts wait no longer: they are fused with the whole.
"""

from __future__ import annotations

from torch import nn

from .module_tree import all_modules
from .undo import Undo


class Waiting:
    """What stands in for ``forward`` on a module until its first call."""


def drop_first_calls(model: nn.Module, undo: Undo | None = None) -> None:
    """Let ``model`` and its parts be called as they are written. ``undo`` is given the way back."""
    for module in all_modules(model):
        if isinstance(module.__dict__.get("forward"), Waiting):
            if undo is not None:
                undo.keep([module])
            del module.__dict__["forward"]
