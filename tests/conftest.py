"""Settings of every test run."""

from __future__ import annotations

import atexit
import itertools
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

# The tests' tensors are tiny: a second thread costs more than it does, and two test processes share two cores.
torch.set_num_threads(1)

# Plans of the user's are not for tests to read or write; nor those of another test.
_plans = tempfile.mkdtemp(prefix="fxfuse-plans-")
atexit.register(shutil.rmtree, _plans, ignore_errors=True)
_numbers = itertools.count()
os.environ.pop("FXFUSE_CACHE", None)
os.environ["FXFUSE_CACHE_DIR"] = os.path.join(_plans, "shared")


@pytest.fixture(autouse=True)
def _plans_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXFUSE_CACHE_DIR", os.path.join(_plans, str(next(_numbers))))


@pytest.fixture
def fresh_dynamo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing compiled before or after; and what fuses does not depend on the machine's load."""
    torch._dynamo.reset()
    monkeypatch.setattr("fxfuse.dynamo.worth.SLOWER", math.inf)
    monkeypatch.setattr("fxfuse.dynamo.worth.FAR_AHEAD", 0.0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], Path]]:
    """Writes a module of a name and a text into a folder of its own, in which the test runs; returns the folder."""
    written = []

    def write(name: str, text: str) -> Path:
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(tmp_path))
        sys.modules.pop(name, None)
        written.append(name)
        return tmp_path

    yield write
    for name in written:
        sys.modules.pop(name, None)
