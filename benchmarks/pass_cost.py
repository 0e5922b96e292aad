"""What fusing itself costs: recording + passes, without tuning and validation, for 128, 512 and 2,048 lanes.

    python benchmarks/pass_cost.py [--lanes 128 512 2048] [--repeat 3]

The promise: 512 lanes in under two seconds, 2,048 lanes in under five times that.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

import fxfuse

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.feature_networks import FeatureNetworks


def seconds(lanes: int, repeat: int) -> float:
    """Median seconds of ``optimize`` on a fresh model, without tuning and validation."""
    found = []
    for _ in range(repeat):
        model, x = FeatureNetworks(lanes, 16), torch.randn(8, lanes)
        start = time.perf_counter()
        fused = fxfuse.optimize(model, x, tune=False, validate=False, objective="launches")
        found.append(time.perf_counter() - start)
        if not fxfuse.report(fused).fused:
            raise SystemExit(f"nothing fused:\n{fxfuse.report(fused)}")
    return statistics.median(found)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lanes", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(2)
    seconds(4, 1)  # imports and caches
    times = {lanes: seconds(lanes, options.repeat) for lanes in options.lanes}
    first = options.lanes[0]
    for lanes, found in times.items():
        print(f"{lanes:6,} lanes  {found:7.2f} s  {found / times[first]:6.1f} times {first} lanes ({lanes / first:.0f} times as many)")
    print(json.dumps({"torch": torch.__version__, "seconds": times}))


if __name__ == "__main__":
    main()
