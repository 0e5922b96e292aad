"""The mutants themselves (``make mutants``): bugs are made, are seen, are found, are gone afterwards. A few of each kind, end to end."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from rule_samples import BETWEEN, SAMPLES
from test_rules_generated import test_the_rule_equals_vmap_and_the_loop as generated

from fxfuse.passes.rules.base import RULES
from mutants import injected, sources
from mutants.__main__ import equivalent
from mutants.apart import Died, each
from mutants.injected import JOIN
from mutants.judge import shown
from mutants.subjects import Subject, ops, subjects_of, table_models
from mutants.verdicts import difference, fuse


def subject_of(op: str, words: str = "") -> Subject:
    """The first subject of an op with these words in its name."""
    return next(subject for subject in subjects_of(op) if words in subject.name)


def test_every_op_of_every_rule_has_subjects() -> None:
    never = {op for op, samples in SAMPLES.items() if all(sample.never for sample in samples)}
    missing = [op for op in RULES if op not in BETWEEN | never and not subjects_of(op)]
    assert not missing
    assert set(RULES) - BETWEEN <= set(ops())


# A step of a rule, what is wrong there, and where it shows: at least one of each kind.
BUGS = [
    ("linear", "operand weights 1", "two lanes swapped"), ("linear", "recipe 1", "members swapped"),
    ("softmax", "call softmax 1", "dim: "), ("batch_norm", "result 1", "two lanes swapped"),
    ("embedding", "operand table 1", "rows of two lanes swapped"), ("relu", "call relu 1", "gelu in its place"),
    ("conv2d", "operand 1", "two lanes swapped"), ("transpose", "result 1", "lane axis at "),
    ("linear", "call linear 1", "2 left out"), ("cumulative_batch_norm", "operand 2", "two lanes swapped"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "at", "change"), BUGS, ids=lambda part: str(part).replace(" ", "_"))
def test_a_bug_in_a_step_is_seen_and_found(op: str, at: str, change: str) -> None:
    steps = (bug for subject in subjects_of(op) for bug in injected.possible(subject, op) if bug.at == at and bug.change.startswith(change))
    for bug in steps:
        with injected.active(bug):
            verdict = shown(bug, bug.subject)
        if verdict.effect == "wrong":
            assert not verdict.passed, f"{bug.name} on {bug.subject.name} passes validation: {verdict.passed}"
            assert not fuse(bug.subject, validate=False).wrong, "the bug is still there"
            return
    pytest.fail(f"{at}, {change}: no such step of {op}, or it makes no difference on any subject")


def test_a_bug_makes_the_generated_test_fail() -> None:
    subject = subject_of("softmax")
    bug = next(bug for bug in injected.possible(subject, "softmax") if bug.at == "result 1" and "swapped" in bug.change)
    generated("softmax")
    with injected.active(bug), pytest.raises(AssertionError, match="apart"):
        generated("softmax")
    generated("softmax")


def test_a_bug_where_lanes_are_joined() -> None:
    subject = table_models()[0]
    bugs = [bug for bug in injected.possible(subject, JOIN) if bug.at.startswith("call")]
    assert bugs
    effects = []
    for bug in bugs:
        with injected.active(bug):
            verdict = shown(bug, subject)
        assert not verdict.passed
        effects.append(verdict.effect)
    assert set(effects) & {"wrong", "refused"}


SOURCES = [
    ("passes/rules/base.py", "physical", "dim + 1", "softmax"),
    ("fxfuse/weights/recipes.py", "lane_view", "index * rows", "linear"),
    ("passes/writer.py", "Writer.pick", "positions[-1] + 1", "select"),
]


@pytest.mark.parametrize(("file", "function", "text", "op"), SOURCES)
def test_a_bug_in_a_file_is_put_in_and_taken_out(file: str, function: str, text: str, op: str) -> None:
    bugs = [bug for bug in sources.bugs_of(file) if bug.function == function and text in bug.change]
    assert bugs
    for bug in bugs:
        with sources.active(bug) as fits:
            assert fits
            for subject in subjects_of(op)[:2]:
                assert not shown(bug, subject).passed
        assert not fuse(subject_of(op), validate=False).wrong


def test_changes_of_one_file_have_different_names_and_compile() -> None:
    bugs = sources.bugs_of("passes/rules/reduce.py")
    assert len(bugs) > 50
    assert len({bug.name for bug in bugs}) == len(bugs)


def test_equivalent_mutants_are_still_made() -> None:
    known = equivalent()
    assert all(reason for reason in known.values()), "every one has its reason"
    in_files = {name for name in known if "/" in name.partition(" ")[0]}
    made = {bug.name for file in {name.partition(" ")[0] for name in in_files} for bug in sources.bugs_of(file)}
    made |= {bug.name for op in {name.partition(":")[0] for name in set(known) - in_files} for bug in injected.all_bugs(op)}
    assert not set(known) - made, "not made any more: take them out of equivalent.txt"


def test_the_independent_comparison_notices() -> None:
    model, x = torch.nn.BatchNorm1d(3).double(), torch.randn(5, 3, dtype=torch.float64)
    assert not difference(model, model, [(x,)])
    for change in (lambda m: m.bias.data.add_(1e-8), lambda m: m.running_mean.add_(1e-8), lambda m: setattr(m, "eps", 2e-5)):
        other = torch.nn.BatchNorm1d(3).double()
        change(other)
        assert difference(model, other, [(x,)])


def test_what_ends_a_process_ends_no_other() -> None:
    def work(number: int) -> int:
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return number * 10

    assert dict(each([0, 1, 2], work, jobs=2)) == {0: 0, 1: Died(-signal.SIGKILL), 2: 20}
