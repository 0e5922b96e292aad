"""``import fxfuse``: names come when they are asked for, from the modules that type checkers are told; no torch before that."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import fxfuse

ROOT = Path(__file__).resolve().parents[1]
EACH = r"""
import os, sys, traceback
import torch, networkx

failed = []
for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            __import__(name)
            import fxfuse
            assert not isinstance(fxfuse.report, type(os))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if os.waitpid(child, 0)[1]:
        failed.append(name)
print("failed:", failed)
"""


def told():
    """What type checkers read: name -> (module, name in it)."""
    tree = ast.parse(inspect.getsource(fxfuse))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    return {alias.asname or alias.name: (node.module, alias.name) for node in block.body for alias in node.names}


def test_every_name_is_what_type_checkers_are_told():
    names = told()
    assert set(names) == set(fxfuse.__all__)
    for name, (module, own) in names.items():
        assert getattr(fxfuse, name) is getattr(importlib.import_module(f"fxfuse.{module}"), own), name
    assert set(fxfuse.__all__) <= set(dir(fxfuse))
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        fxfuse.no_such_name  # noqa: B018


def run(code, *words):
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(sys, "getdlopenflags"), reason="needs fork")
def test_every_module_can_be_the_first():
    """No order of imports is taken for granted, and a module of a public name does not hide it."""
    files = (ROOT / "fxfuse").rglob("*.py")
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files if path.stem not in ("__main__", "__init__")}
    assert {"fxfuse.report", "fxfuse.weights.lane"} <= names
    out, err = run(EACH, *sorted(names))
    assert out == "failed: []", err


def test_importing_fxfuse_imports_no_torch():
    out, _ = run("import fxfuse, sys; print('torch' in sys.modules, fxfuse.errors.FxfuseError.__name__, 'torch' in sys.modules)")
    assert out == "False FxfuseError False"


def test_a_name_is_not_hidden_by_the_module_of_that_name():
    out, _ = run("import fxfuse.report, fxfuse.graph, fxfuse; from fxfuse import report; print(report is fxfuse.report, callable(report))")
    assert out == "True True"
    assert run("from fxfuse import *; print(callable(optimize), callable(graph))")[0] == "True True"


@pytest.mark.parametrize("words", [["--help"], ["convert", "--help"], ["--version"], ["explain", "--nope"]])
def test_the_command_needs_no_torch_to_say_how_it_is_used(words):
    pytest.importorskip("click")
    out, _ = run("import sys; from fxfuse.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)", *words)
    assert out.endswith("False")
