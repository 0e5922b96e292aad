"""What ``optimize`` takes for very many lanes, very long models and very large weights: seconds, and the process's peak memory.

Each case runs in a process of its own, because the peak is the process's (``ru_maxrss``): Python objects and the allocator's waste count.
``python benchmarks/stress.py`` prints the table; ``python benchmarks/stress.py large --mib 1024 --inplace`` one case, as JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
from torch import Tensor, nn

import fxfuse


class Large(nn.Module):
    """Lanes of three layers, of so many bytes in all that copies of them would show; one layer has nearly all of them."""

    def __init__(self, mib: int, lanes: int = 64) -> None:
        super().__init__()
        width = int((mib * 2**20 / 4 / lanes) ** 0.5)
        layers = lambda: (nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.Linear(width, 2))  # noqa: E731
        self.nets = nn.ModuleList(nn.Sequential(*layers()) for _ in range(lanes))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([net(x) for net in self.nets], 1)


class Lanes(nn.Module):
    """So many lanes of so many ops."""

    def __init__(self, lanes: int, ops: int) -> None:
        super().__init__()
        layers = lambda: (nn.Linear(1, 4), *(nn.Tanh() for _ in range(ops - 2)), nn.Linear(4, 1))  # noqa: E731
        self.nets = nn.ModuleList(nn.Sequential(*layers()) for _ in range(lanes))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)


class Chain(nn.Module):
    """One op after the other, with a small loop at the end."""

    def __init__(self, ops: int) -> None:
        super().__init__()
        self.ops = ops
        self.nets = nn.ModuleList(nn.Linear(1, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.ops // 2):
            x = torch.tanh(x)
            x = x * 1.5
        return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)


class Nested(nn.Module):
    """A loop inside so many Sequentials."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        inner: nn.Module = Lanes(4, 2)
        for _ in range(levels):
            inner = nn.Sequential(inner)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


def peak_mib() -> float:
    """Of this process, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(given: argparse.Namespace) -> dict[str, object]:
    """One case, in this process."""
    torch.set_num_threads(1)
    small = Lanes(3, 3)
    fxfuse.optimize(small, torch.randn(4, 3), objective=given.objective)  # what the first call imports is none of the model's
    before = peak_mib()
    if given.case == "large":
        model, x = Large(given.mib), torch.randn(2, 8)
    elif given.case == "lanes":
        model, x = Lanes(given.lanes, given.ops), torch.randn(3, given.lanes)
    elif given.case == "chain":
        model, x = Chain(given.ops), torch.randn(3, 4)
    else:
        model, x = Nested(given.ops), torch.randn(3, 4)
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    with torch.no_grad():
        expected = model(x)
    built, start = peak_mib(), time.perf_counter()
    options: dict[str, object] = {"objective": given.objective, "inplace": given.inplace, "cache": False}
    options.update(tune=not given.untuned, validate=not given.unvalidated)
    fused = fxfuse.optimize(model, x, **options)
    seconds, peak = time.perf_counter() - start, peak_mib()
    report = fxfuse.report(fused)
    with torch.no_grad():
        error = (fused(x) - expected).abs().max().item()
    return {
        **vars(given), "weights_mib": round(weights, 1), "built_mib": round(built - before, 1), "peak_mib": round(peak - before, 1),
        "times_the_model": round((peak - before) / weights, 3), "seconds": round(seconds, 1), "error": error,
        "fused": len(report.fused), "ops": [f"{op.op} x{op.lanes}" for plan in report.fused for op in plan.ops][:6],
        "refused": [str(refusal)[:200] for refusal in report.refused][:3], "notes": report.notes[:3],
        "stages": {name: round(value, 1) for name, value in report.stages.items()},
        "equal": None if report.validation is None else report.validation.ok,
    }  # fmt: skip


CASES = [
    "large --mib 1024 --inplace", "large --mib 1024", "large --mib 1024 --inplace --objective time", "lanes --lanes 2000 --ops 3",
    "lanes --lanes 2000 --ops 50 --untuned", "chain --ops 100000 --untuned", "nested --ops 200",
]  # fmt: skip


def main() -> None:
    """The case that was asked for, or the table of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", nargs="?", choices=["large", "lanes", "chain", "nested"])
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--lanes", type=int, default=2000)
    parser.add_argument("--ops", type=int, default=50)
    parser.add_argument("--objective", default="launches")
    for flag in ("inplace", "untuned", "unvalidated"):
        parser.add_argument(f"--{flag}", action="store_true")
    given = parser.parse_args()
    if given.case:
        print(json.dumps(measure(given)))
        return
    for case in CASES:
        done = subprocess.run([sys.executable, __file__, *case.split()], capture_output=True, text=True, check=False)
        lines = done.stdout.splitlines()
        if not lines:
            print(f"{case}: failed: {done.stderr.splitlines()[-1:]}")
            continue
        found = json.loads(lines[-1])
        size = f"peak {found['peak_mib']} MiB, {found['times_the_model']} of {found['weights_mib']} MiB of weights"
        print(f"{case}: {found['seconds']} s, {size}, {found['fused']} fused, largest difference {found['error']:.1e}", *found["refused"])


if __name__ == "__main__":
    main()
