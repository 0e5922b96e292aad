"""``make fuzz``: random models for as long as asked, what fails made small and appended to a file.

    python -m fuzz --minutes 60 --seed 7        (in tests/)

Prints how many models there were, how many fused, and what was found. A round of a seed is the same models every time.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import time
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from .cases import Case, cases, literal
from .compare import Outcome, check
from .shrink import shrink, signature

ROUND = 100


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(".fuzz/failures.txt"), help="failing cases are appended here")
    parser.add_argument("--shrink", type=float, default=60.0, help="seconds for each failure; 0: as it came")
    parser.add_argument("--case", help="check this one case, a literal, and print its source")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.case:
        outcome = check(eval(options.case))
        print(outcome.text, *outcome.problems, *outcome.refusals, outcome.status, sep="\n")
        return int(bool(outcome.problems))
    campaign = Campaign(options.out, options.shrink)
    end, number = time.monotonic() + 60 * options.minutes, 0
    while time.monotonic() < end:
        campaign.round(options.seed * 100_000 + number, end)
        number += 1
        print(campaign, file=sys.stderr, flush=True)
    print(campaign)
    return int(bool(campaign.found))


class Campaign:
    """Counts, and what was found."""

    def __init__(self, out: Path, budget: float) -> None:
        self.out, self.budget = out, budget
        self.counts: collections.Counter[str] = collections.Counter()
        self.found: dict[str, tuple[Case, list[str]]] = {}
        self.sources: set[str] = set()

    def round(self, number: int, end: float) -> None:
        """A hundred models."""

        @seed(number)
        @settings(max_examples=ROUND, deadline=None, database=None, phases=(Phase.generate,), suppress_health_check=list(HealthCheck))
        @given(cases())
        def one(case: Case) -> None:
            if time.monotonic() < end:
                self.note(json.loads(json.dumps(case)), number)

        one()

    def note(self, case: Case, number: int) -> None:
        try:
            outcome = check(case)
        except Exception as error:  # the fuzzer itself
            outcome = Outcome("broken", [f"fuzzer: {type(error).__name__}: {error}"])
        if outcome.text in self.sources:
            self.counts["seen before"] += 1
        self.sources.add(outcome.text)
        self.counts[outcome.status] += 1
        self.counts["models"] += 1
        if outcome.seconds > 30:
            self.counts["slow"] += 1
            print(f"slow: {outcome.seconds:.0f} s: {literal(case)}", file=sys.stderr)
        if not outcome.problems:
            return
        self.counts["failing"] += 1
        kind = signature(outcome)
        if kind in self.found:
            return
        small = shrink(case, self.budget) if self.budget and outcome.status != "broken" else case
        problems = check(small).problems if small is not case else outcome.problems
        self.found[kind] = (small, problems)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with self.out.open("a", encoding="utf-8") as file:
            print(f"# round {number}", *(f"# {problem}" for problem in problems[:3]), literal(small), "", sep="\n", file=file)
        print(f"FOUND {problems[:1]}\n{literal(small)}\n", file=sys.stderr, flush=True)

    def __str__(self) -> str:
        counts = ", ".join(f"{number:,} {name}" for name, number in self.counts.items())
        return f"{counts}; {len(self.found)} kinds of failure"


if __name__ == "__main__":
    sys.exit(main())
