"""The parameters or buffers of a part of a fused region, asked for by itself: ``fused.experts.parameters()``.

Comes in: a module inside of a region. Goes out: what it has of its own; packs whose lanes all lie in it; of other packs views of its lanes,
which no optimizer takes. A part without parameters would let a param group train nothing, unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.errors import FxfuseError

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


def apply_below(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """``fn`` of the packs whose lanes all lie here. Raises ``FxfuseError`` where that would move or cast some lanes of a pack only."""
    slots: dict[tuple[int, str], list[Slot]] = {}
    for below in module.modules():
        info = lane_info(below)
        for lane in info.slots.values() if info is not None else ():
            slots.setdefault((id(lane.owner), lane.name), []).append(lane)
    entire = {
        key: len({lane.index for lane in lanes}) == len(lanes[0].recipe.members)
        and getattr(lanes[0].owner, lanes[0].store).get(lanes[0].name) is not None  # not cut into parts (``freeze``)
        for key, lanes in slots.items()
    }
    with torch.no_grad():
        for key in (key for key in slots if not entire[key]):
            for lane in slots[key]:
                own = lane.view().detach()
                made = fn(own)
                if (made.dtype, made.device) != (own.dtype, own.device):
                    said = f"{lane.recipe.name} packs {len(lane.recipe.members)} lanes, of which {lane.recipe.members[lane.index]} alone"
                    raise FxfuseError(f"{said} cannot become {made.dtype} on {made.device}: fxfuse.unfuse first")
    for key in (key for key in slots if entire[key]):
        holder, place = nn.Module(), slots[key][0]
        store = getattr(place.owner, place.store)
        getattr(holder, "_buffers" if place.recipe.kind == "buffer" else "_parameters")[place.name] = place.packed()
        holder._apply(fn)  # type: ignore[no-untyped-call]
        store[place.name] = getattr(holder, place.name)
    for watch in {id(lane.watch): lane.watch for lane in map(lane_info, module.modules()) if lane is not None}.values():
        watch.moved()
