"""Which names ``state_dict()`` of a fused model writes: those of its packs, or the original's, for other people's savers.

Comes in: a fused model and a format. Goes out: the model, set to it. Loading takes either at any time.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from fxfuse.errors import ArgumentError
from fxfuse.fused import regions
from fxfuse.region import RegionState


class checkpoint_format:
    """From here on ``model.state_dict()`` writes ``"original"`` or ``"packed"`` names; as a context manager, within the block only.

    With ``"original"`` lanes' tensors are contiguous copies, as safetensors needs them: load what comes back with ``load_state_dict``. The
    setting goes with copies and saved models. Raises ``ArgumentError`` for another format.

    >>> _ = checkpoint_format(nn.Linear(2, 3), "original")
    """

    def __init__(self, model: nn.Module, format: Literal["original", "packed"]) -> None:
        if format not in ("original", "packed"):
            raise ArgumentError(f"format must be 'original' or 'packed', {format!r} came")
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"model must be a torch.nn.Module, a {type(model).__name__} came")
        self.before: list[tuple[RegionState, bool]] = []
        for state in regions(model).values():
            self.before.append((state, state.original_names))
            state.original_names = format == "original"

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: Any) -> None:
        for state, before in self.before:
            state.original_names = before
