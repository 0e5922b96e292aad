"""The table of hazards in CONTRIBUTING.md: every hazard has a test, and every test that it names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SECTION = (ROOT / "CONTRIBUTING.md").read_text().partition("## Hazards and their tests\n")[2]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in SECTION.splitlines() if line.startswith("| ")][1:]


@pytest.fixture(scope="module")
def names() -> set[str]:
    trees = [ast.parse(path.read_text()) for path in (ROOT / "tests").glob("test_*.py")]
    return {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_the_table_is_there() -> None:
    assert len(ROWS) > 40


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_every_hazard_has_tests_that_exist(row: list[str], names: set[str]) -> None:
    hazard, tests = row
    named = re.findall(r"`(test_\w+)`", tests)
    assert hazard
    assert named
    assert not set(named) - names


def test_every_test_of_results_and_modules_is_named() -> None:
    """Whoever adds a hazard to these files adds it to the table."""
    for file in ("test_hazards_modules.py", "test_hazards_outputs.py", "test_hazards_data.py"):
        tree = ast.parse((ROOT / "tests" / file).read_text())
        tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}
        absent = sorted(name for name in tests if f"`{name}`" not in SECTION)
        assert not absent, f"{file}: {absent}"
