"""Models of other people's packages (tests/zoo): launches of one forward before and after fusing, and whether the result is right.

    python benchmarks/zoo.py [--no-time] [--why] [--json FILE] [subject ...]

heavy: matmuls, convolutions, embeddings, norms, in eval mode without gradients. bound: the fewest there could be if ops of equal
signature were fused wherever they are independent, by Mirsky's theorem. gone: the share of (heavy - bound) that fusing removed. all:
launches of every kind. right: outputs and all gradients equal in float64, on fresh data and other batch sizes, in train and eval mode.
These use ``objective="launches"``. inference, training: fused anew, in float32 with the default objective, the loop's time over the fused
model's; what looks slower is timed up to three times, and the best counts. --no-time leaves them out. --why prints each subject's refusals.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fxfuse
from fxfuse.planning import timing
from zoo.check import Outcome, check
from zoo.registry import Subject, subjects

# What reads slower than the loop is timed at most so often; the best counts.
REPEATS = 3
HEAD = f"{'':26}{'heavy':>12}{'bound':>7}{'gone':>6}{'all':>16}  {'':7}{'refused':>7}"


def row(subject: Subject) -> tuple[Outcome, dict[str, Any]]:
    """One line of the table, as data."""
    outcome = check(subject)
    return outcome, {
        "package": subject.package, "heavy": [outcome.before.heavy, outcome.after.heavy], "bound": outcome.before.bound,
        "gone": outcome.share, "all": [outcome.before.total, outcome.after.total], "right": not outcome.wrong, "wrong": outcome.wrong,
        "calls compared": outcome.compared, "refused": [str(each) for each in outcome.report.refused],
    }


def ratios(subject: Subject, seconds: float) -> dict[str, float]:
    """How many times faster the fused model is: a forward in eval mode, and forward with backward in train mode."""
    found: dict[str, float] = {}
    model, args, kwargs = subject.build()
    for name, mode, training in (("inference", "infer", False), ("training", "train", True)):
        fused = fxfuse.optimize(model, args, example_kwargs=kwargs, mode=mode, cache=False)

        def call(each: torch.nn.Module, training: bool = training) -> Callable[[], object]:
            def run() -> None:
                if not training:
                    with torch.no_grad():
                        each(*args, **kwargs)
                    return
                leaves = [leaf for leaf in tree_flatten(each(*args, **kwargs))[0] if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
                torch.autograd.backward([leaf.sum() for leaf in leaves])
                each.zero_grad(set_to_none=True)

            return run

        calls = [call(each.train(training)) for each in (model, fused)]
        for _ in range(REPEATS):  # on a shared machine an identity reads 0.95 now and then
            loop, packed = timing.medians(calls, budget=seconds, most=1000)
            found[name] = max(loop / packed, found.get(name, 0.0))
            if found[name] >= 1:
                break
    return found


def line(name: str, data: dict[str, Any]) -> str:
    """The row as text."""
    heavy, every = ("{:,} -> {:,}".format(*data[key]) for key in ("heavy", "all"))
    text = f"{name:26}{heavy:>12}{data['bound']:>7}{data['gone']:>6.2f}{every:>16}  {'right' if data['right'] else 'WRONG':7}"
    text += f"{len(data['refused']):>7}"
    return text + "".join(f"{ratio:>10.2f}x" for ratio in data.get("faster", {}).values())


def main() -> int:
    """Print the table; 1 if anything is wrong."""
    options = argparse.ArgumentParser(description="launches before and after fusing, over models of other packages")
    options.add_argument("names", nargs="*", help="subjects, all if none is named")
    options.add_argument("--no-time", dest="time", action="store_false", help="launches and correctness alone")
    options.add_argument("--seconds", type=float, default=2.0, help="per measurement")
    options.add_argument("--why", action="store_true", help="print refusals")
    options.add_argument("--json", type=Path, help="write the data here")
    chosen = options.parse_args()
    warnings.simplefilter("ignore")  # of packages that are not ours
    print(HEAD + (f"{'inference':>11}{'training':>11}" if chosen.time else ""))
    found: dict[str, dict[str, Any]] = {}
    for subject in subjects():
        if chosen.names and subject.name not in chosen.names:
            continue
        if subject.missing:
            print(f"{subject.name:26}skipped: {subject.missing}")
            continue
        outcome, data = row(subject)
        if chosen.time:
            data["faster"] = ratios(subject, chosen.seconds)
        found[subject.name] = data
        print(line(subject.name, data), flush=True)
        for each in outcome.wrong:
            print(f"    WRONG {each}")
        if chosen.why:
            for sentence, number in Counter(data["refused"]).most_common():
                print(f"    {number}x {sentence}")
    if not found:
        return 0
    loops = [data["gone"] for data in found.values() if data["heavy"][0] > data["bound"]]
    right = sum(data["right"] for data in found.values())
    print(f"{len(found)} subjects, {right} right; share gone {sum(loops) / len(loops):.3f} on average")
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1))
    return 0 if all(data["right"] for data in found.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
