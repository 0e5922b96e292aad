"""One bug, two verdicts: does validation keep it from reaching the user, and does a test fail?

Comes in: a bug, and the ``Suite``. Goes out: ``Verdict``. Only a bug that makes some fused model compute something else counts as wrong;
one by which a rule refuses, or the program raises, cannot hurt, and is counted apart.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import fxfuse
from fxfuse.passes.rules import joins
from mutants import injected, sources
from mutants.injected import JOIN
from mutants.subjects import Subject, family_of, subjects_of, table_models
from mutants.subjects import ops as all_ops
from mutants.suite import Facts, Suite
from mutants.verdicts import Late, difference, fuse, limited, silent

PATIENCE = 60  # seconds for all that is done with one bug
GENERATED = "tests/test_rules_generated.py::test_the_rule_equals_vmap_and_the_loop"


@dataclass
class Verdict:
    """``effect``: "wrong" (some fused model differs), "refused" (less fuses, or something raises), "none", or "not run" (by no test)."""

    bug: Any
    effect: str = "none"
    difference: str = ""  # of the model that is fused without validation
    passed: str = ""  # how the model differs that validation let pass
    killer: str = ""  # the test that fails
    said: str = ""  # and what it says

    @property
    def survived(self) -> bool:
        """Wrong, and not found by both."""
        return self.effect == "wrong" and bool(self.passed or not self.killer)


def judged(bug: Any, suite: Suite) -> Verdict:
    """Both verdicts on a bug, in time."""
    try:
        with limited(PATIENCE), warnings.catch_warnings():
            return _of_step(bug, suite) if isinstance(bug, injected.Bug) else _of_source(bug, suite)
    except Late:
        return Verdict(bug, "refused", killer="(time)", said="does not end")


def shown(bug: Any, subject: Subject) -> Verdict:
    """The verdict of run time alone: ``subject`` fused without and with validation while the bug is active."""
    verdict = Verdict(bug)
    made = fuse(subject, validate=False)
    if not made.wrong:
        verdict.effect = "none" if made.fused else "refused"
        return verdict
    verdict.effect, verdict.difference = "wrong", made.difference
    verdict.passed = silent(fuse(subject, validate=True).difference)
    return verdict


def _of_step(bug: injected.Bug, suite: Suite) -> Verdict:
    with injected.active(bug):
        verdict = shown(bug, bug.subject)
        if verdict.effect == "wrong":
            join = sources.place(joins.join)
            runs = (lambda facts: join in facts.functions) if bug.op == JOIN else (lambda facts: bug.op in facts.ops)
            # Of the many tests that join lanes, the model's own comes first: the time may not last for all.
            own = (name for name in suite.items if name.endswith(f"[{bug.subject.name}]"))
            verdict.killer, verdict.said = suite.killer(runs, next(own, "") if bug.op == JOIN else f"{GENERATED}[{bug.op}]")
    return verdict


def _of_source(bug: sources.SourceBug, suite: Suite) -> Verdict:
    def covering(facts: Facts) -> bool:
        return bug.covered in facts.functions

    ops = {op for facts in suite.facts.values() if covering(facts) for op in facts.ops}
    if not any(covering(facts) for facts in suite.facts.values()):
        return Verdict(bug, "not run")  # at import alone, or by no test that is asked
    with sources.active(bug) as fits:
        if not fits:
            return Verdict(bug, "not run")
        killer, said = suite.killer(covering)
        verdict = Verdict(bug, "none", killer=killer, said=said)
        op = killer.partition("[")[2].removesuffix("]") if killer.startswith(GENERATED) else ""
        if killer and not op:
            if killer not in _usual:
                with sources.paused(bug):
                    _usual[killer] = _witnessed(suite, killer)
            for (effect, passed), (random, _) in zip(_witnessed(suite, killer), _usual[killer], strict=False):
                if effect and not random:  # a model that draws random numbers differs from itself
                    return Verdict(bug, "wrong", effect, silent(passed), killer, said)
        for subject in _candidates(op, killer, ops, bug):
            seen = shown(bug, subject)
            if seen.effect == "wrong":
                return Verdict(bug, "wrong", seen.difference, seen.passed, killer, said)
            verdict.effect = max(verdict.effect, seen.effect)  # "refused" comes after "none"
    if killer and verdict.effect == "none":
        verdict.effect = "refused"  # the test saw it, no number did: other sentences, other launches, or something raises
    return verdict


_usual: dict[str, list[tuple[str, str]]] = {}  # what is witnessed in a test without any bug


def _candidates(op: str, killer: str, ops: set[str], bug: sources.SourceBug) -> list[Subject]:
    """Models that may show the bug: of the op whose test failed; where none failed, a few of the file's ops."""
    if op:
        return subjects_of(op)
    if not killer and "rules" in bug.file:
        own = sorted(one for one in ops & set(all_ops()) if bug.family == family_of(one))
        return [subject for one in own[:3] for subject in subjects_of(one)[:3]]
    return table_models()[::9]


def _witnessed(suite: Suite, test: str) -> list[tuple[str, str]]:
    """For every ``fxfuse.optimize`` in a test: how its result differs without validation, and with."""
    seen: list[tuple[str, str]] = []
    optimize = fxfuse.optimize

    def watching(model: Any, example: Any = None, **options: Any) -> Any:
        given, kwargs = example if isinstance(example, tuple) else (example,), options.get("example_kwargs") or {}
        if example is not None and not options.get("inplace"):
            passed = ""
            differs = _difference_of(optimize, model, given, kwargs, example, {**options, "validate": False})
            if differs:
                passed = _difference_of(optimize, model, given, kwargs, example, {**options, "validate": True})
            seen.append((differs, passed))
        return optimize(model, example, **options)

    fxfuse.optimize = watching
    try:
        suite.failure(test)
    finally:
        fxfuse.optimize = optimize
    return seen


def _difference_of(optimize: Any, model: Any, given: Any, kwargs: Any, example: Any, options: Any) -> str:
    try:
        fused = optimize(copy.deepcopy(model), example, **options)
        return difference(model, fused, [given], kwargs)
    except Exception:
        return ""
