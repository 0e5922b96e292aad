"""``torch.compile`` of the 128-lane feature network: backend "eager", "inductor", and fxfuse over Inductor.

    python benchmarks/compile_backend.py [--lanes 128] [--hidden 32] [--batch 64] [--rounds 3] [--json]

* cold: seconds from ``torch.compile`` to the end of the first training step, each in a process of its own in which another model has been
  compiled before (imports and what Inductor does once are not counted), with a fresh Inductor cache; medians of ``--rounds`` in turn.
* run: inference and forward + backward of the compiled models, in one process, in turns of ten calls each, medians.

Over the number of lanes: ``benchmarks/compile_sweep.py``. Quote the ratios, not the times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxfuse

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.feature_networks import FeatureNetworks
from benchmarks.timing import medians, table

BACKENDS = ("eager", "inductor", "fxfuse")


def backend(name: str) -> Any:
    """What ``torch.compile`` takes; fxfuse by function, so that the script also runs from a checkout."""
    return fxfuse.backend() if name == "fxfuse" else name


def train(call: Any, parameters: Sequence[nn.Parameter], x: torch.Tensor) -> None:
    """Forward and backward. ``parameters``: all of them in a list, as an optimizer has them; to walk 385 modules takes a millisecond."""
    for parameter in parameters:
        parameter.grad = None
    call(x).sum().backward()


def cold(name: str, lanes: int, hidden: int, batch: int) -> float:
    """Seconds from ``torch.compile`` to the end of the first training step, in this process."""
    from torch._inductor.utils import fresh_cache

    with fresh_cache():
        small = nn.Sequential(nn.Linear(3, 5), nn.Tanh())
        train(torch.compile(small, backend="inductor"), [*small.parameters()], torch.randn(2, 3))
        small_loop = FeatureNetworks(3, 4)
        train(torch.compile(small_loop, backend=backend(name)), [*small_loop.parameters()], torch.randn(5, 3))
    torch.compiler.reset()
    model, x = FeatureNetworks(lanes, hidden), torch.randn(batch, lanes)
    parameters = [*model.parameters()]
    with fresh_cache():
        start = time.perf_counter()
        train(torch.compile(model, backend=backend(name)), parameters, x)
        return time.perf_counter() - start


def measured(name: str, lanes: int, hidden: int, batch: int) -> float:
    """``cold`` in a process of its own."""
    given = ["--one", name, "--lanes", str(lanes), "--hidden", str(hidden), "--batch", str(batch)]
    done = subprocess.run([sys.executable, __file__, *given], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(done.stdout.split()[-1])


def cold_times(names: Sequence[str], lanes: int, hidden: int, batch: int, rounds: int) -> dict[str, float]:
    """Median cold seconds by backend, in turn."""
    found: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(rounds):
        for name in names if round_number % 2 == 0 else names[::-1]:
            found[name].append(measured(name, lanes, hidden, batch))
    return {name: statistics.median(times) for name, times in found.items()}


def of_its_own() -> type[FeatureNetworks]:
    """The class once more, with a forward of its own: dynamo looks through what was compiled for all that share one, at every call."""
    forward = FeatureNetworks.forward
    return type("FeatureNetworks", (FeatureNetworks,), {"forward": types.FunctionType(forward.__code__.replace(), forward.__globals__)})


def run_times(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Median seconds of a call by measure and backend."""
    x = torch.randn(args.batch, args.lanes)
    first = FeatureNetworks(args.lanes, args.hidden)
    infer, step = {}, {}
    for name in ("loop", *BACKENDS):
        model = of_its_own()(args.lanes, args.hidden)
        model.load_state_dict(first.state_dict())
        call = model if name == "loop" else torch.compile(model, backend=backend(name))
        infer[name] = lambda call=call: torch.no_grad()(call)(x)
        parameters = [*model.parameters()]
        step[name] = lambda call=call, parameters=parameters: train(call, parameters, x)
        torch.testing.assert_close(call(x), first(x), rtol=1e-4, atol=1e-4)
    measures = {"inference": infer, "forward + backward": step}
    return {name: medians(calls, seconds=args.seconds, calls=10) for name, calls in measures.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("lanes", 128), ("hidden", 32), ("batch", 64), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", choices=BACKENDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore", DeprecationWarning)  # Inductor's own
    torch.set_num_threads(min(2, torch.get_num_threads()))
    if args.one:
        print(cold(args.one, args.lanes, args.hidden, args.batch))
        return
    times = cold_times(BACKENDS, args.lanes, args.hidden, args.batch, args.rounds)
    runs = run_times(args)
    if args.json:
        print(json.dumps({"cold": times, **runs}))
        return
    print(f"cold compile to the first training step, {args.lanes} lanes:")
    for name, seconds in times.items():
        print(f"  {name:<10}{seconds:8.2f} s{times['inductor'] / seconds:8.2f}x")
    print(f"  fxfuse takes {times['fxfuse'] - times['eager']:.2f} s more than eager\n")
    print(table(runs, "inductor"))


if __name__ == "__main__":
    main()
