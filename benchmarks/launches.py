"""Launches of one forward before and after fusing, and the fewest there could be, over the loop shapes of examples/.

    python benchmarks/launches.py [--json]

heavy: matmuls, convolutions, embeddings, norms. bound: the fewest heavy launches if equal-signature ops were fused wherever they
are independent, by Mirsky's theorem. all: every ATen call that launches work. peak: bytes of tensor memory at the worst moment.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxfuse
from fxfuse.launches import count
from fxfuse.planning.memory import peak_bytes

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from benchmarks.feature_networks import FeatureNetworks

Build = Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]]


def example(name: str, build: str = "build") -> Build:
    """The builder of an example file."""
    return getattr(importlib.import_module(name), build)  # type: ignore[no-any-return]


SUBJECTS: dict[str, Build] = {
    "128 feature networks": lambda: (FeatureNetworks(128, 32), (torch.randn(64, 128),)),
    "neural additive model": example("feature_networks"),
    "Linear and Conv1d(k=1) mixed": example("linear_is_pointwise_conv"),
    "six weight generators": example("generated_weights"),
    "a kernel per sample": example("generated_weights", "build_per_sample"),
    "a convolution per row": example("conv_per_row"),
    "one convolution, growing cat": example("shared_conv"),
    "one convolution, summed": example("shared_conv", "build_summed"),
}


def row(build: Build) -> dict[str, Any]:
    """Counts before and after, of a forward in eval mode without gradients."""
    model, inputs = build()
    fused = fxfuse.optimize(model, inputs, objective="launches", tune=False)

    def forward(each: nn.Module) -> Callable[[], object]:
        def run() -> Any:
            with torch.no_grad():
                return each.eval()(*inputs)

        return run

    before, after = count(forward(model)), count(forward(fused))
    return {
        "heavy": [before.heavy, after.heavy], "bound": before.bound, "all": [before.total, after.total],
        "peak": [peak_bytes(forward(model)), peak_bytes(forward(fused))],
    }


def main() -> None:
    """Count and print."""
    found = {name: row(build) for name, build in SUBJECTS.items()}
    if "--json" not in sys.argv:
        print(f"{'':30}{'heavy':>14}{'bound':>8}{'all':>16}{'peak bytes':>26}")
        for name, counts in found.items():
            heavy, every, peak = ("{:,} -> {:,}".format(*counts[key]) for key in ("heavy", "all", "peak"))
            print(f"{name:30}{heavy:>14}{counts['bound']:>8}{every:>16}{peak:>26}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
