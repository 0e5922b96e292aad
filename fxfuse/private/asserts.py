"""A condition on data that is checked on the device, without waiting for it.

Private: ``torch._assert_async``; reading the condition into Python would stop a GPU's queue.
"""

from __future__ import annotations

import torch


def assert_async(condition: torch.Tensor, message: str) -> None:
    """RuntimeError on the CPU, a device assert on a GPU."""
    torch._assert_async(condition, message)
