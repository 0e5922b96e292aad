"""The 128-lane feature network at batch 64, against the loop, against vmap, and against the best form written by hand.

    python benchmarks/feature_networks.py [--lanes 128] [--hidden 32] [--batch 64] [--seconds 8] [--json]

One process, two threads, alternating runs, medians. Three measures: inference, forward + backward, a whole training step with
``torch.optim.Adam`` on each one's own parameters. Quote the ratios, not the times.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

import fxfuse

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.timing import medians, table


class FeatureNetworks(nn.Module):
    """The loop, as people write it."""

    def __init__(self, lanes: int, hidden: int) -> None:
        super().__init__()
        self.feature_networks = nn.ModuleList()
        for _ in range(lanes):
            self.feature_networks.append(
                nn.Sequential(nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)))

    def forward(self, x: Tensor) -> Tensor:
        output = torch.zeros(x.shape[0], len(self.feature_networks))
        for i in range(len(self.feature_networks)):
            output[:, i] = self.feature_networks[i](x[:, i:i + 1]).squeeze(-1)
        return output


class Stacked(nn.Module):
    """torch.func: the lanes' parameters stacked once, one network under vmap."""

    def __init__(self, model: FeatureNetworks) -> None:
        super().__init__()
        params, self.state = stack_module_state(list(model.feature_networks))
        self.names = list(params)
        self.params = nn.ParameterList(params.values())
        self.base = [copy.deepcopy(model.feature_networks[0]).to("meta")]  # in a list: its parameters are not ours

    def forward(self, x: Tensor) -> Tensor:
        def one(params: dict[str, Tensor], buffers: dict[str, Tensor], column: Tensor) -> Tensor:
            return functional_call(self.base[0], (params, buffers), (column,))

        params = dict(zip(self.names, self.params, strict=True))
        return vmap(one, in_dims=(0, 0, 1), out_dims=1)(params, self.state, x.unsqueeze(-1)).squeeze(-1)


class ByHand(nn.Module):
    """Packed Parameters, addcmul for the rank-1 layer, baddbmm, and a last layer of one output in one of three spellings."""

    def __init__(self, model: FeatureNetworks, last: str) -> None:
        super().__init__()
        nets = list(model.feature_networks)

        def pack(layer: int, name: str) -> Tensor:
            return torch.stack([getattr(net[layer], name).detach() for net in nets])

        self.last = last
        self.w1, self.b1 = nn.Parameter(pack(0, "weight").transpose(1, 2).contiguous()), nn.Parameter(pack(0, "bias").unsqueeze(1))
        self.w2, self.b2 = nn.Parameter(pack(2, "weight").transpose(1, 2).contiguous()), nn.Parameter(pack(2, "bias").unsqueeze(1))
        self.w3, self.b3 = nn.Parameter(pack(4, "weight")), nn.Parameter(pack(4, "bias"))  # [lanes, 1, hidden], [lanes, 1]

    def forward(self, x: Tensor) -> Tensor:
        h = torch.addcmul(self.b1, x.t().unsqueeze(-1), self.w1).relu_()
        h = torch.baddbmm(self.b2, h, self.w2).relu_()
        if self.last == "product":
            return torch.add((h * self.w3).sum(-1), self.b3).t()
        if self.last == "bmm":
            return torch.baddbmm(self.b3.unsqueeze(1), h, self.w3.transpose(1, 2)).squeeze(-1).t()
        return torch.baddbmm(self.b3.unsqueeze(1), self.w3, h.transpose(1, 2)).squeeze(1).t()


HAND = {f"by hand, last layer by {last}": last for last in ("product", "bmm", "bmm from the left")}


def inference(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """A forward without a graph for autograd."""
    def run() -> Tensor:
        with torch.no_grad():
            return model(x)

    return run


def forward_backward(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    """A forward and the gradients of all parameters."""
    def run() -> None:
        model.zero_grad(set_to_none=True)
        F.mse_loss(model(x), y).backward()

    return run


def training_step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    """What a training loop does per batch; the learning rate is tiny so that the numbers stay tame over thousands of steps."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6)

    def run() -> None:
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()

    return run


def measure(lanes: int, hidden: int, batch: int, seconds: float) -> dict[str, dict[str, float]]:
    """``{measure: {candidate: median seconds}}``; all candidates are first seen to compute the same numbers."""
    torch.manual_seed(0)
    model = FeatureNetworks(lanes, hidden)
    x, y = torch.randn(batch, lanes), torch.randn(batch, lanes)
    models: dict[str, nn.Module] = {
        "loop": model,
        "fxfuse, mode='infer'": fxfuse.optimize(model, x, mode="infer", cache=False),
        "fxfuse, mode='train'": fxfuse.optimize(model, x, mode="train", cache=False),
        "vmap + stack_module_state": Stacked(model),
        **{name: ByHand(model, last) for name, last in HAND.items()},
    }
    with torch.no_grad():
        for name, other in models.items():
            torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-5, msg=f"{name} computes something else")
    return {
        "inference": medians({name: inference(each.eval(), x) for name, each in models.items()}, seconds=seconds),
        "forward + backward": medians({name: forward_backward(each.train(), x, y) for name, each in models.items()}, seconds=seconds),
        "training step with Adam": medians({name: training_step(each.train(), x, y) for name, each in models.items()}, seconds=seconds),
    }


def against_hand(times: dict[str, dict[str, float]]) -> dict[str, float]:
    """Per measure, the speed of the fused model of that mode as a share of the best form by hand."""
    return {
        name: min(found[hand] for hand in HAND) / found["fxfuse, mode='infer'" if name == "inference" else "fxfuse, mode='train'"]
        for name, found in times.items()
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lanes", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=8.0, help="per measure")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    options = parser.parse_args()
    torch.set_num_threads(2)
    times = measure(options.lanes, options.hidden, options.batch, options.seconds)
    shares = against_hand(times)
    if not options.json:
        print(f"{options.lanes} lanes, hidden {options.hidden}, batch {options.batch}, 2 threads, torch {torch.__version__}")
        print(table(times, "loop"))
        print("fused, as a share of the best form by hand: " + ", ".join(f"{name} {share:.2f}x" for name, share in shares.items()))
    print(json.dumps({"torch": torch.__version__, **vars(options), "seconds_per_call": times, "share_of_best_by_hand": shares}))


if __name__ == "__main__":
    main()
