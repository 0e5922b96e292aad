"""Weights of lanes: sharing memory, or stacked in the graph at every call? Seconds of both, by the number of members and their size.

    python benchmarks/share_or_stack.py [--members 2 4 8 16 64] [--kib 0.125 4 64 512] [--seconds 0.4] [--train]
    python benchmarks/share_or_stack.py --compiled 4 8 32 [--inner inductor]

Above the table's line are ``SHARED_MEMBERS`` and ``SHARED_BYTES`` of ``fxfuse/dynamo/outside.py``, the choice that they lead to is
marked with a star. Shared: the members are looked at where they lie (``SharedPack.packed``); stacked: one ``torch.stack``. With
``--train`` each is followed by a backward of the pack alone. ``--compiled``: the feature network with so many lanes, compiled both ways:
seconds to the first training step, and of a call. What is stacked makes every member an input of the compiled graph, which costs
Inductor time to compile and AOTAutograd time to pass. One thread; about a minute for the table, and for ``--compiled 4 8 32``.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fxfuse.dynamo.compiled
from benchmarks.compile_backend import of_its_own, train
from fxfuse import dynamo
from fxfuse.dynamo.outside import SHARED_BYTES, SHARED_MEMBERS
from fxfuse.graph import Recipe
from fxfuse.planning.timing import medians
from fxfuse.weights.shared import SharedPack


def both(count: int, numbers: int, train: bool) -> tuple[Callable[[], object], Callable[[], object]]:
    """Sharing and stacking ``count`` members of so many float32 numbers."""
    recipe = Recipe("packed.weight", tuple(f"{i}.weight" for i in range(count)), (numbers,), (0,), "stack")
    shared, stacked = ([nn.Parameter(torch.randn(numbers)) for _ in range(count)] for _ in range(2))
    pack, gradient = SharedPack(recipe), torch.randn(count, numbers)
    with torch.no_grad():
        pack.packed(shared)

    def run(make: Callable[[Sequence[Tensor]], Tensor], members: Sequence[nn.Parameter]) -> object:
        if not train:
            with torch.no_grad():
                return make(members)
        for member in members:
            member.grad = None
        return make(members).backward(gradient)  # type: ignore[no-untyped-call]

    return lambda: run(pack.packed, shared), lambda: run(lambda members: torch.stack(list(members)), stacked)


def compiled(lanes: int, inner: str, seconds: float) -> None:
    """Print a line on the feature network."""
    from torch._inductor.utils import fresh_cache

    calls: list[Callable[[], object]] = []
    steps: list[Callable[[], object]] = []
    cold = []
    for share in (True, False):
        dynamo.outside.SHARED_MEMBERS, dynamo.outside.SHARED_BYTES = (1, 1) if share else (1 << 30, 1 << 60)
        torch.compiler.reset()
        model, x = of_its_own()(lanes, 32), torch.randn(64, lanes)
        parameters = [*model.parameters()]
        with fresh_cache():
            start = time.perf_counter()
            call = torch.compile(model, backend=fxfuse.backend(inner, validate=False))
            train(call, parameters, x)
            cold.append(time.perf_counter() - start)
            with torch.no_grad():
                call(x)
        calls.append(lambda call=call, x=x: torch.no_grad()(call)(x))
        steps.append(lambda call=call, parameters=parameters, x=x: train(call, parameters, x))
    found = [f"cold {cold[0]:.1f} / {cold[1]:.1f} s"]
    for name, each in (("inference", calls), ("forward + backward", steps)):
        shared, stacked = medians(each, budget=10 * seconds, most=2000)
        found.append(f"{name} {shared * 1e6:.0f} / {stacked * 1e6:.0f} us")
    print(f"{lanes:>4} lanes, shared / stacked: {', '.join(found)}", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="sharing memory against stacking at every call")
    parser.add_argument("--members", type=int, nargs="+", default=[2, 4, 8, 16, 64, 256])
    parser.add_argument("--kib", type=float, nargs="+", default=[0.125, 1, 4, 16, 64, 512], help="of one member")
    parser.add_argument("--seconds", type=float, default=0.4, help="per cell")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--compiled", type=int, nargs="+", metavar="LANES")
    parser.add_argument("--inner", default="inductor")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.compiled:
        warnings.simplefilter("ignore", DeprecationWarning)  # Inductor's own
        for lanes in (2, *args.compiled):  # the first pays for what Inductor does once
            compiled(lanes, args.inner, args.seconds)
        return
    print(f"SHARED_MEMBERS = {SHARED_MEMBERS}, SHARED_BYTES = {SHARED_BYTES >> 10} KiB; microseconds shared / stacked, * is what is chosen")
    print(f"{'members':>8}" + "".join(f"{kib:>17g} KiB" for kib in args.kib))
    for count in args.members:
        cells = []
        for kib in args.kib:
            size = int(kib * 1024)
            if count * size > 1 << 28:
                cells.append("-")
                continue
            shared, stacked = medians(both(count, size // 4, args.train), budget=args.seconds, most=2000)
            chosen = count >= SHARED_MEMBERS or count * size >= SHARED_BYTES
            cells.append(f"{shared * 1e6:.1f}{'*' if chosen else ''} / {stacked * 1e6:.1f}{'' if chosen else '*'}")
        print(f"{count:>8}" + "".join(f"{cell:>21}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
