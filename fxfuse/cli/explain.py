"""``fxfuse explain``: what fuses, what does not and why. Writes nothing."""

from __future__ import annotations

from typing import Any

import click

from . import options
from .options import Asked
from .screen import Screen


@click.command(cls=options.Command, short_help="What would fuse, what would not, and why.", epilog="""\b
Examples:
  fxfuse explain model:Net --args '[128]' --inputs "float32[64,128]"
  fxfuse explain net.pt2 --inputs "float32[64,128]" --mode train
  fxfuse explain model:Net --inputs "int64[8,16]<100" --json | jq .report.refused""")
@options.model
@click.pass_obj
def explain(screen: Screen, /, source: str, **values: Any) -> None:
    """What would fuse in SOURCE, what would not, and why. Nothing is written."""
    import fxfuse

    from .fusing import fuse
    from .pages import show_report
    from .prepare import prepare

    asked = Asked.of(values)
    with screen.progress(2) as stage:
        subject = prepare(source, asked, stage)
        stage("fusing")
        report = fxfuse.report(fuse(subject, asked))
    show_report(screen, report)
    screen.result({"ok": True, "command": "explain", "source": source, "report": report.to_dict()})
