"""``fxfuse convert``: a model, fused once, as a file that runs where fxfuse is not installed. The work is in ``conversion``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from . import codes, options
from .options import Asked
from .output import check_apart, check_out, ending
from .packages import need
from .screen import Screen

# What is needed to write each ending, known before minutes of work. A folder holds a .safetensors.
PACKAGES = {".pt2": (), ".aoti.pt2": (), ".onnx": ("onnx", "onnxscript", "onnxruntime", "numpy")}


@click.command(cls=options.Command, short_help="Fuse SOURCE and write it to OUT.", epilog="""\b
Examples:
  fxfuse convert model:Net --args '[128]' --weights net.safetensors --inputs "float32[64,128]" -o net.pt2
  fxfuse convert model:Net --inputs "float32[64,128]" -o net.onnx
  fxfuse convert net.pt2 --inputs "float32[64,128]" --static -o fused.pt2
  fxfuse convert model:Net --inputs "float32[64,128]" --mode train -o net       (a folder: weights, recipes, report)

\b
OUT by its ending:
  .pt2          torch.export: torch.export.load(path).module()(x), without fxfuse
  .onnx         ONNX, checked by onnxruntime
  .safetensors  the packed weights, and how they came from the original's
  .aoti.pt2     compiled by AOTInductor; needs a C++ compiler
  a folder      all of it: model, weights, recipes, the report""")
@options.source
@click.option("-o", "--out", required=True, metavar="OUT", type=options.PathOrName(), help="What to write, by its ending (below).")
@options.inputs
@options.factory
@click.option("--static", is_flag=True, help="For the batch size of --inputs only. Default: any batch size.")
@options.fusing
@options.device
@options.seed
@options.allow_pickle
@options.as_json
@click.pass_obj
def convert(screen: Screen, /, source: str, out: str, static: bool, **values: Any) -> int:
    """Fuse SOURCE and write it to OUT, which runs without fxfuse.

    What was written is loaded again and compared with SOURCE, on fresh data and other batch sizes, before the command succeeds. An
    existing OUT is replaced then, and not before.
    """
    asked, start = Asked.of(values), time.perf_counter()
    target = Path(out)
    check_out(target, owned="recipes.json", parts=("model.pt2", "weights.safetensors"))
    check_apart(target, source=source if target.is_dir() else None, weights=asked.weights)  # of a folder the recipes would be lost
    need(f"writing {ending(target) or 'a folder'}", *PACKAGES.get(ending(target), ("safetensors", "numpy")))
    from .conversion import write
    from .fusing import nothing_fused
    from .prepare import prepare

    with screen.progress(8) as stage:
        subject = prepare(source, asked, stage)
        written, report, result = write(subject, asked, target, static, stage)
    note = nothing_fused(report)
    if note:
        click.echo(f"fxfuse: {note}", err=True)
    screen.text(f"{out}: {written}")
    screen.text(str(report).split("\n\n")[0])
    screen.text(f"loaded again and compared with {source}: {result}")
    screen.result({
        "ok": True, "command": "convert", "source": source, "out": out, "kind": written.kind, "bytes": written.bytes,
        "notes": written.notes,
        "compared": result, "seconds": time.perf_counter() - start, "report": report.to_dict(),
    })  # fmt: skip
    return codes.OK
