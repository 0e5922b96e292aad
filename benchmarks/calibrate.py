"""The constants of ``fxfuse/planning/cost.py``, measured here: run it on an idle machine, and put what it prints in the place of ``CPU``.

    python benchmarks/calibrate.py [--threads 1] [--seconds 2] [--device cuda]

Each constant is a slope or a plateau of medians: dispatch from an op on one number, bandwidths from copies within and beyond the cache,
rates from products of the shapes that lanes have. With one thread the figures are steadiest; ``cost.speedup`` accounts for more.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fxfuse.planning.fingerprint import device_name


def median(function: Callable[[], object], seconds: float, device: torch.device) -> float:
    """Median seconds of one call, of batches of calls that take about a millisecond."""
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def batch(calls: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        wait()
        return (time.perf_counter() - start) / calls

    batch(2)
    calls = max(1, int(1e-3 / max(batch(3), 1e-7)))
    found: list[float] = []
    stop = time.perf_counter() + seconds
    while len(found) < 7 or time.perf_counter() < stop:
        found.append(batch(calls))
    return statistics.median(found)


class Calibration:
    """All constants, by name."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds

    def time(self, function: Callable[[], object]) -> float:
        """Median seconds without gradients."""
        with torch.no_grad():
            return median(function, self.seconds, self.device)

    def randn(self, *shape: int) -> Tensor:
        """Numbers on the device."""
        return torch.randn(*shape, device=self.device)

    def constants(self) -> dict[str, float]:
        """In the order of ``Rates``."""
        one, held = self.randn(4), self.randn(64, 32)
        dispatch = self.time(lambda: torch.relu(one))
        view = self.time(lambda: torch.transpose(held, 0, 1))

        class Nothing(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x

        nothing = Nothing()
        module = self.time(lambda: nothing(one))
        tracked = self.randn(4).requires_grad_()

        def chain(length: int) -> Callable[[], object]:
            def run() -> object:
                with torch.enable_grad():
                    x = tracked
                    for _ in range(length):
                        x = x * one
                    return torch.autograd.grad([x], [tracked], [torch.ones_like(x)])

            return run

        # A step more: an op recorded, and the product of its backward.
        autograd = max((self.time(chain(40)) - self.time(chain(8))) / 32 - 2 * dispatch, 0.0)
        cache, near, far = self.bandwidths(dispatch)
        lanes, rows = 64, 64
        little, weight, bias = self.randn(8, 4), self.randn(4, 4), self.randn(4)
        product_dispatch = self.time(lambda: F.linear(little, weight, bias))
        few, tiny = self.randn(lanes, rows, 4), self.randn(lanes, 4, 4)
        each = max(self.time(lambda: torch.bmm(few, tiny)) - product_dispatch, 0.0) / lanes

        def rate(work: float, function: Callable[[], object], matrices: int = 0, others: float = 0.0) -> float:
            return work / max(self.time(function) - product_dispatch - matrices * each - others, 1e-7)

        broad, square = self.randn(lanes, rows, 64), self.randn(lanes, 64, 64)
        x, column, vector = self.randn(lanes, rows, 32), self.randn(lanes, 32, 1), self.randn(lanes, 1, 32)
        work = lanes * rows * 32
        thinnest, first, most = self.randn(lanes * rows, 4), self.randn(lanes * rows, 1), lanes * rows
        slim, slimmest = self.randn(lanes, rows, 4), self.randn(lanes, 4, 1)
        column_each = max(self.time(lambda: torch.bmm(slim, slimmest)) - product_dispatch, 0.0) / most
        row_each = max(self.time(lambda: torch.bmm(slimmest.mT, slim.mT)) - product_dispatch, 0.0) / most
        thin, wide = self.randn(lanes, rows, 1), self.randn(lanes, 1, 32)
        pictures, kernels = self.randn(8, 16, 32, 32), self.randn(16, 16, 3, 3)
        channels, grouped = self.randn(1, lanes * 32, rows), self.randn(lanes * 32, 32, 1)
        many = self.randn(1 << 16)
        windows = self.randn(16, 16, 2, 100).unfold(3, 3, 1).permute(0, 1, 3, 2, 4)
        sequence, filters = self.randn(8, 2, 40), self.randn(8, 2, 3)
        narrow, kernel = self.randn(1, lanes * 4, 1), self.randn(lanes * 4, 4, 1)
        group = max(self.time(lambda: F.conv1d(narrow, kernel, groups=lanes)) - product_dispatch, 0.0) / lanes
        return {
            "dispatch": dispatch, "product_dispatch": product_dispatch,
            "convolution_dispatch": self.time(lambda: F.conv1d(sequence, filters)), "each": each, "view": view, "module": module,
            "autograd": autograd, "cache": cache, "near": near, "far": far,
            "run": max(self.time(lambda: thinnest * first) - self.time(lambda: thinnest * thinnest), 0.0) / most,
            "reduced": max(self.time(lambda: thinnest.sum(-1)) - dispatch, 0.0) / most,
            "normalized": max(self.time(lambda: F.layer_norm(thinnest, (4,))) - dispatch, 0.0) / most,
            "product": rate(lanes * rows * 64 * 64, lambda: torch.bmm(broad, square), lanes),
            "column": rate(work, lambda: torch.bmm(x, column), 0, column_each * most), "column_each": column_each,
            "turned": rate(work, lambda: torch.bmm(x, vector.transpose(1, 2)), 0, column_each * most),
            "row": rate(work, lambda: torch.bmm(vector, x.transpose(1, 2)), 0, row_each * most), "row_each": row_each,
            "outer": rate(work, lambda: torch.bmm(thin, wide)),
            "convolution": rate(8 * 16 * 32 * 32 * 16 * 9, lambda: F.conv2d(pictures, kernels, padding=1)),
            "grouped": work * 32 / max(self.time(lambda: F.conv1d(channels, grouped, groups=lanes)) - lanes * group, 1e-7), "group": group,
            "scattered": windows.numel() / self.time(lambda: windows.contiguous()),
            "gathered": rate(many.numel(), lambda: torch.tanh(many)),
        }  # fmt: skip

    def bandwidths(self, dispatch: float) -> tuple[float, float, float]:
        """Bytes that an op may move before it slows down to below half, and the bandwidths before and after."""
        sizes = [1 << power for power in range(16, 27)]  # bytes of one operand
        found = {}
        for size in sizes:
            x = self.randn(size // 4)
            found[2 * size] = 2 * size / max(self.time(lambda x=x: torch.add(x, 1.0)) - dispatch, 1e-9)
        near, far = max(found.values()), found[max(found)]
        middle = (near * far) ** 0.5
        cache = max((size for size, speed in found.items() if speed > middle), default=min(found))
        return float(cache), near, far


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="per measurement")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    found = Calibration(device, options.seconds).constants()
    print(f"# {device_name(device)}, torch {torch.__version__}")
    print("Rates(" + ", ".join(f"{name}={value:.2g}" for name, value in found.items()) + f", threads={options.threads})")


if __name__ == "__main__":
    main()
