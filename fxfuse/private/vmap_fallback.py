"""A block in which ``torch.vmap`` raises where it would run an op without a batching rule lane by lane.

Private: the switch in ``torch._C._functorch``, whose stubs leave it out. Publicly vmap only warns, once per process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_functorch: Any = torch._C._functorch


@contextmanager
def without_vmap_fallback() -> Iterator[None]:
    """Inside, a missing batching rule is a RuntimeError; after it the switch is as it was."""
    before: bool = _functorch._is_vmap_fallback_enabled()
    _functorch._set_vmap_fallback_enabled(False)
    try:
        yield
    finally:
        _functorch._set_vmap_fallback_enabled(before)
