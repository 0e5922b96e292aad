"""What ``tune=False`` costs: the plan of the static model alone, against the one that was timed and the loop, over a sample of the grid.

    python benchmarks/static_model.py [--sample N] [--minutes M] [--threads T] [--seconds S] [--mode infer train] [--only mlp]

Loop, tuned and untuned model run in turn in one process. A case in which both plans write the same ops is not timed apart: it counts as
1. Printed: each case with its ratio (tuned seconds over untuned seconds: below 1 the static model chose worse) and what both chose where
they differ, the worst first; then the geometric mean, whose goal is at least 0.87 (within 15 %).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fxfuse
from benchmarks.grid import environment, step
from benchmarks.grid_cases import FAMILIES, Case, Loop, example, sample
from fxfuse.planning.timing import medians

GOAL = 1 / 1.15
MEASURES = {"infer": "inference", "train": "forward + backward"}


def chosen(fused: nn.Module) -> str:
    """What the report says of the plan: lowerings, or the loop."""
    plans = fxfuse.report(fused).fused
    return "; ".join(f"{op.op} {op.lowering}" for plan in plans for op in plan.ops if op.lowering) or "loop"


def written(fused: nn.Module) -> list[str]:
    """The ops of all programs, to see whether two plans are one."""
    return [graph.code for graph in fxfuse.graph(fused).values()]


def measured(case: Case, mode: str, device: torch.device, seconds: float) -> dict[str, Any]:
    """Seconds of the loop and of both plans, and what they chose."""
    torch.manual_seed(0)
    model, x = Loop(case).to(device), example(case, device)
    y = torch.randn_like(model(x).detach())
    tuned, untuned = (
        fxfuse.optimize(model, x, mode=mode, tune=tune, validate=False, cache=False, progress=False)  # type: ignore[arg-type]
        for tune in (True, False)
    )
    for each in (model, tuned, untuned):
        each.train(mode == "train")
    alike = written(tuned) == written(untuned)
    models = [model, tuned] if alike else [model, tuned, untuned]
    times = medians([step(MEASURES[mode], each, x, y) for each in models], budget=seconds, most=5000)
    return {"loop": times[0], "tuned": times[1], "untuned": times[-1], "chosen": (chosen(tuned), chosen(untuned)), "alike": alike}


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=42)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no case after so long")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="per case and mode")
    parser.add_argument("--mode", nargs="+", choices=list(MEASURES), default=list(MEASURES))
    parser.add_argument("--only", nargs="+", choices=FAMILIES, help="these families alone")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    stop = time.monotonic() + 60 * options.minutes
    found: list[tuple[float, str]] = []
    for case in sample(options.sample):
        if options.only and case.family not in options.only:
            continue
        for mode in options.mode:
            if time.monotonic() > stop:
                break
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = measured(case, mode, device, options.seconds)
            ratio = result["tuned"] / result["untuned"]
            gains = " ".join(f"{name} {result['loop'] / result[name]:5.2f}x" for name in ("tuned", "untuned"))
            said = f"{ratio:5.2f}  {case.key:<28} {mode:<5} {gains}"
            if not result["alike"]:
                said += f"\n         tuned: {result['chosen'][0]}\n       untuned: {result['chosen'][1]}"
            print(said, flush=True)
            found.append((ratio, said))
    if not found:
        return 1
    print(f"\n{environment(device)}, the worst first:\n")
    print("\n".join(said for _, said in sorted(found)[:12]))
    mean = math.exp(sum(math.log(ratio) for ratio, _ in found) / len(found))
    outcome = "within 15 %" if mean >= GOAL else "NOT within 15 %"
    print(f"\nuntuned at {mean:.2f} of the tuned plans' speed in geometric mean over {len(found)}: {outcome}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
