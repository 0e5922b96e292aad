"""``--inputs`` on a command line: the arguments a model is called with.

Comes in: specs such as ``float32[8,24]`` in argument order, ``name=int64[8,16]<100`` for keywords and index ranges, or one ``.pt`` file.
Goes out: ``(args, kwargs)``. Files are read weights-only: tensors and containers of them, no code.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import codes
from .failure import CommandError, one_line

Call = tuple[tuple[Any, ...], dict[str, Any]]

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128".split()
}
HOW = 'write "float32[8,24]", "name=int64[8,16]<100", or the path of a .pt file'
_SPEC = re.compile(r"(?:(?P<name>[^\W\d]\w*)=)?(?P<dtype>[A-Za-z_]\w*)\[(?P<shape>[0-9,\s]*)\](?:<(?P<bound>[^<]+))?")
_NUMBER = r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?"
_SCALAR = re.compile(rf"(?P<name>[^\W\d]\w*)=(?P<value>true|false|null|none|True|False|None|{_NUMBER})")


def make_inputs(specs: Sequence[str], *, seed: int = 0) -> Call:
    """The arguments of one call: floating numbers from a normal distribution, integers uniform below the bound (without one 0 and 1).

    A bound on floating numbers makes them uniform in 0 to the bound. ``name=3``, ``name=true`` give plain values by keyword. Raises
    ``CommandError``.

    >>> (x,), kwargs = make_inputs(["float32[2,3]", "index=int64[4]<7", "scale=2", "mask=bool[]"])
    >>> x.shape, kwargs["index"].dtype, int(kwargs["index"].max()) < 7, kwargs["scale"], kwargs["mask"].shape
    (torch.Size([2, 3]), torch.int64, True, 2, torch.Size([]))
    """
    if not specs:
        raise CommandError(f"the model's inputs are missing: give --inputs, {HOW}", codes.USAGE)
    files = [spec for spec in specs if _is_file(spec)]
    if files:
        if len(specs) > 1:
            raise CommandError(f"--inputs {files[0]} holds all arguments: leave the other --inputs out", codes.USAGE)
        return read_inputs(Path(files[0]))
    random = torch.Generator().manual_seed(seed)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for spec in specs:
        name, value = parse(spec, random)
        if name is None:
            args.append(value)
        elif name in kwargs:
            raise CommandError(f"--inputs names {name} twice: leave one out", codes.USAGE)
        else:
            kwargs[name] = value
    return tuple(args), kwargs


def _is_file(spec: str) -> bool:
    return spec.endswith((".pt", ".pth", ".bin")) or (os.path.isfile(spec) and "[" not in spec)


def parse(spec: str, random: torch.Generator) -> tuple[str | None, Any]:
    """``(name or None, value)`` of one spec. Raises ``CommandError``.

    >>> parse("n=-1.5", torch.Generator())
    ('n', -1.5)
    """
    text = spec.strip()
    scalar = _SCALAR.fullmatch(text)
    if scalar is not None:
        return scalar["name"], json.loads(scalar["value"].lower().replace("none", "null"))
    match = _SPEC.fullmatch(text)
    if match is None:
        raise CommandError(f"--inputs {spec!r} does not parse: {HOW}", codes.USAGE)
    dtype = DTYPES.get(match["dtype"])
    if dtype is None:
        raise CommandError(f"--inputs {spec!r}: {match['dtype']} is no dtype; use one of {', '.join(DTYPES)}", codes.USAGE)
    parts = [part.strip() for part in match["shape"].split(",")]
    if parts == [""]:
        parts = []
    if not all(parts):
        raise CommandError(f"--inputs {spec!r}: a size is missing between the commas: {HOW}", codes.USAGE)
    shape = [int(part) for part in parts]
    if max([1, *shape]) > 1 << 44 or math.prod(shape) * dtype.itemsize > 1 << 44:
        raise CommandError(f"--inputs {spec!r} is larger than what fits in memory", codes.USAGE)
    return match["name"], _drawn(spec, shape, dtype, match["bound"], random)


def _drawn(spec: str, shape: list[int], dtype: torch.dtype, bound: str | None, random: torch.Generator) -> Tensor:
    exact = not (dtype.is_floating_point or dtype.is_complex)
    limit = 2.0
    if bound is not None:
        try:
            limit = float(bound)
        except ValueError:
            raise CommandError(f"--inputs {spec!r}: {bound!r} after < is no number: {HOW}", codes.USAGE) from None
        if dtype.is_complex or dtype is torch.bool:
            raise CommandError(f"--inputs {spec!r}: {str(dtype).removeprefix('torch.')} takes no range: leave <{bound} out", codes.USAGE)
        if not limit > 0 or not math.isfinite(limit) or (exact and limit != int(limit)):
            raise CommandError(f"--inputs {spec!r}: the range after < must be a {'whole ' if exact else ''}number above 0", codes.USAGE)
        if exact and limit - 1 > torch.iinfo(dtype).max:
            what = f"{str(dtype).removeprefix('torch.')} holds no numbers up to {bound}"
            raise CommandError(f"--inputs {spec!r}: {what}: use a wider dtype", codes.USAGE)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=random).bool()
    if exact:
        return torch.randint(0, int(limit), shape, generator=random).to(dtype)
    if bound is not None:
        return (torch.rand(shape, generator=random, dtype=torch.float64) * limit).to(dtype)
    return torch.randn(shape, generator=random, dtype=torch.complex128 if dtype.is_complex else torch.float64).to(dtype)


def read_inputs(path: Path) -> Call:
    """The arguments in a ``.pt`` file: a tensor, a list or tuple of positional ones, a dict of keyword ones, or both as
    ``{"args": (...), "kwargs": {...}}``. Raises ``CommandError``."""
    if path.exists() and not path.is_file():
        raise CommandError(f"{path} is {'a folder' if path.is_dir() else 'no file'}: write the inputs with torch.save((x, y), path)")
    try:
        value = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise CommandError(f"there is no file {path}") from None
    except (PermissionError, IsADirectoryError) as error:
        raise CommandError(f"{path} cannot be read: {one_line(error.strerror)}") from None
    except Exception as error:
        if "eights only" in str(error) or "Unsupported" in str(error):
            raise CommandError(f"{path} holds more than tensors (pickled code is not run): save it with torch.save((x, y), path)") from None
        reason = one_line(str(error).partition(". ")[0])
        raise CommandError(f"{path} cannot be read ({reason}): write it with torch.save((x, y), path)") from None
    if isinstance(value, Tensor):
        return (value,), {}
    if isinstance(value, (list, tuple)):
        return tuple(value), {}
    if isinstance(value, dict):
        if value and set(value) <= {"args", "kwargs"} and isinstance(value.get("args", ()), (list, tuple)):
            return tuple(value.get("args", ())), dict(value.get("kwargs", {}))
        if all(isinstance(key, str) for key in value):
            return (), dict(value)
    raise CommandError(f"{path} holds a {type(value).__name__}: save a tensor, a tuple of arguments, or a dict of keywords")
