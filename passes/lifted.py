"""What lifting a module call gives, and why it can stop: the data and the two reasons that the files of the lifter share.

Comes in: nothing. Goes out: ``Lifted``, and the exceptions ``Refused`` and ``SizeDependent``, neither of which leaves ``lift``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.fx

from fxfuse.graph import Layout, Place, Refusal, SizeCheck, Store
from fxfuse.recording.trace import Frame

from .switched_on import Tracking

Sizes = list[dict[int, frozenset[int]]]


class Refused(Exception):
    """Inside a pass: this region cannot be lifted. Carries the refusal; never leaves ``lift``."""

    def __init__(self, reason: str, place: Place | None = None) -> None:
        super().__init__(reason)
        self.refusal = Refusal(reason, place)


class SizeDependent(Exception):
    """A size expression that is not safe for other sizes: lift again with every size fixed."""

    def __init__(self, reason: str, place: Place | None) -> None:
        super().__init__(reason)
        self.reason, self.place = reason, place


@dataclass
class Lifted:
    """The functional graph of one frame. ``constants`` are tensors that the graph reads by ``get_attr`` besides the module's own."""

    graph: torch.fx.Graph
    frame: Frame
    constants: dict[str, torch.Tensor]
    size_checks: list[SizeCheck]
    dynamic: dict[int, frozenset[int]]
    specialised: str = ""
    place: Place | None = None
    random: bool = False
    factories: bool = False  # tensors are made with the default dtype or device
    shapes: dict[int, tuple[int, ...]] = field(default_factory=dict)  # of the tensor inputs, by value
    stores: list[Store] = field(default_factory=list)  # attributes to set; their leaves follow the result's among the outputs
    sets: frozenset[tuple[str, str]] = frozenset()  # all attributes that the frame sets, closed calls in it too
    layouts: dict[int, Layout] = field(default_factory=dict)  # how inputs have to lie in memory, by their place among the leaves
    tracking: Tracking = field(default_factory=Tracking)  # where forward switches gradient tracking on
    sizes: Sizes = field(default_factory=list)  # the free sizes, each with the dims that have it
