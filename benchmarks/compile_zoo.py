"""Models of other people's packages (tests/zoo) under ``torch.compile``: backend "fxfuse" against "inductor".

    python benchmarks/compile_zoo.py [--only NAME ...] [--rounds 1] [--seconds 4] [--no-time] [--json FILE]

cold: seconds from ``torch.compile`` to the end of the first training step, inductor's and fxfuse's, and fxfuse's over inductor's (the
goal is at most 1.15). inference, training: inductor's time of a compiled call over fxfuse's (the goal is at least 0.97). right: outputs,
gradients and running statistics equal to the original's in float64, in train and eval mode, with ``inner="eager"``.

Every subject and round is a process of its own, in which small models were compiled before (what Inductor does once is not counted), with
a fresh Inductor cache for each figure; the backends take turns at being first. Needs a C++ compiler and the packages of the zoo
(``make .venv-zoo/.installed``). A subject that neither backend compiles is skipped with the reason.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import checks
import fxfuse
from benchmarks.feature_networks import FeatureNetworks
from benchmarks.timing import medians
from zoo.check import RTOL, SINGLE, differences, narrow
from zoo.registry import Subject, subjects

PEERS = ("inductor", "fxfuse")
COLD, SPEED = 1.15, 0.97  # the goals


def backend(name: str) -> Any:
    """What ``torch.compile`` takes; fxfuse by function, so that the script also runs from a checkout."""
    return fxfuse.backend() if name == "fxfuse" else name


def step(model: nn.Module, args: Any, kwargs: Any) -> None:
    """Forward and backward."""
    ends = [leaf for leaf in tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor) and leaf.requires_grad]
    torch.autograd.backward([end.sum() for end in ends])
    model.zero_grad(set_to_none=True)


def wrong(subject: Subject) -> list[str]:
    """What differs from the original in float64, in train and eval mode; the graph breaks and all, but no compiled kernels."""
    found = []
    for training in (True, False):
        model = subject.model(dropout=False).train(training)
        twin = copy.deepcopy(model)
        torch.compiler.reset()
        nn.Module.compile(model, backend=fxfuse.backend("eager"))  # some classes have a method of that name
        torch.manual_seed(3)
        want = checks.run(twin, *subject.inputs(), checks.own_gradients)
        torch.manual_seed(3)
        got = checks.run(model, *subject.inputs(), checks.own_gradients)
        tolerance = SINGLE if narrow(want.outputs, twin) else RTOL
        for kind, actual, expected in (
            ("output", dict(enumerate(got.outputs)), dict(enumerate(want.outputs))),
            ("gradient of input", dict(enumerate(got.inputs)), dict(enumerate(want.inputs))),
            ("gradient of", got.parameters, want.parameters),
            ("buffer", dict(model.named_buffers()), dict(twin.named_buffers())),
        ):
            lines = differences(kind, expected, [actual.get(name) for name in expected], list(expected.values()), tolerance)
            found += [f"{'train' if training else 'eval'}: {line}" for line in lines]
    return found


def measured(subject: Subject, seconds: float, first: str, timed: bool) -> dict[str, Any]:
    """Everything about one subject, in this process."""
    found: dict[str, Any] = {"wrong": wrong(subject)}
    if not timed:
        return found
    from torch._inductor.utils import fresh_cache

    for name in PEERS:
        torch.compiler.reset()
        with fresh_cache():
            small = FeatureNetworks(3, 4)
            step(torch.compile(small, backend=backend(name)), (torch.randn(5, 3),), {})
    torch.compiler.reset()
    infer: dict[str, Callable[[], object]] = {}
    train: dict[str, Callable[[], object]] = {}
    found["cold"] = {}
    with fresh_cache():
        for name in (first, *(peer for peer in PEERS if peer != first)):
            model, args, kwargs = subject.build()
            twin = copy.deepcopy(model).eval()
            with fresh_cache():
                start = time.perf_counter()
                call = torch.compile(model, backend=backend(name))
                step(call, args, kwargs)
                found["cold"][name] = time.perf_counter() - start
                compiled_eval = torch.compile(twin, backend=backend(name))
                with torch.no_grad():
                    compiled_eval(*args, **kwargs)
            train[name] = lambda call=call, args=args, kwargs=kwargs: step(call, args, kwargs)
            infer[name] = lambda call=compiled_eval, args=args, kwargs=kwargs: torch.no_grad()(call)(*args, **kwargs)
        for measure, calls in (("inference", infer), ("training", train)):
            times = medians({name: calls[name] for name in PEERS}, seconds=seconds)
            found[measure] = times["inductor"] / times["fxfuse"]
    return found


def in_a_process(name: str, args: argparse.Namespace, first: str) -> dict[str, Any]:
    """``measured``, or {"failed": what was said last}."""
    given = [sys.executable, __file__, "--one", name, "--first", first, "--seconds", str(args.seconds)]
    done = subprocess.run([*given, *([] if args.time else ["--no-time"])], capture_output=True, text=True)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    if done.returncode:
        return {"failed": lines[-1] if lines else f"exit {done.returncode}"}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def row(name: str, rounds: list[dict[str, Any]]) -> str:
    """One line of the table."""
    failed = next((each["failed"] for each in rounds if "failed" in each), None)
    if failed is not None:
        return f"{name:26}skipped: {failed}"
    text = f"{name:26}{'WRONG' if any(each['wrong'] for each in rounds) else 'right':>6}"
    if "cold" not in rounds[0]:
        return text
    cold = {peer: statistics.median(each["cold"][peer] for each in rounds) for peer in PEERS}
    ratio = cold["fxfuse"] / cold["inductor"]
    text += f"{cold['inductor']:>10.1f} s{cold['fxfuse']:>10.1f} s{ratio:>7.2f}{'!' if ratio > COLD else ' '}"
    for measure in ("inference", "training"):
        speed = statistics.median(each[measure] for each in rounds)
        text += f"{speed:>9.2f}x{'!' if speed < SPEED else ' '}"
    return text


def main() -> int:
    """Print the table; 1 if anything is wrong. What misses a goal is marked with an exclamation mark."""
    parser = argparse.ArgumentParser(description="torch.compile over the zoo: fxfuse against inductor")
    parser.add_argument("--only", nargs="+", default=[], help="these subjects")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=4.0, help="per measurement")
    parser.add_argument("--no-time", dest="time", action="store_false", help="correctness alone")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--first", choices=PEERS, default=PEERS[0], help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # of packages that are not ours
    if args.one:
        print(json.dumps(measured(Subject(args.one), args.seconds, args.first, args.time)))
        return 0
    print(f"{'':32}{'inductor':>12}{'fxfuse':>12}{'cold':>8}{'inference':>11}{'training':>11}" if args.time else "")
    found: dict[str, list[dict[str, Any]]] = {}
    for subject in subjects():
        if args.only and subject.name not in args.only:
            continue
        if subject.missing:
            print(f"{subject.name:26}skipped: {subject.missing}")
            continue
        rounds = found[subject.name] = [in_a_process(subject.name, args, PEERS[number % 2]) for number in range(args.rounds)]
        print(row(subject.name, rounds), flush=True)
        for line in dict.fromkeys(line for each in rounds for line in each.get("wrong", ())):
            print(f"    {line}")
        if args.json:
            args.json.write_text(json.dumps(found, indent=1))
    return int(any(each.get("wrong") for rounds in found.values() for each in rounds))


if __name__ == "__main__":
    raise SystemExit(main())
