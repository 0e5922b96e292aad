"""Is autocast on for any kind of device?

Private: ``torch._C._is_any_autocast_enabled``. The public ``torch.is_autocast_enabled`` asks for one kind of device at a time, and the
recorder asks at every call.
"""

from __future__ import annotations

import torch


def any_autocast_enabled() -> bool:
    """True inside ``torch.autocast`` of any device.

    >>> any_autocast_enabled()
    False
    """
    return torch._C._is_any_autocast_enabled()
