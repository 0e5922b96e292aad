"""The ``fxfuse`` command where an optional package is missing: which one, in one line; plain text without rich."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("click")

from fxfuse.cli import codes

ROOT = Path(__file__).resolve().parents[1]
MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(nn.Linear(1, 5) for _ in range(6))

    def forward(self, x):
        return torch.cat([net(x[:, i:i + 1]) for i, net in enumerate(self.nets)], 1)
"""
USUAL = ["--inputs", "float64[4,6]", "--dtype", "float64"]


@pytest.fixture
def place(importable):
    return importable("cli_model", MODEL)


def blocking(folder, *names):
    """The environment of a process in which a finder refuses some packages, as an environment without them does."""
    (folder / "sitecustomize.py").write_text(f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
""")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(("missing", "words"), [
    ("click", ["--help"]),
    ("click", ["demo", "--json"]),
    ("safetensors", ["convert", "cli_model:Net", *USUAL, "-o", "net.safetensors"]),
    ("numpy", ["convert", "cli_model:Net", *USUAL, "-o", "net.safetensors"]),
    ("onnxscript", ["convert", "cli_model:Net", *USUAL, "-o", "net.onnx"]),
    ("onnxruntime", ["verify", "cli_model:Net", "net.onnx", *USUAL]),
], ids=["click", "click as JSON", "safetensors", "numpy", "onnxscript", "onnxruntime"])  # fmt: skip
def test_a_package_that_a_finder_refuses_is_missing(place, tmp_path, missing, words):
    (place / "net.onnx").write_bytes(b"")
    (tmp_path / "site").mkdir()
    command = [sys.executable, "-m", "fxfuse", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=place, env=blocking(tmp_path / "site", missing), check=False)
    assert done.returncode == codes.PACKAGE, done
    assert (json.loads(done.stdout)["exit_code"] if "--json" in words else done.stdout) in (codes.PACKAGE, "")
    assert f"needs {missing}, which is not installed: pip install 'fxfuse[convert]'" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (place / "net.safetensors").exists()


def test_without_rich_tables_are_plain_text(place, tmp_path):
    (tmp_path / "site").mkdir()
    command = [sys.executable, "-m", "fxfuse", "verify", "cli_model:Net", "cli_model:Net", *USUAL]
    done = subprocess.run(command, capture_output=True, text=True, cwd=place, env=blocking(tmp_path / "site", "rich"), check=False)
    assert done.returncode == codes.OK, done
    assert "furthest apart" in done.stdout
