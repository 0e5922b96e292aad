"""The tests, run again and again inside one pytest session: does any of them fail while fxfuse has a bug?

Comes in: test files. Goes out: ``Suite``: for each test how long it takes and which functions and rules of fxfuse it runs (``survey``,
kept on disk until a file changes), and ``failure``: what a test says, now.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import fxfuse
from fxfuse.passes.rules.base import Rule
from mutants.apart import Died, each

ROOT = Path(fxfuse.__file__).parents[1]  # as the functions of fxfuse name their files
FILES = (
    "rules_generated joins_writes joins_sums joins_extremes joins_containers forks views buffers packing structure shape_conv_per_row "
    "shape_custom_networks shape_feature_networks shape_generated_weights shape_pointwise shape_shared_conv rule_attention rule_batch_ops "
    "rule_constants rule_embedding rule_norm_state rule_norms rule_products rule_random rule_recurrent rule_reductions rule_small_ops "
    "vmap_fallback methods loops_spelled loops_joined loops_lanes loops_networks sizes_inside unify"
).split()
SLOW = 8.0  # seconds; slower tests are not asked
KEPT = ROOT / ".mutants"


@dataclass
class Facts:
    """What a test runs of fxfuse: functions (``passes/emit.py:120``, by their first line), and the rules of which ops."""

    seconds: float
    functions: set[str]
    ops: set[str]


class Suite:
    """A plugin of pytest; ``session`` runs ``work`` in the place of the tests."""

    def __init__(self, work: Callable[[Suite], None]) -> None:
        self.work = work
        self.items: dict[str, Any] = {}
        self.facts: dict[str, Facts] = {}
        self.reports: list[Any] = []

    def session(self, files: list[str] | None = None) -> int:
        """Collect the tests of these files (names without ``test_``), then work. Returns pytest's exit code."""
        paths = [str(ROOT / "tests" / f"test_{name}.py") for name in files or FILES]
        quiet = ["-o", "addopts=", "--capture=no", "-p", "no:terminal", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:faulthandler"]
        return int(pytest.main([f"--rootdir={ROOT}", "-c", str(ROOT / "pyproject.toml"), *quiet, *paths], plugins=[self]))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: Any) -> bool:
        """Called once everything is collected."""
        self.items = {item.nodeid: item for item in session.items}
        self.work(self)
        return True

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Setup, call and teardown of a test, one by one."""
        self.reports.append(report)

    def failure(self, name: str) -> str:
        """Run one test: the last line of what it says, or "" where it passes."""
        item, self.reports = self.items[name], []
        item._initrequest()
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
        for report in self.reports:
            if report.failed:
                crash = getattr(report.longrepr, "reprcrash", None)
                return str(crash.message if crash is not None else report.longrepr).partition("\n")[0] or "fails"
        return ""

    def survey(self, jobs: int = 1) -> None:
        """Run every test once and note what it runs; tests that fail or are slow are left out. File by file, as it takes minutes."""
        rows: dict[Path, dict[str, Any]] = {}
        for path in sorted({item.path for item in self.items.values()}):
            file = KEPT / f"{path.stem}.json"
            kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            rows[path] = kept["facts"] if kept.get("state") == _state(path) else {}
        todo = [path for path, facts in rows.items() if not facts]
        for position, facts in each(todo, self._surveyed, jobs):
            path = todo[position]
            assert not isinstance(facts, Died), f"the tests of {path.name} end the process"
            KEPT.mkdir(exist_ok=True)
            (KEPT / f"{path.stem}.json").write_text(json.dumps({"state": _state(path), "facts": facts}), encoding="utf-8")
            rows[path] = facts
        for facts in rows.values():
            self.facts.update({name: Facts(row[0], set(row[1]), set(row[2])) for name, row in facts.items()})

    def _surveyed(self, path: Path) -> dict[str, Any]:
        rows: dict[str, Any] = {}
        for name in [name for name, item in self.items.items() if item.path == path]:
            with _watched() as (functions, ops):
                start = time.process_time()
                failed = self.failure(name)
                seconds = time.process_time() - start
            if not failed and seconds < SLOW:
                rows[name] = [round(seconds, 3), sorted(functions), sorted(ops)]
        return rows

    def killer(self, covering: Callable[[Facts], bool], first: str = "", seconds: float = 12.0) -> tuple[str, str]:
        """The first test that fails, of those that ``covering`` picks, quickest first, and what it says; ("", "") where none does."""
        names = sorted((name for name, facts in self.facts.items() if covering(facts)), key=lambda name: self.facts[name].seconds)
        end = time.process_time() + seconds
        for name in ([first] if first in self.items else []) + [name for name in names if name != first]:
            said = self.failure(name)
            if said:
                return name, said
            if time.process_time() > end:
                break
        return "", ""


def _state(test: Path) -> str:
    """Changes where fxfuse does, or the test file, or what test files share."""
    shared = [path for path in (ROOT / "tests").glob("*.py") if not path.stem.startswith("test_")]
    files = [test, *shared, *(path for folder in ("fxfuse", "passes") for path in (ROOT / folder).rglob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()


@contextmanager
def _watched() -> Iterator[tuple[set[str], set[str]]]:
    """The functions of fxfuse that are called meanwhile, and the ops whose rules are applied."""
    codes: set[Any] = set()
    functions: set[str] = set()
    ops: set[str] = set()
    apply = Rule.apply

    def applied(rule: Rule, emitter: Any, bundle: Any) -> Any:
        ops.add(bundle.name)
        return apply(rule, emitter, bundle)

    def called(frame: Any, event: str, _: Any) -> None:
        if event == "call":
            codes.add(frame.f_code)

    Rule.apply = applied  # type: ignore[method-assign]
    sys.setprofile(called)
    try:
        yield functions, ops
    finally:
        sys.setprofile(None)
        Rule.apply = apply  # type: ignore[method-assign]
        functions.update(f"{where}:{code.co_firstlineno}" for code in codes if (where := source_of(code)))


def source_of(code: Any) -> str:
    """The file of a function of fxfuse, ``passes/emit.py`` or ``fxfuse/weights/recipes.py``; "" for any other."""
    name = code.co_filename
    for folder in ("fxfuse/passes/", "passes/", "fxfuse/"):
        before, found, rest = name.partition(f"{ROOT}/{folder}")
        if found and not before:
            return f"{'passes' if folder.endswith('passes/') else 'fxfuse'}/{rest}"
    return ""
