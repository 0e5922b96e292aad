"""Models of other packages, fused with everything that is legal: right in everything that can be compared, and no worse than before.

Marked ``zoo``: ``make zoo-test`` installs the packages and runs them; elsewhere a subject whose package is absent is skipped.
"""

import pytest
import torch

from zoo.check import check, differences
from zoo.registry import Subject, subjects

ALL = subjects()


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore")  # of packages that are not ours
@pytest.mark.parametrize("subject", ALL, ids=lambda subject: subject.name)
def test_subject(subject: Subject):
    if subject.missing:
        pytest.skip(subject.missing)
    outcome = check(subject)
    assert not outcome.wrong, "\n".join(outcome.wrong)
    assert outcome.compared >= 3
    broken = [str(each) for each in outcome.report.refused if str(each).startswith(("fxfuse failed", "undone"))]
    assert not broken, broken
    assert outcome.after.heavy <= subject.file.HEAVY, f"{outcome.after.heavy} heavy launches, once there were {subject.file.HEAVY}"
    assert outcome.after.total <= outcome.before.total
    known = getattr(subject.file, "FALLS_BACK", "none is known")
    assert all(reason.startswith(known) for reason in outcome.report.fallbacks), outcome.report.fallbacks


def test_every_file_is_a_subject():
    assert len(ALL) >= 24
    for subject in ALL:
        assert subject.says.endswith("."), subject.name
        assert "==" in subject.package
        assert callable(subject.file.model)
        assert callable(subject.file.inputs)


def test_an_absent_package_comes_with_the_command_that_installs_it(monkeypatch):
    subject = ALL[0]
    monkeypatch.setattr(subject.file, "PACKAGE", "no-such-package==1.0")
    assert subject.missing == (
        f"{subject.name} needs no-such-package, which is not installed: make .venv-zoo/.installed "
        "(or pip install --no-deps no-such-package==1.0)"
    )


def test_differences_are_noticed():
    want = [torch.tensor([1.0, 2.0], dtype=torch.float64), None]
    assert differences("output", range(2), [want[0].clone(), None], want, 1e-10) == []
    assert len(differences("output", range(2), [want[0] + 1e-9, None], want, 1e-10)) == 1
    assert len(differences("output", range(2), [want[0].float(), None], want, 1e-10)) == 1
    assert len(differences("output", range(2), [want[0] * float("nan"), None], want, 1e-10)) == 1
    assert len(differences("gradient of", ["a", "b"], [want[0], torch.zeros(1)], want, 1e-10)) == 1
