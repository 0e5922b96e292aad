"""``fxfuse verify``: are two models, or what was written from them, equal in numbers?"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from . import codes, options
from .failure import CommandError
from .options import Asked
from .screen import Screen

if TYPE_CHECKING:
    from .compare import Comparison, Row


@click.command(cls=options.Command, short_help="Compare two models or files, in numbers.", epilog="""\b
Examples:
  fxfuse verify model:Net net.pt2 --weights net.safetensors --inputs "float32[64,128]"
  fxfuse verify net.pt2 net.onnx --inputs "float32[64,128]" --rtol 1e-4
  fxfuse verify model:Loop model:Packed --mode train --inputs "float32[8,24]" && echo same

\b
Exit code 0: equal; 1: they differ. Others as in fxfuse --help.""")
@click.argument("a", type=options.PathOrName())
@click.argument("b", type=options.PathOrName())
@options.inputs
@options.factory
@click.option("--mode", type=click.Choice(["infer", "train"]), default="infer", show_default=True,
              help="infer: outputs in eval mode. train: in train mode, also gradients of inputs and of parameters of one name.")
@click.option("--rtol", type=float, metavar="R",
              help="Largest difference over the largest value, per tensor. Default: by dtype, 1e-5 in float32.")
@click.option("--static", is_flag=True, help="Compare at the batch size of --inputs only.")
@options.device
@options.seed
@options.allow_pickle
@options.as_json
@click.pass_obj
def verify(screen: Screen, /, a: str, b: str, **values: Any) -> int:
    """Run A and B on the same inputs, on fresh data and on other batch sizes, and compare the numbers.

    A and B are SOURCEs, or files that fxfuse convert wrote (.pt2, .onnx, .safetensors, a folder). --args and --weights go to each of
    them that is a factory; both factories start from one seed.
    """
    asked = Asked.of(values)
    rtol, gradients = values["rtol"], asked.mode == "train"
    if rtol is not None and not rtol >= 0:
        raise CommandError(f"--rtol {rtol} must be 0 or more", codes.USAGE)
    from .compare import compare, expected, fresh_calls
    from .prepare import checked_device, placed, ready
    from .specs import make_inputs

    with screen.progress(4) as stage:
        device = checked_device(asked.device)
        call = placed(make_inputs(asked.inputs, seed=asked.seed), asked, device)
        stage(f"loading {a}")
        one = ready(a, _for(a, asked), device)
        stage(f"loading {b}")
        two = ready(b, _for(b, asked), device)
        stage(f"running {a}")
        calls = fresh_calls(call, seed=asked.seed, other_batches=not values["static"])
        wanted = expected(one, calls, gradients=gradients, seed=asked.seed, name=a)
        stage(f"running {b}")
        result = compare(wanted, two, rtol=rtol, gradients=gradients, seed=asked.seed)
    show(screen, result)
    screen.result({"command": "verify", "a": a, "b": b, **result.to_dict()})
    return codes.OK if result.ok else codes.DIFFERENT


def show(screen: Screen, result: Comparison, most: int = 20) -> None:
    """For each call the output and the gradient that are furthest from their bounds, and the verdict."""
    shown: dict[tuple[str, bool], Row] = {}
    for row in result.rows:
        key = row.call, row.name.startswith("gradient")
        if key not in shown or row.badness > shown[key].badness:
            shown[key] = row
    cells = [
        [row.call, row.name, f"{row.max_abs:.1e}", f"{row.max_rel:.1e}", f"{row.bound:.0e}", row.note or ("" if row.ok else "differs")]
        for row in list(shown.values())[:most]
    ]
    if cells:
        screen.table(["inputs", "furthest apart", "difference", "relative", "allowed", ""], cells)
    screen.text(result.sentence())


def _for(source: str, asked: Asked) -> Asked:
    """Without what is for factories alone, where this is a file."""
    return asked if is_factory(source) else replace(asked, args=None, weights=None)


def is_factory(source: str) -> bool:
    """Does this name code, not a file?"""
    return ":" in source and not os.path.exists(source)
