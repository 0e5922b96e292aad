"""One direction of imports: the parts of fxfuse, from the ground up, as the table in CONTRIBUTING.md has them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROW = re.compile(r"^\| ((?:`[a-z_]+/?`(?:, )?)+) \|", re.MULTILINE)


def layers() -> dict[str, int]:
    """Each part's place in the table, from 0 at the ground."""
    table = (ROOT / "CONTRIBUTING.md").read_text().split("| Part of `fxfuse/` |")[1].split("\n\n")[0]
    return {part: place for place, row in enumerate(ROW.findall(table)) for part in re.findall(r"`([a-z_]+)/?`", row)}


LAYERS = layers()


def files() -> dict[str, Path]:
    """Every module by its dotted name below ``fxfuse``; the passes lie behind a symlink that ``rglob`` may not follow."""
    ours = {path.relative_to(ROOT / "fxfuse"): path for path in (ROOT / "fxfuse").rglob("*.py")}
    passes = {path.relative_to(ROOT): path for path in (ROOT / "passes").rglob("*.py")}
    return {".".join(name.with_suffix("").parts): path for name, path in {**ours, **passes}.items()}


def imported(name: str, tree: ast.Module) -> Iterator[str]:
    """What a module imports from fxfuse before any of its functions runs, but for what only type checkers read."""
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If):
            pending += node.orelse if "TYPE_CHECKING" in ast.unparse(node.test) else node.body + node.orelse
        elif isinstance(node, ast.Try):
            pending += node.body + node.orelse + [each for handler in node.handlers for each in handler.body]
        elif isinstance(node, ast.Import):
            yield from (each.name.partition(".")[2] for each in node.names if each.name.startswith("fxfuse."))
        elif isinstance(node, ast.ImportFrom):
            above = ["fxfuse", *name.split(".")[: -node.level]] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            if base == "fxfuse":
                yield from (each.name for each in node.names)
            elif base.startswith("fxfuse."):
                yield base.partition(".")[2]


def test_every_part_has_its_place() -> None:
    assert {name.split(".")[0] for name in files()} - {"__init__", "__main__"} == set(LAYERS)


@pytest.mark.parametrize("part", LAYERS)
def test_imports_point_down(part: str) -> None:
    wrong = {
        f"{name} imports {other}"
        for name, path in files().items()
        if name.split(".")[0] == part
        for other in imported(name, ast.parse(path.read_text()))
        if other.split(".")[0] in LAYERS and LAYERS[other.split(".")[0]] > LAYERS[part]
    }
    assert not wrong


def test_every_form_of_import_is_read() -> None:
    lines = ("from fxfuse.planning.plan import P", "from . import forms", "if True:\n    from ...cli import app", "import fxfuse.graph")
    assert sorted(imported("passes.rules.linear", ast.parse("\n".join(lines)))) == ["cli", "graph", "passes.rules", "planning.plan"]
    assert list(imported("passes.rules.__init__", ast.parse("from ..emit import Emitter"))) == ["passes.emit"]
    assert not list(imported("fused", ast.parse("if TYPE_CHECKING:\n    from .dynamo import call\ndef f():\n    from .cli import app")))
