"""``fxfuse bench``: the loop, the fused model, ``vmap`` where possible, ``torch.compile``. The work is in ``measuring``."""

from __future__ import annotations

from typing import Any

import click

from . import options
from .options import Asked
from .screen import Screen


@click.command(cls=options.Command, short_help="The loop, the fused model, vmap, torch.compile: timed.", epilog="""\b
Examples:
  fxfuse bench model:Net --args '[128]' --inputs "float32[64,128]"
  fxfuse bench model:Net --inputs "float32[64,128]" --mode train --without compile
  fxfuse bench net.pt2 --inputs "float32[64,128]" --json""")
@options.model
@options.seconds
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Threads that torch uses. Default: torch's own choice.")
@click.option("--without", type=click.Choice(["vmap", "compile"]), multiple=True,
              help="Leave a candidate out. Compiling a long loop takes minutes.")
@click.pass_obj
def bench(screen: Screen, /, source: str, **values: Any) -> None:
    """Time SOURCE as it is, fused, by torch.func.vmap where that is possible, and by torch.compile.

    Medians of alternating runs: --mode infer times a forward without gradients, --mode train a forward and backward. Each candidate is
    first compared with the loop.
    """
    import torch

    from .measuring import measure, show
    from .prepare import prepare

    asked = Asked.of(values)
    threads = torch.get_num_threads()
    if values["threads"]:
        torch.set_num_threads(values["threads"])
    try:
        with screen.progress(7) as stage:
            subject = prepare(source, asked, stage)
            found = measure(subject, asked, seconds=values["seconds"], without=values["without"], stage=stage)
    finally:
        torch.set_num_threads(threads)
    show(screen, found)
    screen.result({"ok": True, "command": "bench", "source": source, **found.to_dict()})
