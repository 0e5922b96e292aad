"""``fxfuse explain``: what fuses, what does not and why. Writes nothing."""

from __future__ import annotations

from typing import Any

import click
from torch import nn

import fxfuse
from fxfuse.report import Report

from . import options
from .options import Asked
from .pages import show_report
from .prepare import Subject, prepare
from .screen import Screen


@click.command(cls=options.Command, epilog="""\b
Examples:
  fxfuse explain model:Net --args '[128]' --inputs "float32[64,128]"
  fxfuse explain net.pt2 --inputs "float32[64,128]" --mode train
  fxfuse explain model:Net --inputs "int64[8,16]<100" --json | jq .report.refused""")
@options.model
@click.pass_obj
def explain(screen: Screen, /, source: str, **values: Any) -> None:
    """What would fuse in SOURCE, what would not, and why. Nothing is written."""
    asked = Asked.of(values)
    with screen.progress(2) as stage:
        subject = prepare(source, asked, stage)
        stage("fusing")
        report = fxfuse.report(fuse(subject, asked))
    show_report(screen, report)
    screen.result({"ok": True, "command": "explain", "source": source, "report": report.to_dict()})


def fuse(subject: Subject, asked: Asked, *, inplace: bool = False) -> nn.Module:
    """``fxfuse.optimize`` as the command line asks for it."""
    args, kwargs = subject.call
    return fxfuse.optimize(
        subject.model, args, example_kwargs=kwargs, mode=asked.mode, objective=asked.objective, lowering=asked.lowering, inplace=inplace,
    )  # fmt: skip


def nothing_fused(report: Report) -> str:
    """Why nothing fused, in a sentence; empty where something did."""
    if report.fused:
        return ""
    reasons = [str(refusal) for refusal in report.refused]
    return f"nothing was fused: {reasons[0]}" if reasons else "nothing was fused: no loop was found"
