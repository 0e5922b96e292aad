"""What the grid's results say: the table, and each goal, reached or not.

Comes in: results, as ``grid.py`` keeps them. Goes out: text, and ``Goal``s. A goal of which no case was measured is neither.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fxfuse

Result = dict[str, Any]
MEASURES = ("inference", "forward + backward", "step with Adam")
SLOWER = 0.97
NOTICEABLE = 150e-6  # below, what counts is the overhead
OVERHEAD = 8e-6
MIB = 1 << 20


@dataclass(frozen=True)
class Goal:
    """``reached`` is None where nothing was measured that it speaks of."""

    name: str
    reached: bool | None
    said: str


def mean(values: Iterable[float]) -> float:
    """The geometric mean; nan of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def ratios(results: list[Result], measure: str, of: str, to: str = "fused") -> dict[str, float]:
    """How many times as long ``of`` takes as ``to``, by case."""
    found = {}
    for result in results:
        times = result["seconds"].get(measure, {})
        if of in times and to in times:
            found[result["key"]] = times[of] / times[to]
    return found


def printed(result: Result) -> str:
    """One case in one line."""
    parts = []
    for measure in MEASURES:
        times = result["seconds"].get(measure, {})
        if "fused" in times:
            hand = f" ({times['by hand'] / times['fused']:.2f} of by hand)" if "by hand" in times else ""
            parts.append(f"{measure} {times['loop'] / times['fused']:.2f}x{hand}")
    return f"{result['key']:<34} " + ", ".join(parts) + (" (left as a loop)" if result["left"] else "")


def table(results: list[Result]) -> str:
    """Per family, geometric means of the loop's time over each peer's."""
    peers = list(dict.fromkeys(name for result in results for times in result["seconds"].values() for name in times if name != "loop"))
    width = max(map(len, [*peers, ""])) + 2
    lines = [" " * 40 + "".join(f"{name:>{width}}" for name in peers)]
    for family in dict.fromkeys(result["case"]["family"] for result in results):
        of_family = [result for result in results if result["case"]["family"] == family]
        for measure in MEASURES:
            found = [mean(ratios(of_family, measure, "loop", name).values()) for name in peers]
            cells = "".join(f"{'-' if math.isnan(value) else f'{value:.2f}x':>{width}}" for value in found)
            lines.append(f"{family:<12}{measure:<20}{len(of_family):>4} case{'s' if len(of_family) > 1 else ' '}".ljust(40) + cells)
    return "\n".join(lines)


def where(results: list[Result], wanted: Callable[[dict[str, Any]], bool]) -> list[Result]:
    """The results of cases that are wanted."""
    return [result for result in results if wanted(result["case"])]


def goals(results: list[Result], passes: float | None) -> list[Goal]:
    """Every goal. ``passes``: seconds of 10,000 nodes through all passes."""
    return [
        *_never_slower(results), *_limit(results), *_lanes_of_layers(results), *_inductor(results), *_large_batch(results),
        Goal("(f) 10,000 nodes through all passes in under 5 s", None if passes is None else passes < 5, f"{passes or math.nan:.1f} s"),
        *_memory(results),
    ]  # fmt: skip


def _never_slower(results: list[Result]) -> list[Goal]:
    slower = [
        f"{result['key']} in {measure} ({', '.join(f'{r:.2f}' for r in [first, *again])}x)"
        for result in results
        for measure in MEASURES
        if (first := ratios([result], measure, "loop").get(result["key"], 1.0)) < SLOWER
        and len(again := result["again"].get(measure, [])) == 2
        and max(again) < SLOWER
    ]
    measured = sum(len(ratios(results, measure, "loop")) for measure in MEASURES)
    said = f"{len(slower)} of {measured} measurements" + (": " + "; ".join(slower[:10]) if slower else "")
    return [Goal("(a) never slower than the loop", not slower if measured else None, said)]


def _limit(results: list[Result]) -> list[Goal]:
    found = []
    for measure in MEASURES:
        shares, over = [], []
        for result in results:
            times = result["seconds"].get(measure, {})
            if "by hand" in times and "fused" in times:
                if times["by hand"] >= NOTICEABLE:
                    shares.append(times["by hand"] / times["fused"])
                else:
                    over.append((times["fused"] - times["by hand"], result["key"]))
        share = mean(shares)
        said = f"{share:.3f}x over {len(shares)} cases"
        found.append(Goal(f"(b) 0.95x the hand-written limit, {measure}", share >= 0.95 if shares else None, said))
        late = [f"{key} {seconds * 1e6:.1f} us" for seconds, key in sorted(over, reverse=True) if seconds > OVERHEAD]
        said = f"{len(late)} of {len(over)} short cases are further away" + (": " + "; ".join(late[:5]) if late else "")
        found.append(Goal(f"(b) at most 8 us over it, {measure}", not late if over else None, said))
    return found


def _lanes_of_layers(results: list[Result]) -> list[Goal]:
    lanes = where(results, _is_small_mlp)
    found = []
    for measure, least in zip(MEASURES, (11.0, 7.5, 7.5), strict=True):
        faster = list(ratios(lanes, measure, "loop").values())
        hand = mean(ratios(lanes, measure, "loop", "by hand").values())
        said = f"{mean(faster):.2f}x over {len(faster)} cases (by hand {hand:.2f}x)"
        found.append(Goal(f"(c) MLP lanes, {least}x the loop, {measure}", mean(faster) >= least if faster else None, said))
    vmapped = list(ratios(lanes, "inference", "vmap").values())
    said = f"{mean(vmapped):.2f}x over {len(vmapped)} cases"
    return [*found, Goal("(c) MLP lanes, 2.8x vmap, inference", mean(vmapped) >= 2.8 if vmapped else None, said)]


def _is_small_mlp(case: dict[str, Any]) -> bool:
    small = 16 <= case["lanes"] <= 256 and 4 <= case["width"] <= 128 and 1 <= case["batch"] <= 64
    return case["family"] == "mlp" and small


def _inductor(results: list[Result]) -> list[Goal]:
    lanes = where(results, _is_small_mlp)
    found = []
    for measure in MEASURES:
        unrolled = list(ratios(lanes, measure, "compiled loop").values())
        said = f"{mean(unrolled):.2f}x over {len(unrolled)} cases"
        found.append(Goal(f"(d) 3x Inductor on the loop, {measure}", mean(unrolled) >= 3 if unrolled else None, said))
        both = list(ratios(results, measure, "fused", "fused, compiled").values())
        hand = mean(ratios(results, measure, "by hand", "by hand, compiled").values())
        said = f"{mean(both):.2f}x over {len(both)} cases (what torch.compile does to the form by hand: {hand:.2f}x)"
        found.append(Goal(f"(d) fused + torch.compile no slower than fused, {measure}", mean(both) >= SLOWER if both else None, said))
    return found


def _large_batch(results: list[Result]) -> list[Goal]:
    lanes = where(results, lambda c: (c["family"], c["lanes"], c["width"], c["batch"]) == ("mlp", 128, 32, 1024))
    faster = list(ratios(lanes, "inference", "loop").values())
    return [Goal("(e) batch 1024, 128 lanes, width 32: 1.4x", min(faster) >= 1.4 if faster else None, f"{[round(f, 2) for f in faster]}")]


def _memory(results: list[Result]) -> list[Goal]:
    peaks = [(result["key"], result["peak"]) for result in results]
    training = [(p["fused"] / max(p["loop"], 1), key) for key, peak in peaks if "fused" in (p := peak.get("forward + backward", {}))]
    inference = [((p["fused"] - p["loop"]) / MIB, key) for key, peak in peaks if "fused" in (p := peak.get("inference", {}))]
    most, more = max(training, default=(math.nan, "")), max(inference, default=(math.nan, ""))
    return [
        Goal("(g) peak in training at most 2.2x the loop's", most[0] <= 2.2 if training else None, f"at most {most[0]:.2f}x ({most[1]})"),
        Goal("(g) peak in inference at most 64 MB over it", more[0] <= 64 if inference else None, f"at most {more[0]:.1f} MiB ({more[1]})"),
    ]


class Nodes(nn.Module):
    """Two thousand lanes of five ops."""

    def __init__(self, lanes: int = 2000) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 1)) for _ in range(lanes))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)


def passes_seconds(lanes: int = 2000) -> float:
    """Seconds that 10,000 nodes (five for each lane) take in the passes: what comes after recording, without timing and verifying."""
    model, x = Nodes(lanes), torch.randn(2, lanes)
    start = time.perf_counter()
    report = fxfuse.report(fxfuse.optimize(model, x, tune=False, validate=False, objective="launches"))
    whole = time.perf_counter() - start
    stages = report.stages
    return sum(stages.get(name, 0.0) for name in ("find lanes", "plan", "rewrite and pack")) if stages else whole
