"""Which names ``state_dict()`` of a fused model writes: those of its packs, or the original's, for other people's savers.

Comes in: a fused model, an optimizer of it where there is one, and a format. Goes out: both, set to it. Loading takes either at any time.
"""

from __future__ import annotations

from typing import Any, Literal
from weakref import WeakKeyDictionary

from torch import nn

from fxfuse.errors import ArgumentError
from fxfuse.fused import regions

from .models.live_optimizers import unwrapped
from .optimizers.migrate import check_optimizer
from .optimizers.optimizer_state import Written
from .running.region import RegionState


class checkpoint_format:
    """From here on ``model.state_dict()`` writes ``"original"`` or ``"packed"`` names; as a context manager, within the block only.

    With ``"original"`` lanes' tensors are contiguous copies, as safetensors needs them: load what comes back with ``load_state_dict``. The
    setting goes with copies and saved models. An ``optimizer`` (or a list of such) over ``model`` writes the layout of the original's
    optimizer too, and takes either; that does not go with its copies. Raises ``ArgumentError`` for another format, and
    ``OptimizerError`` for an optimizer that cannot be migrated.

    >>> _ = checkpoint_format(nn.Linear(2, 3), "original")
    """

    def __init__(self, model: nn.Module, format: Literal["original", "packed"], *, optimizer: Any = None) -> None:
        if format not in ("original", "packed"):
            raise ArgumentError(f"format must be 'original' or 'packed', {format!r} came")
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"model must be a torch.nn.Module, a {type(model).__name__} came")
        optimizers = [] if optimizer is None else [*optimizer] if isinstance(optimizer, (list, tuple)) else [optimizer]
        for each in optimizers:
            check_optimizer(each)
        self.optimizers = [(each, _WRITTEN.get(each)) for each in map(unwrapped, optimizers)]
        for each, _ in self.optimizers:
            _set(each, model if format == "original" else None)
        self.before: list[tuple[RegionState, bool]] = []
        for state in regions(model).values():
            self.before.append((state, state.original_names))
            state.original_names = format == "original"

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: Any) -> None:
        for state, before in self.before:
            state.original_names = before
        for optimizer, written in self.optimizers:
            _set(optimizer, None if written is None else written.model)


_WRITTEN: WeakKeyDictionary[Any, Written] = WeakKeyDictionary()


def _set(optimizer: Any, model: nn.Module | None) -> None:
    written = _WRITTEN.pop(optimizer, None)
    if written is not None:
        written.remove()
    if model is not None:
        _WRITTEN[optimizer] = Written.by(optimizer, model)
