"""What the arguments of ``module.to(...)`` mean: (device, dtype, non_blocking, memory format).

Private: ``torch._C._nn._parse_to``. ``nn.Module.to`` itself asks it, and no public function tells.
"""

from __future__ import annotations

from typing import Any

import torch

from .torch_function import DisableTorchFunction


def parse_to(*args: Any, **kwargs: Any) -> tuple[torch.device | None, torch.dtype | None, bool, torch.memory_format | None]:
    """The arguments of one call, unseen by recorders.

    >>> parse_to("cpu", torch.float64)
    (device(type='cpu'), torch.float64, False, None)
    """
    with DisableTorchFunction():
        parsed: Any = torch._C._nn._parse_to(*args, **kwargs)
    device, dtype, non_blocking, layout = parsed
    return device, dtype, non_blocking, layout
