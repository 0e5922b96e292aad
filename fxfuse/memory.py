"""How much tensor memory a call needs at its worst moment.

Comes in: a function without arguments. Goes out: bytes. On the CPU every allocation that PyTorch's allocator reports is counted,
also the scratch memory inside kernels; on CUDA the caching allocator's own statistics are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from fxfuse.collector import paused
from fxfuse.errors import FxfuseError


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
    if torch._C._autograd._profiler_enabled():  # type: ignore[no-untyped-call, unused-ignore]
        raise FxfuseError("memory cannot be measured while a profiler is running: leave the profiler's range first")
    enable = getattr(torch._C._autograd, "_enable_profiler_legacy", None)
    return _peak(_recorded(fn, enable) if enable is not None else _profiled(fn))


def _peak(changes: Iterable[int]) -> int:
    now = peak = 0
    for change in changes:
        now += change
        peak = max(peak, now)
    return peak


def _recorded(fn: Callable[[], object], enable: Any) -> list[int]:
    from torch._C._profiler import ProfilerConfig, ProfilerState, _ExperimentalConfig

    # (state, report shapes, profile memory, stacks, flops, modules, experimental)
    enable(ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, _ExperimentalConfig()))
    try:
        with paused():  # tensors in garbage from before: freed here, they would count, and torch would warn of unknown blocks
            fn()
    finally:
        threads: Any = torch._C._autograd._disable_profiler_legacy()
    return [event.cpu_memory_usage() for events in threads for event in events if event.kind() == "memory_alloc"]


def _profiled(fn: Callable[[], object]) -> list[int]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        fn()
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def _cuda(fn: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    fn()
    torch.cuda.synchronize(device)
    return max(0, torch.cuda.max_memory_allocated(device) - before)
