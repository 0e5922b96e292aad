"""Settings of every test run."""

from __future__ import annotations

import itertools
import os
import tempfile

import pytest
import torch

# The tests' tensors are tiny: a second thread costs more than it does, and two test processes share two cores.
torch.set_num_threads(1)

# Plans of the user's are not for tests to read or write; nor those of another test.
_plans = tempfile.TemporaryDirectory(prefix="fxfuse-plans-")
_numbers = itertools.count()
os.environ.pop("FXFUSE_CACHE", None)
os.environ["FXFUSE_CACHE_DIR"] = os.path.join(_plans.name, "shared")


@pytest.fixture(autouse=True)
def _plans_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXFUSE_CACHE_DIR", os.path.join(_plans.name, str(next(_numbers))))
