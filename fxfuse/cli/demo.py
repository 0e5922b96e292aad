"""``fxfuse demo``: a network per feature, fused and timed on this machine."""

from __future__ import annotations

from typing import Any

import click

from . import options
from .options import Asked
from .screen import Screen


@click.command(cls=options.Command, short_help="An example model, fused and timed here.", epilog="""\b
Examples:
  fxfuse demo
  fxfuse demo --features 32 --mode train""")
@click.option("--features", type=click.IntRange(min=2), default=128, show_default=True, help="How many networks the loop has.")
@click.option("--hidden", type=click.IntRange(min=1), default=32, show_default=True, help="Their width.")
@click.option("--batch", type=click.IntRange(min=1), default=64, show_default=True, help="Rows of the input.")
@options.seconds
@options.fusing
@options.seed
@options.as_json
@click.pass_obj
def demo(screen: Screen, /, features: int, hidden: int, batch: int, seconds: float, **values: Any) -> None:
    """Fuse a loop over one small network per feature: the report, then the speed on this machine."""
    import torch

    from .feature_networks import FeatureNetworks
    from .measuring import measure, show
    from .pages import show_report
    from .prepare import Subject

    asked = Asked.of(values)
    torch.manual_seed(asked.seed)
    model = FeatureNetworks(features, hidden).train(asked.mode == "train")
    subject = Subject("FeatureNetworks", model, ((torch.randn(batch, features),), {}))
    with screen.progress(6) as stage:
        found = measure(subject, asked, seconds=seconds, without=("compile",), stage=stage)
    screen.text("The model, as it was written: one small network per feature.\n")
    screen.text("    for i, network in enumerate(self.feature_networks):")
    screen.text("        output[:, i] = network(x[:, i : i + 1]).squeeze(-1)\n")
    screen.text("The one line that was run:\n")
    screen.text(f'    fused = fxfuse.optimize(model, x, mode="{asked.mode}")\n')
    show_report(screen, found.report)
    screen.text()
    show(screen, found)
    screen.text("\nNext, your own model: fxfuse explain package.module:factory --inputs \"float32[64,128]\"")
    screen.result({"ok": True, "command": "demo", **found.to_dict()})
