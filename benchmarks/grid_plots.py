"""The grid's results as SVG: how many times faster than the loop, by lanes, and how near the best form by hand.

Comes in: results, a folder. Goes out: the names of the files. Needs matplotlib (the extra ``bench``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

from benchmarks.grid_goals import MEASURES


def draw(results: list[dict[str, Any]], folder: Path, where: str) -> list[str]:
    """One file for each measure, with a point for each case."""
    names = []
    for measure in MEASURES:
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5))
        for family in dict.fromkeys(result["case"]["family"] for result in results):
            of_family = [r for r in results if r["case"]["family"] == family and "fused" in r["seconds"][measure]]
            points = [(r["case"]["lanes"], r["seconds"][measure]) for r in of_family]
            left.scatter([lanes for lanes, _ in points], [t["loop"] / t["fused"] for _, t in points], s=12, alpha=0.7, label=family)
            hand = [t for _, t in points if "by hand" in t]
            right.scatter([t["by hand"] * 1e6 for t in hand], [t["by hand"] / t["fused"] for t in hand], s=12, alpha=0.7, label=family)
        left.set(xscale="log", yscale="log", xlabel="lanes", ylabel="times the loop's speed", title=measure)
        right.set(xscale="log", xlabel="the best form by hand, microseconds", ylabel="share of its speed", title=where[:60])
        for axes in (left, right):
            axes.axhline(1.0, color="grey", linewidth=0.8)
        if left.get_legend_handles_labels()[0]:
            left.legend(fontsize=8)
        figure.tight_layout()
        path = folder / f"grid-{measure.replace(' ', '').replace('+', '-')}.svg"
        figure.savefig(path)
        pyplot.close(figure)
        names.append(path.name)
    return names
