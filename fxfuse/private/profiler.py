"""What PyTorch's CPU allocator gave out and took back during a call, in bytes and in order.

Private: the recorder in ``torch._C._autograd``, silent and ten times cheaper than ``torch.profiler``, which stands in for it where it is
gone; of that one the list of events in the order of time (``kineto_results``), which its public tables sum up per op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_autograd: Any = torch._C._autograd


def is_profiling() -> bool:
    """Does a profiler run? PyTorch runs one at a time."""
    return bool(_autograd._profiler_enabled())


def has_recorder() -> bool:
    """Is the cheap recorder there?"""
    return hasattr(_autograd, "_enable_profiler_legacy")


def recorded(fn: Callable[[], object]) -> list[int]:
    """The allocations (positive) and releases (negative) while ``fn`` runs, by the recorder."""
    from torch._C._profiler import ProfilerConfig, ProfilerState, _ExperimentalConfig

    # (state, report shapes, profile memory, stacks, flops, modules, experimental)
    _autograd._enable_profiler_legacy(ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, _ExperimentalConfig()))
    try:
        fn()
    finally:
        threads: Any = _autograd._disable_profiler_legacy()
    return [event.cpu_memory_usage() for events in threads for event in events if event.kind() == "memory_alloc"]


def profiled(fn: Callable[[], object]) -> list[int]:
    """The same by ``torch.profiler``."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        fn()
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
