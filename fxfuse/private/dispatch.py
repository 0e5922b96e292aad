"""Modes that see every ATen call, forward and backward: ``TorchDispatchMode``, with or without dynamo kept out.

Private: ``torch.utils._python_dispatch``; ``torch.overrides.TorchFunctionMode``, the public one, does not see autograd's own calls. A
subclass with a ``__torch_dispatch__`` of its own is wrapped by ``torch._disable_dynamo`` when it is made, and its first call then imports
dynamo (a second), which ``WithoutDynamo`` avoids.
"""

from __future__ import annotations

import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["CAST", "BesideDynamo", "TorchDispatchMode", "WithoutDynamo", "dynamo_is_imported"]

CAST = torch.ops.aten._to_copy.default  # what a mode sees of a cast, autocast's too


class WithoutDynamo(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode for a process that does not use dynamo: its subclasses are left as they are written."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class BesideDynamo:
    """Comes first among the bases of a subclass of a ``WithoutDynamo``: wrapped again, so that dynamo keeps out of it."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return True


def dynamo_is_imported() -> bool:
    """Has anything in this process imported dynamo so far?"""
    return "torch._dynamo" in sys.modules
