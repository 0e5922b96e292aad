"""Every peer over a grid of loops: lanes x width x batch, six families, shared and own inputs, concatenated and summed.

    python benchmarks/grid.py [--whole | --sample N] [--minutes M] [--out FOLDER] [--seconds S] [--compile]
                              [--device cuda] [--only mlp] [--lanes N] [--widths N] [--batches N]

Three measures of each case: inference, forward + backward, a whole training step with Adam. All peers run in turn in one process, in
changing order; figures are medians, and what counts are their ratios. Where the fused model reads slower than the loop it is timed twice
more, for half a second at the least each time. Peak memory of loop and fused, and the seconds that optimizing and compiling took, are kept.

Results are appended to FOLDER/grid.jsonl, one line a case; a case that is there for the same versions and device is not run again, so
that a run may be stopped and goes on. At the end: the table, FOLDER/grid.json, plots as SVG where matplotlib is installed, and the goals,
each reached or not. ``--report`` prints these from what is there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fxfuse
from benchmarks.grid_cases import FAMILIES, Case, Loop, cases, example, sample, short
from benchmarks.grid_goals import goals, passes_seconds, printed, table
from benchmarks.grid_peers import made
from fxfuse.planning.fingerprint import device_name
from fxfuse.planning.memory import peak_bytes
from fxfuse.planning.timing import medians

MEASURES = {"inference": "infer", "forward + backward": "train", "step with Adam": "train"}
SLOWER = 0.97  # below it three times, a case counts as slower
AGAIN_SECONDS = 1.0  # half a second for each of two


def step(measure: str, model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    """What is timed: one call."""
    if measure == "inference":
        model.eval()

        def infer() -> Tensor:
            with torch.no_grad():
                return model(x)  # type: ignore[no-any-return]

        return infer
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6) if measure == "step with Adam" else None
    # torch.compile's wrapper walks all modules for its ``zero_grad``, whatever the model's own does.
    bare = getattr(model, "_orig_mod", model)

    def train() -> None:
        if optimizer is not None:
            optimizer.zero_grad()
        else:
            bare.zero_grad(set_to_none=True)
        F.mse_loss(model(x), y).backward()
        if optimizer is not None:
            optimizer.step()

    return train


def measured(case: Case, device: torch.device, seconds: float, compiled: bool) -> dict[str, Any]:
    """All figures of one case."""
    torch.manual_seed(0)
    model, x = Loop(case).to(device), example(case, device)
    y = torch.randn_like(model(x).detach())
    found: dict[str, Any] = {"case": vars(case), "key": case.key, "seconds": {}, "peak": {}, "made": {}, "missing": {}, "again": {}}
    peers: dict[str, dict[str, nn.Module]] = {}
    for mode in ("infer", "train"):
        peers[mode], found["missing"][mode], found["made"][mode] = made(case, model, x, mode, compiled)
    for measure, mode in MEASURES.items():
        steps = {name: step(measure, peer, x, y) for name, peer in peers[mode].items()}
        times = dict(zip(steps, medians(list(steps.values()), budget=seconds, most=5000), strict=True))
        found["seconds"][measure] = times
        if "fused" in times and times["loop"] / times["fused"] < SLOWER:
            pair = [steps["loop"], steps["fused"]]
            again = [medians(pair, budget=AGAIN_SECONDS, most=100_000) for _ in range(2)]
            found["again"][measure] = [loop / fused for loop, fused in again]
        if measure != "step with Adam":
            kept = [name for name in ("loop", "fused", "by hand") if name in steps]
            for name in kept:  # gradients that a step frees, though it did not make them, would be taken off what it needs
                peers[mode][name].zero_grad(set_to_none=True)
            found["peak"][measure] = {name: peak_bytes(steps[name], device=device) for name in kept}
    report = fxfuse.report(peers["train"]["fused"]) if "fused" in peers["train"] else None
    found["left"] = report is not None and not report.fused
    return found


def environment(device: torch.device) -> str:
    """What results of other runs must share with this one."""
    return f"torch {torch.__version__}, fxfuse {fxfuse.__version__}, {device_name(device)}"


def read(path: Path, where: str) -> list[dict[str, Any]]:
    """The results of this environment; a line that was cut off is left out."""
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.get("environment") == where:
            found[entry["key"]] = entry
    return list(found.values())


def chosen(options: argparse.Namespace) -> list[Case]:
    """The cases that were asked for."""
    found = cases() if options.whole else short() if options.sample is None else sample(options.sample)
    if options.lanes:
        found = [case for case in found if case.lanes in options.lanes]
    found = [case for case in found if not options.widths or case.width in options.widths]
    found = [case for case in found if not options.batches or case.batch in options.batches]
    return [case for case in found if not options.only or case.family in options.only]


def main(arguments: list[str] | None = None) -> int:
    """Measure what is missing, and print all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--whole", action="store_true", help="the whole grid; without it the part that takes minutes")
    parser.add_argument("--sample", type=int, metavar="N", help="N cases that speak to every goal and family")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no case after so long")
    parser.add_argument("--seconds", type=float, default=2.0, help="per measure of a case")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile too; default with --whole")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lanes", type=int, nargs="+", help="these alone")
    parser.add_argument("--widths", type=int, nargs="+", help="these alone")
    parser.add_argument("--batches", type=int, nargs="+", help="these alone")
    parser.add_argument("--only", nargs="+", choices=FAMILIES, help="these families alone")
    parser.add_argument("--out", type=Path, default=Path(".bench"))
    parser.add_argument("--report", action="store_true", help="measure nothing")
    options = parser.parse_args(arguments)
    options.compile = options.whole if options.compile is None else options.compile
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    where = environment(device)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "grid.jsonl"
    results = read(path, where)
    known = {entry["key"] for entry in results}
    stop = time.monotonic() + 60 * options.minutes
    for case in () if options.report else chosen(options):
        if case.key in known:
            continue
        if time.monotonic() > stop:
            break
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of vmap's and Inductor's, on what they cannot do well
            entry = {"environment": where, **measured(case, device, options.seconds, options.compile)}
        if options.compile:
            torch.compiler.reset()
        results.append(entry)
        with path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        print(printed(entry), flush=True)
    print(f"\n{where}\n\n{table(results)}\n")
    reached = goals(results, passes_seconds() if not options.report else None)
    for goal in reached:
        outcome = "not measured" if goal.reached is None else "reached" if goal.reached else "NOT REACHED"
        print(f"{outcome:<12}  {goal.name}" + ("" if goal.reached is None else f": {goal.said}"))
    summary = {"environment": where, "goals": [vars(goal) for goal in reached], "results": results}
    (options.out / "grid.json").write_text(json.dumps(summary, indent=1))
    try:
        from benchmarks.grid_plots import draw
    except ImportError:
        print("no plots: matplotlib is not installed")
    else:
        print("plots:", *draw(results, options.out, where))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
