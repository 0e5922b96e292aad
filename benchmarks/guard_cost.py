"""What a fused call costs over running its program's graph directly: the guard, fetching the weights, shaping the result.

    python benchmarks/guard_cost.py [--rounds 200] [--json]

The graph is replaced by a function that returns at once, so that nothing but the overhead is timed: medians, in turn, of many calls.

* `check`: the guard alone, on inputs and weights that are at hand. The promise: under 5 us.
* `around`: the comparison of what forward reads beside its arguments (configurations, globals, classes), part of `call`.
* `program`: arguments taken apart, weights fetched, the guard, the result put together.
* `call`: the whole call of the fused module, less the call of an empty `torch.nn.Module` with the same arguments.
* `graph`: the real program's graph run directly, for scale.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import fxfuse
from fxfuse.fused import regions
from fxfuse.running.runtime import Compiled

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.feature_networks import FeatureNetworks

CALLS = 100  # of each function in a row
SCALE = 0.5


class Towers(nn.Module):
    """A network for each of its inputs."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.towers = nn.ModuleList(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)) for _ in range(inputs))

    def forward(self, *xs: Tensor) -> Tensor:
        return torch.stack([tower(x) for tower, x in zip(self.towers, xs, strict=True)])


class Named(Towers):
    """The same with a dict of inputs, a mask that may be left out, and a number."""

    def forward(self, batch: dict[str, Tensor], mask: Tensor | None = None, scale: float = 1.0) -> Tensor:  # type: ignore[override]
        out = torch.stack([tower(x) for tower, x in zip(self.towers, batch.values(), strict=True)])
        return out * scale if mask is None else out * mask * scale


class TwoForms(nn.Module):
    """Calls one region in two forms: its second program is tried after the first."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Towers(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x + 1).sum() + self.inner(x[:, None].relu(), x[:, None] + 1).sum()


class Frozen(nn.Module):
    """Loops over columns, and 40 more weights that stay as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Linear(1, 4) for _ in range(8))
        self.scales = nn.ParameterList(torch.ones(n + 1) for n in range(40))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)
        return out + sum(scale.sum() for scale in self.scales)


class Configured(nn.Module):
    """Reads a configuration of 40 attributes by names that are spelled, and globals."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Linear(1, 4) for _ in range(8))
        self.config = SimpleNamespace(scale=2.0, shift=1.0, act="relu", **{f"option_{n}": n for n in range(37)})

    def forward(self, x: Tensor) -> Tensor:
        out = torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)
        return (out.relu() if self.config.act == "relu" else out.tanh()) * self.config.scale * SCALE + self.config.shift


class AllConfigured(Configured):
    """The same by names that are computed: all 40 are compared."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * getattr(self.config, "option_" + "3")


class Empty(nn.Module):
    """Takes anything, does nothing."""

    def forward(self, *args: Any, **kwargs: Any) -> None:
        return None


def cases() -> dict[str, tuple[nn.Module, tuple[Any, ...], dict[str, Any], str]]:
    """Name -> (model, args, kwargs, path of the region)."""
    x = torch.randn(8, 4)
    many = {f"field_{i}": torch.randn(8, 4) for i in range(26)}
    few = dict(list(many.items())[:3])
    return {
        "1 input": (FeatureNetworks(16, 8), (torch.randn(8, 16),), {}, ""),
        "3 inputs": (Towers(3), tuple(few.values()), {}, ""),
        "26 inputs": (Towers(26), tuple(many.values()), {}, ""),
        "dict of 3, keywords": (Named(3), (few,), {"mask": torch.ones(8, 3), "scale": 0.5}, ""),
        "dict of 26": (Named(26), (many,), {}, ""),
        "2 programs, the second": (TwoForms(), (x,), {}, "inner"),
        "a configuration and a global": (Configured(), (torch.randn(8, 8),), {}, ""),
        "all of a configuration": (AllConfigured(), (torch.randn(8, 8),), {}, ""),
        "40 weights beside the packs": (Frozen(), (torch.randn(8, 8),), {}, ""),
    }


def medians(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median microseconds of one call of each, from ``rounds`` rounds of ``CALLS`` calls in turn."""
    found: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        for _ in range(CALLS):
            function()
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                function()
            found[name].append((time.perf_counter() - start) / CALLS * 1e6)
    return {name: statistics.median(times) for name, times in found.items()}


def measure(model: nn.Module, args: Any, kwargs: Any, path: str, training: bool, grad: bool, rounds: int) -> dict[str, float]:
    """Microseconds of each part of a fused call."""
    fused = fxfuse.optimize(model, args, example_kwargs=kwargs, objective="launches", tune=False, validate=False).train(training)
    state = regions(fused)[path]
    program: Compiled | None = state.current
    with torch.set_grad_enabled(grad):
        if path:  # the second form
            args = tuple(arg[:, None] for arg in (args[0], args[0] + 1))
            program = state.methods["forward"][0]
        assert program is not None
        region, empty = state.region, Empty()
        given: list[Any] = []
        space = program.run.__globals__
        real, guard = space["graph"], space["guard"]
        space["graph"] = lambda *a: given.append(a) or real(*a)
        out = region(*args, **kwargs)
        checked: list[Any] = []
        space["guard"] = lambda *a: checked.append(a) or guard(*a)
        region(*args, **kwargs)
        if fxfuse.report(fused).fallbacks:
            raise SystemExit(f"ran the loop: {fxfuse.report(fused).fallbacks}")
        answer = real(*given[0])
        space["graph"], space["guard"] = (lambda *a: answer), guard
        found = medians(
            {
                "check": lambda: guard(*checked[0]),
                "around": lambda: state.around is not None and state.around.changed(),
                "program": lambda: program.run(args, kwargs),
                "call": lambda: region(*args, **kwargs),
                "empty": lambda: empty(*args, **kwargs),
            },
            rounds,
        )
        found["call"] -= found.pop("empty")
        found["graph"] = medians({"graph": lambda: real(*given[0])}, max(rounds // 10, 3))["graph"]
    del out
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    table: dict[str, dict[str, float]] = {}
    for name, (model, args, kwargs, path) in cases().items():
        for label, training, grad in (("train", True, True), ("eval, no grad", False, False)):
            table[f"{name}, {label}"] = measure(model, args, kwargs, path, training, grad, options.rounds)
    if options.json:
        print(json.dumps({"torch": torch.__version__, "microseconds": table}))
        return
    print(f"{'microseconds, one thread':<44}{'check':>8}{'around':>8}{'program':>9}{'call':>8}{'graph':>10}")
    for name, found in table.items():
        print(f"{name:<44}{found['check']:>8.2f}{found['around']:>8.2f}{found['program']:>9.2f}{found['call']:>8.2f}{found['graph']:>10.1f}")


if __name__ == "__main__":
    main()
