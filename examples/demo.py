"""`make demo`: fuse a feature-network model of 128 features and show what came of it.

    python examples/demo.py [--seconds 2]

Prints the report, the launches of a forward before and after, speed (medians of alternating runs, two threads), and the numerical
differences of outputs and gradients.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn as nn

import fxfuse
from fxfuse import launches

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.feature_networks import forward_backward, inference, training_step
from benchmarks.timing import medians, table


class FeatureNetworks(nn.Module):
    """One network per feature, each reading its own column and writing its own column."""

    def __init__(self, nof_features=128, hidden=32):
        super().__init__()
        self.feature_networks = nn.ModuleList()
        for _ in range(nof_features):
            self.feature_networks.append(
                nn.Sequential(nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)))

    def forward(self, x):
        output = torch.zeros(x.shape[0], x.shape[1])
        for i in range(x.shape[1]):
            output[:, i] = self.feature_networks[i](x[:, i:i + 1]).squeeze(-1)
        return output


def heading(text):
    print(f"\n== {text} ==")


def main(seconds=2.0):
    torch.manual_seed(0)
    torch.set_num_threads(2)
    model = FeatureNetworks()
    x, y = torch.randn(64, 128), torch.randn(64, 128)

    fused = fxfuse.optimize(model, x)  # the one line

    heading("the report")
    print(fxfuse.report(fused))

    heading("launches of one forward")
    before, after = launches.count(lambda: model(x)), launches.count(lambda: fused(x))
    print(f"matmuls {before.heavy} -> {after.heavy}, all kernels {before.total} -> {after.total}")

    heading("numerical differences, on data not seen in fusing (the report has those of all gradients)")
    fresh = torch.randn(50, 128)
    with torch.no_grad():
        expected, actual = model(fresh), fused(fresh)
    difference = (expected - actual).abs()
    print(f"outputs up to {expected.abs().max():.2f}; difference max {difference.max():.1e}, mean {difference.mean():.1e} (float32)")

    heading("checkpoints")
    state = fxfuse.original_state_dict(fused)
    exact = list(state) == list(model.state_dict()) and all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    print(f"{len(state)} tensors by the original's names, bit for bit the original's: {exact}")

    heading("speed: 128 features, hidden 32, batch 64")
    models = {"loop": model, "fused": fused}
    print(table({
        "inference": medians({name: inference(each, x) for name, each in models.items()}, seconds=seconds),
        "forward + backward": medians({name: forward_backward(each, x, y) for name, each in models.items()}, seconds=seconds),
        "training step (Adam)": medians({name: training_step(each, x, y) for name, each in models.items()}, seconds=seconds),
    }, "loop"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing, per measure")
    main(parser.parse_args().seconds)
