"""``fxfuse restore``: the packed weights of a folder as the original's checkpoint, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import codes, options
from .failure import CommandError
from .output import check_out, replacing
from .screen import Screen


@click.command(cls=options.Command, short_help="Weights in FOLDER as the original's checkpoint.", epilog="""\b
Examples:
  fxfuse restore net -o back.safetensors
  fxfuse convert model:Net --weights back.safetensors --inputs "float32[64,128]" -o net.pt2""")
@click.argument("folder", type=options.PathOrName())
@click.option("-o", "--out", required=True, metavar="OUT", type=options.PathOrName(), help="Where to write: back.safetensors.")
@options.as_json
@click.pass_obj
def restore(screen: Screen, /, folder: str, out: str, **values: Any) -> None:
    """Write the weights in FOLDER, further trained or not, as a checkpoint with the original model's names and shapes.

    FOLDER may also be one file: a .safetensors that fxfuse wrote, or what torch.save(fused.state_dict(), "net.pt") did.
    """
    from fxfuse import convert

    source, target = Path(folder), Path(out)
    if not source.exists():
        raise CommandError(f"there is no folder {folder}: give one that fxfuse convert wrote")
    check_out(target, (".safetensors", ".pt"))
    if target.exists() and any(held.exists() and target.samefile(held) for held in (source, source / "weights.safetensors")):
        raise CommandError(f"-o {out} holds the packed weights themselves, which would be lost: choose another -o", codes.OUTPUT)
    with screen.progress(2) as stage:
        stage("restoring")
        with replacing(target) as temporary:
            convert.restore(source, temporary)
            stage("reading it again")
            state = convert.read_weights(temporary)
    numbers = sum(tensor.numel() for tensor in state.values())
    screen.text(f"{out}: {len(state):,} tensors, {numbers:,} numbers, by the original's names")
    screen.result({"ok": True, "command": "restore", "folder": folder, "out": out, "tensors": len(state), "numbers": numbers})
