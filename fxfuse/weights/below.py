"""The parameters or buffers of a part of a fused region, asked for by itself: ``fused.experts.parameters()``.

Comes in: a module inside of a region. Goes out: what it has of its own; packs whose lanes all lie in it; of other packs views of its lanes,
which no optimizer takes. A part without parameters would let a param group train nothing, unnoticed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .lane import Slot, lane_info
from .lane_parameter import lane_parameter


def parameters_below(module: nn.Module, prefix: str, remove_duplicate: bool) -> Iterator[tuple[str, Tensor]]:
    """As ``named_parameters``: a pack comes once, under the name of the first of its lanes."""
    return _below(module, prefix, remove_duplicate, "parameter")


def buffers_below(module: nn.Module, prefix: str, remove_duplicate: bool) -> Iterator[tuple[str, Tensor]]:
    """As ``named_buffers``; views of single lanes are plain tensors."""
    return _below(module, prefix, remove_duplicate, "buffer")


def _below(module: nn.Module, prefix: str, remove_duplicate: bool, kind: str) -> Iterator[tuple[str, Tensor]]:
    lanes: dict[int, set[int]] = {}  # by pack, those that lie here
    for below in module.modules():
        info = lane_info(below)
        for lane in info.slots.values() if info is not None else ():
            lanes.setdefault(id(lane.packed()), set()).add(lane.index)
    seen: set[Any] = set()
    for path, below in module.named_modules(prefix=prefix, remove_duplicate=remove_duplicate):
        info = lane_info(below)
        slots: dict[str, Slot] = {} if info is None else {n: s for n, s in info.slots.items() if s.recipe.kind == kind}
        own: dict[str, Tensor | None] = below._parameters if kind == "parameter" else below._buffers
        for name in dict.fromkeys((*(() if info is None else info.parameters if kind == "parameter" else info.buffers), *own)):
            slot = slots.get(name)
            value = own.get(name)
            if slot is not None:
                packed = slot.packed()
                entire = len(lanes[id(packed)]) == len(slot.recipe.members)
                key: Any = id(packed) if entire else (id(packed), slot.index)
                if key in seen and (remove_duplicate or entire):
                    continue
                seen.add(key)
                plain = kind == "buffer" or torch.compiler.is_compiling()
                found = packed if entire else slot.view() if plain else lane_parameter(slot)
                yield f"{path}.{name}" if path else name, found
            elif value is not None and not (remove_duplicate and id(value) in seen):
                seen.add(id(value))
                yield f"{path}.{name}" if path else name, value
