"""``python -m mutants [family ...] [--each N | --all] [--most N] [--minutes N] [--kind injected|source] [--tests file ...]``.

Bugs made and found, by family: of every rule a few at every kind of step, of every function that writes programs a few in its source.

Exit status 1 where a bug that makes some model compute something else was missed, at run time or by the tests, and is not in
``equivalent.txt`` with the reason why it is none.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import sys
import time
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from mutants import injected, sources
from mutants.apart import Died, each
from mutants.judge import Verdict, judged
from mutants.subjects import family_of, ops
from mutants.suite import Suite

EQUIVALENT = Path(__file__).with_name("equivalent.txt")
COLUMNS = ("made", "not run", "no effect", "refused", "wrong", "at run time", "by tests", "equivalent", "survived")


def equivalent() -> dict[str, str]:
    """Bugs by name that are none, each with the reason: lines of ``name  # reason``."""
    lines = [line.strip() for line in EQUIVALENT.read_text(encoding="utf-8").splitlines()]
    return {name.strip(): reason.strip() for name, _, reason in (line.partition("  # ") for line in lines if line and line[0] != "#")}


def bugs(families: list[str], kinds: list[str]) -> list[Any]:
    """All bugs of these families (all, where none is given)."""
    made: list[Any] = []
    if "injected" in kinds:
        for op in [op for op in ops() if not families or family_of(op) in families]:
            made += injected.all_bugs(op)
        if not families or "joins" in families:
            made += injected.join_bugs()
    if "source" in kinds:
        for file in sources.files():
            made += [bug for bug in sources.bugs_of(file) if not families or bug.family in families]
    return made


def main() -> int:
    """Run; the exit status."""
    parser = argparse.ArgumentParser(prog="mutants", description=__doc__)
    parser.add_argument("families", nargs="*", help="files of passes/rules by name, or passes/joins, fxfuse/recipes, ...")
    parser.add_argument("--each", type=int, default=1, help="as many of a kind of step of a rule, or of a function, drawn at random")
    parser.add_argument("--all", action="store_true", help="all there are: some 13,000, a day")
    parser.add_argument("--most", type=int, help="as many bugs, drawn at random")
    parser.add_argument("--minutes", type=float, help="no new bug after these; the order is random, so that what was done is a fair sample")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes; each bug has one of its own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", choices=("injected", "source"))
    parser.add_argument("--tests", nargs="+", help="test files that are asked, without test_ (default: those of rules, joins and packing)")
    parser.add_argument("--verbose", action="store_true", help="a line for every bug")
    parser.add_argument("--list", action="store_true", help="names of the bugs, nothing is run")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    outcome: list[int] = []
    suite = Suite(lambda suite: outcome.append(_work(suite, given)))
    suite.session(given.tests)
    return outcome[0] if outcome else 2


def _work(suite: Suite, given: Any) -> int:
    start = time.perf_counter()
    chosen = bugs(given.families, given.kind or ["injected", "source"])
    total = len(chosen)
    random.Random(given.seed).shuffle(chosen)
    if not given.all:
        places: dict[tuple[str, ...], list[Any]] = defaultdict(list)
        for bug in chosen:
            places[(bug.op, bug.kind) if isinstance(bug, injected.Bug) else (bug.file, bug.function)].append(bug)
        chosen = [bug for number in range(given.each) for of in places.values() for bug in of[number : number + 1]]
        random.Random(given.seed).shuffle(chosen)
    chosen = chosen[: given.most]
    print(f"{len(chosen)} of {total} bugs ({time.perf_counter() - start:.0f} s)", flush=True)
    if given.list:
        print("\n".join(bug.name for bug in chosen))
        return 0
    suite.survey(given.jobs)
    print(f"{len(suite.facts)} tests ({time.perf_counter() - start:.0f} s)", flush=True)
    known = equivalent()
    rows: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(COLUMNS, 0))
    survivors: list[Verdict] = []
    surveyed, done = time.perf_counter(), 0
    sources.ready()

    def work(bug: Any) -> Verdict | None:
        if given.minutes is not None and time.perf_counter() - surveyed > 60 * given.minutes:
            return None
        return dataclasses.replace(judged(bug, suite), bug=None)  # which holds what cannot be pickled

    for position, said in each(chosen, work, given.jobs):
        if said is None:
            continue
        bug = chosen[position]
        verdict = Verdict(bug, "refused", killer=f"(exit {said.code})") if isinstance(said, Died) else dataclasses.replace(said, bug=bug)
        done += 1
        _count(rows[bug.family], verdict, bug.name in known)
        if verdict.survived and bug.name not in known:
            survivors.append(verdict)
        if given.verbose or (verdict.survived and bug.name not in known):
            print(_line(verdict), flush=True)
        if done % 100 == 0:
            print(f"... {done} of {len(chosen)}, {len(survivors)} survived ({time.perf_counter() - start:.0f} s)", flush=True)
    print(_table(rows))
    print(f"{done} of {total} tried, {len(survivors)} survived; {time.perf_counter() - start:.0f} s")
    return 1 if survivors else 0


def _count(row: dict[str, int], verdict: Verdict, is_equivalent: bool) -> None:
    row["made"] += 1
    row["no effect" if verdict.effect == "none" else verdict.effect] += 1
    if verdict.effect == "wrong":
        row["at run time"] += not verdict.passed
        row["by tests"] += bool(verdict.killer)
        row["equivalent" if is_equivalent else "survived"] += verdict.survived


def _line(verdict: Verdict) -> str:
    where = f"{verdict.bug.file}:{verdict.bug.line} " if isinstance(verdict.bug, sources.SourceBug) else f"[{verdict.bug.subject.name}] "
    if verdict.effect != "wrong":
        return f"{verdict.effect:8} {where}{verdict.bug.name}{f'; {verdict.killer}' if verdict.killer else ''}"
    missed = [*(["run time"] if verdict.passed else []), *([] if verdict.killer else ["tests"])]
    fate = f"SURVIVED {' and '.join(missed)}" if missed else "killed"
    return f"{fate:8} {where}{verdict.bug.name}: {verdict.passed or verdict.difference}; test: {verdict.killer or 'none'}"


def _table(rows: dict[str, dict[str, int]]) -> str:
    lines = [f"{'family':24}" + "".join(f"{name:>13}" for name in COLUMNS)]
    for family in sorted(rows):
        lines.append(f"{family:24}" + "".join(f"{rows[family][name]:13,}" for name in COLUMNS))
    lines.append(f"{'all':24}" + "".join(f"{sum(row[name] for row in rows.values()):13,}" for name in COLUMNS))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
