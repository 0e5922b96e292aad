"""Is autocast on for any kind of device?

Private: ``torch._C._is_any_autocast_enabled``. The public ``torch.is_autocast_enabled`` asks for one kind of device at a time, and the
recorder asks at every call.
"""

from __future__ import annotations

import torch

_KINDS = ("cpu", "cuda", "xpu", "mps")


def any_autocast_enabled() -> bool:
    """True inside ``torch.autocast`` of any device.

    >>> any_autocast_enabled()
    False
    """
    return torch._C._is_any_autocast_enabled()


def autocast_on() -> tuple[tuple[str, torch.dtype], ...]:
    """The kinds of device for which autocast is on, each with its dtype.

    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     autocast_on()
    (('cpu', torch.bfloat16),)
    """
    if not any_autocast_enabled():
        return ()
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in _KINDS if _is_on(kind))


def _is_on(kind: str) -> bool:
    try:
        return torch.is_autocast_enabled(kind)
    except RuntimeError:  # a build of torch without that kind of device
        return False
