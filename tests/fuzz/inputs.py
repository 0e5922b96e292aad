"""A model's inputs: their numbers, rows, memory layout, dtype, and how they are handed over."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from .source import Shape

LAYOUTS = ("plain", "transposed", "strided", "offset", "expanded", "channels_last", "reversed")
CONTAINERS = ("", "", "", "", "list", "dict", "front")
DTYPES = ("float64",) * 8 + ("float32", "bfloat16", "complex128", "int64")


def tensor(shape: Shape, layout: str, dtype: torch.dtype, seed: int) -> Tensor:
    """Numbers of that shape, the first size being the rows, in a memory layout that callers have."""
    generator = torch.Generator().manual_seed(seed)
    rows, rest = shape[0], shape[1:]

    def draw(*sizes: int) -> Tensor:
        if not dtype.is_floating_point and not dtype.is_complex:
            return torch.randint(-3, 4, sizes, generator=generator)
        real = torch.randn(*sizes, generator=generator, dtype=torch.float64)
        return torch.complex(real, torch.randn(*sizes, generator=generator, dtype=torch.float64)) if dtype.is_complex else real

    if layout == "transposed" and len(shape) > 1:
        made = draw(*shape[:-2], shape[-1], shape[-2]).to(dtype).transpose(-1, -2)
    elif layout == "strided" and len(shape) > 1:
        made = draw(*shape[:-1], 2 * shape[-1]).to(dtype)[..., ::2]
    elif layout == "offset":
        made = draw(rows + 2, *rest).to(dtype)[1 : rows + 1]
    elif layout == "expanded" and rows:
        made = draw(1, *rest).to(dtype).expand(shape)
    elif layout == "channels_last" and len(shape) in (4, 5):
        made = draw(*shape).to(dtype).to(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
    elif layout == "reversed":
        made = draw(*reversed(shape)).to(dtype).permute(*range(len(shape) - 1, -1, -1))
    else:
        made = draw(*shape).to(dtype)
    return made


def arguments(
    case: dict[str, Any], shape: Shape, lanes: int, rows: int, seed: int, dtype: torch.dtype | None = None
) -> tuple[Any, dict[str, Any]]:
    """``(args, kwargs)`` for one call: ``shape`` is that of a row of ``h``."""
    given = case["inputs"]
    dtype = dtype or getattr(torch, given["dtype"])

    def one(number: int, *sizes: int) -> Tensor:
        made = tensor(sizes, given["layout"], dtype, 1000 * seed + number)
        return made.requires_grad_() if given["grad"] and (made.is_floating_point() or made.is_complex()) else made

    if given["container"] == "list":
        x: Any = [one(i, rows, *shape) for i in range(lanes)]
    elif given["container"] == "dict":
        x = {f"f{i}": one(i, rows, *shape) for i in range(lanes)}
    elif given["container"] == "front":
        x = one(0, lanes, rows, *shape)
    else:
        x = one(0, rows, *shape)
    extra = {"z": one(99, rows)} if has_optional(given) else {}
    return ((), {"h": x, **extra}) if given["keywords"] else ((x, *extra.values()), {})


def has_optional(given: dict[str, Any]) -> bool:
    """May the model be given one number for each row besides?"""
    return bool(given["optional"]) and given["container"] != "front"


def inputs() -> st.SearchStrategy[dict[str, Any]]:
    """How a model is called."""
    return st.fixed_dictionaries({
        "dtype": st.sampled_from(DTYPES),
        "rows": st.sampled_from([4, 5, 2, 3, 1]),
        "layout": st.one_of(st.just("plain"), st.sampled_from(LAYOUTS)),
        "container": st.sampled_from(CONTAINERS),
        "keywords": st.sampled_from([False, False, True]),
        "optional": st.sampled_from([False, False, False, True]),
        "grad": st.sampled_from([True, True, False]),
    })  # fmt: skip
