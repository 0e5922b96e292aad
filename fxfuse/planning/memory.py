"""How much tensor memory a call needs at its worst moment.

Comes in: a function without arguments. Goes out: bytes. On the CPU every allocation that PyTorch's allocator reports is counted,
also the scratch memory inside kernels; on CUDA the caching allocator's own statistics are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from fxfuse.errors import FxfuseError
from fxfuse.models.collector import paused
from fxfuse.private import profiler


def peak_bytes(fn: Callable[[], object], *, device: torch.device | str | None = None) -> int:
    """Peak bytes of tensor memory allocated while ``fn`` runs, above what was allocated before.

    ``fn`` runs once: a forward, or a forward with backward; what it returns is dropped. Memory that it frees though it
    was allocated before is not credited on the CPU. ``device``: where to look; the CPU by
    default. On CUDA pending work is waited for, and the device's peak statistics are reset. Raises ``FxfuseError`` inside another
    profiler's range on the CPU, because PyTorch runs one profiler at a time. Method: running sum of the profiler's allocation events;
    the older recorder is used where present, for it is silent and ten times cheaper than the one behind ``torch.profiler``.

    >>> x = torch.zeros(1000)
    >>> peak_bytes(lambda: (x + 1) + 1) // 1000  # two results of 4,000 bytes are alive at once, and a few scalars
    8
    """
    where = torch.device("cpu" if device is None else device)
    if where.type == "cuda":
        return _cuda(fn, where)
    if profiler.is_profiling():
        raise FxfuseError("memory cannot be measured while a profiler is running: leave the profiler's range first")
    if not profiler.has_recorder():
        return _peak(profiler.profiled(fn))
    with paused():  # tensors in garbage from before: freed inside, they would count, and torch would warn of unknown blocks
        return _peak(profiler.recorded(fn))


def _peak(changes: Iterable[int]) -> int:
    now = peak = 0
    for change in changes:
        now += change
        peak = max(peak, now)
    return peak


def _cuda(fn: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    fn()
    torch.cuda.synchronize(device)
    return max(0, torch.cuda.max_memory_allocated(device) - before)
