"""A minute of fuzzing in every run, always the same models; and all that longer runs (``make fuzz``) have found."""

from __future__ import annotations

import json

import pytest
from fuzz.cases import Case, cases, literal
from fuzz.compare import check
from fuzz.found import FOUND
from hypothesis import HealthCheck, Phase, event, given, settings


@settings(
    max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=(Phase.generate,)
)  # fmt: skip
@given(cases())
def test_random_models_are_the_same_when_fused(case: Case) -> None:
    case = json.loads(json.dumps(case))
    outcome = check(case)
    event(outcome.status)
    assert not outcome.problems, f"{outcome.text}\n{literal(case)}\n{outcome.problems}"


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_is_right(name: str) -> None:
    outcome = check(FOUND[name])
    assert outcome.status != "invalid", outcome.text
    assert not outcome.problems, f"{outcome.text}\n{outcome.problems}"
