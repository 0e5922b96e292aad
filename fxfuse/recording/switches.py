"""Gradient tracking switched on and off while a run is recorded: by ``no_grad``, ``enable_grad``, ``set_grad_enabled``.

Comes in: each switch, as it is about to be thrown. Goes out: ``Switches``: is tracking off, and between which events was it switched on?
"""

from __future__ import annotations

from types import FrameType

import torch


class Switches:
    """``untracked``: inside of ``no_grad``. ``lasting``: ``set_grad_enabled(True)`` was called, and nothing switches back.

    ``spans``: where forward switched tracking on, whether it was on before or not: the call that did, the events from and up to which.
    """

    def __init__(self, spans: list[tuple[int, int, int]]) -> None:
        self.untracked = self.lasting = False
        self.spans = spans
        self.in_function = False  # a custom autograd Function was seen, which switches tracking off unseen
        self.entered: list[tuple[bool, int]] = []  # by ``with``: on or off, and the call that does it
        self.since = 0  # the event from which on it is on

    def thrown(self, on: bool, frame: FrameType, at: int, now: int) -> None:
        """``frame`` is about to switch, in the call ``at``, before the event ``now``.

        A switch inside of a custom autograd Function says nothing on what is around it.
        """
        if not torch.is_grad_enabled() and not self.untracked:
            self.in_function = True
        self.untracked = not on and not self.in_function
        by = _switching(frame)
        self.lasting = on and by == "__init__"  # ``with set_grad_enabled(True)`` goes on to enter it
        before = self.entered[-1] if self.entered else (False, -1)
        if by == "__enter__":
            self.entered.append((on, at))
        elif by == "__exit__" and self.entered:
            self.entered.pop()
        else:
            return
        after = bool(self.entered and self.entered[-1][0])
        if before[0] and (by == "__exit__" or not after):  # it ends, or a part of what is tracked is not
            self.spans.append((before[1], self.since, now))
        if after and (by == "__exit__" or not before[0]):
            self.since = now


def _switching(frame: FrameType) -> str:
    """What switches: ``__enter__`` or ``__exit__`` of a context (``no_grad`` calls ``set_grad_enabled`` in these), or ``__init__``."""
    outer = frame.f_back
    inside = frame.f_code.co_name == "__init__" and outer is not None and outer.f_code.co_filename == frame.f_code.co_filename
    return outer.f_code.co_name if inside and outer is not None else frame.f_code.co_name
