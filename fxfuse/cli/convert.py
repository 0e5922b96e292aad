"""``fxfuse convert``: a model, fused once, as a file that runs where fxfuse is not installed.

Order: OUT is checked; the model is loaded and its answers to fresh calls are kept; it is fused, written under a temporary name, and let
go; what was written is loaded again and gives the same answers; then it becomes OUT. So what is exported is what was verified.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

import fxfuse
from fxfuse import convert as files
from fxfuse import inputs as fresh
from fxfuse.convert import Written
from fxfuse.convert.folder import RECIPES
from fxfuse.convert.manifest import original_of
from fxfuse.convert.packed import read_manifest, read_tensors
from fxfuse.determinism import same_bits
from fxfuse.large import LARGE, weight_bytes

from . import codes, options
from .compare import compare, expected, fresh_calls
from .explain import fuse, nothing_fused
from .exported import Exported
from .failure import CommandError
from .options import Asked
from .output import check_out, check_room, replacing
from .prepare import Subject, prepare, set_mode
from .screen import Screen, Stage


@click.command(cls=options.Command, epilog="""\b
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
    check_out(target, owned=RECIPES)
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


def write(subject: Subject, asked: Asked, out: Path, static: bool, stage: Stage) -> tuple[Written, fxfuse.Report, str]:
    """Fuse, write, load again, compare, rename. Returns what was written, the report on the fused model and the verdict in words."""
    stage("running the original")
    call = subject.call
    static = static or (isinstance(subject.model, Exported) and subject.model.static)
    calls = fresh_calls(call, seed=asked.seed, other_batches=not static)
    wanted = expected(subject.model, calls, seed=asked.seed)
    if len(wanted) < 3 and not static and len(calls) > 2:  # the source itself is for one batch size
        static = True
    if not static and fresh.batch_size(*call) == 1:  # torch.export takes a size of 1 for a constant
        call = fresh.resample(*call, batch=4, seed=asked.seed)
    check_room(out, weight_bytes(subject.model))
    stage("fusing")
    large = weight_bytes(subject.model) > LARGE
    fused = fuse(subject, asked, inplace=large)
    set_mode(fused, asked.mode == "train")
    report = fxfuse.report(fused)
    with replacing(out) as temporary:
        written = files.write(fused, None, call, temporary, static=static, progress=stage)
        stage("loading it again")
        if written.kind == "safetensors":
            return written, report, _same_weights(temporary, fused if large else subject.model)
        subject.model = fused = nn.Module()  # what was written shall stand alone, and a large model is not there twice
        again = files.load(temporary, allow_pickle=written.kind == "aoti")  # ours, of this moment
        stage("comparing")
        result = compare(wanted, again, seed=asked.seed)
        if not result.ok:
            values_agree = all(row.ok for row in result.rows if row.name != "the call")
            hint = "; --static writes one batch size" if values_agree and not static else ""
            if written.kind == "onnx" and asked.mode == "train":
                hint = "; onnxruntime draws its own dropout, which cannot be compared: leave --mode train out, or write a .pt2"
            raise CommandError(f"{out} was not written: what was loaded again is {result.sentence()}{hint}", codes.DIFFERENT)
    return written, report, result.sentence()


def _same_weights(path: Path, model: nn.Module) -> str:
    """Packed weights hold no program to run: they are compared bit for bit, as the original's checkpoint."""
    found = original_of(read_manifest(path), read_tensors(path))
    own = {name: tensor for name, tensor in fxfuse.original_state_dict(model).items() if isinstance(tensor, torch.Tensor)}
    lost = [name for name, tensor in own.items() if name not in found or not same_bits(found[name], tensor.cpu())]
    if lost or found.keys() - own.keys():
        raise CommandError(f"{path.name} was not written: read again, {lost or sorted(found.keys() - own.keys())} differ", codes.DIFFERENT)
    return f"equal: {len(own)} tensors of the checkpoint, bit for bit"
