"""How a lane's input is taken from the tensor ``h`` that all lanes have.

``FORKS[name](lane's shape, lanes)`` gives the shape that rows of ``h`` must have, the lane's input as an expression of ``{i}``,
the lane, and a line before the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .source import Shape


class Fork(NamedTuple):
    """``shape`` of the rows of ``h``; ``line`` before the loop; the lane's input."""

    shape: Shape
    expression: str
    line: str = ""


FORKS: dict[str, Callable[[Shape, int], Fork]] = {
    "shared": lambda s, g: Fork(s, "h"),
    "slice": lambda s, g: Fork((g * s[0], *s[1:]), f"h[:, {{i}} * {s[0]} : ({{i}} + 1) * {s[0]}]"),
    "select": lambda s, g: Fork((g, *s), "h[:, {i}]"),
    "method": lambda s, g: Fork((g, *s), "h.select(1, {i})"),
    "last": lambda s, g: Fork((*s, g), "h[..., {i}]"),
    "middle": lambda s, g: Fork((s[0], g, *s[1:]), "h[:, :, {i}]"),
    "strided": lambda s, g: Fork((g * s[0], *s[1:]), f"h[:, {{i}} :: {g}]"),
    "chunk": lambda s, g: Fork((g * s[0], *s[1:]), "parts[{i}]", f"parts = h.chunk({g}, 1)"),
    "split": lambda s, g: Fork((g * s[0], *s[1:]), "parts[{i}]", f"parts = torch.split(h, {s[0]}, dim=1)"),
    "unbind": lambda s, g: Fork((g, *s), "parts[{i}]", "parts = h.unbind(1)"),
    "unbind_last": lambda s, g: Fork((*s, g), "parts[{i}]", "parts = torch.unbind(h, dim=-1)"),
    "tensor_split": lambda s, g: Fork((g * s[0], *s[1:]), "parts[{i}]", f"parts = h.tensor_split({g}, dim=1)"),
    "narrow": lambda s, g: Fork((g * s[0], *s[1:]), f"h.narrow(1, {{i}} * {s[0]}, {s[0]})"),
    "reverse": lambda s, g: Fork((g, *s), f"h[:, {g - 1} - {{i}}]"),
    "negative": lambda s, g: Fork((g, *s), "h[:, -1 - {i}]"),
    "transposed": lambda s, g: Fork((g, *s), "h.transpose(0, 1)[{i}]"),
    "neighbours": lambda s, g: Fork((g, *s), f"h[:, {{i}}] + h[:, ({{i}} + 1) % {g}]"),
    "products": lambda s, g: Fork((g + 1, *s), "h[:, 0] * h[:, {i} + 1]"),
    "overlap": lambda s, g: Fork((g + s[0] - 1, *s[1:]), f"h[:, {{i}} : {{i}} + {s[0]}]"),
    "columns": lambda s, g: Fork((g, *s[1:]), f"h[:, [({{i}} + k) % {g} for k in range({s[0]})]]"),
    "scaled": lambda s, g: Fork(s, "h * ({i} + 1)"),
    "unsqueezed": lambda s, g: Fork((g, *s[1:]), f"h[:, {{i}}].unsqueeze(1).repeat(1, {s[0]}{', 1' * (len(s) - 1)})"),
    "prefix": lambda s, g: Fork((g, *s), "h[:, : {i} + 1].sum(1)"),
    "others": lambda s, g: Fork((g, *s), "h.sum(1) - h[:, {i}]"),
    "joined": lambda s, g: Fork((g, *s), "torch.cat([h[:, {i}], h.mean(1)], -1)"),
    "twice": lambda s, g: Fork((g, *s), "h[:, {i} // 2]"),
    "ellipsis": lambda s, g: Fork((g, *s), "h[:, {i}, ...].contiguous()"),
    "flipped": lambda s, g: Fork((g, *s), "h.flip(1)[:, {i}]"),
}  # fmt: skip

# What the model itself may be given instead of one tensor: how lane ``i`` reads its own.
CONTAINERS = {"list": "h[{i}]", "dict": 'h[f"f{{{i}}}"]', "front": "h[{i}]"}
