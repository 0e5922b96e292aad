"""Ctrl-C and SIGTERM while a model is fused, written, and compared; full disks: one line, no half-written output, OUT as it was."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("click")
pytest.importorskip("safetensors")

from fxfuse.cli import codes

ROOT = Path(__file__).resolve().parents[1]
MODEL = '''
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 1)) for _ in range(6))

    def forward(self, x):
        return torch.cat([net(x[:, i:i + 1]) for i, net in enumerate(self.nets)], 1)
'''
# Runs the command, and sleeps where it is told to: when one function has done its work.
CHILD = """
import importlib, pathlib, sys, time
module, name = sys.argv[1].rsplit(".", 1)
module = importlib.import_module(module)
real = getattr(module, name)

def slow(*args, **kwargs):
    value = real(*args, **kwargs)
    pathlib.Path("now").touch()
    time.sleep(60)
    return value

setattr(module, name, slow)
from fxfuse.cli import main
sys.exit(main(sys.argv[2:]))
"""
CONVERT = ["convert", "interrupted:Net", "--inputs", "float32[4,6]", "--objective", "launches"]
STAGES = {
    "fusing": ["-c", CHILD, "torch.autograd.backward", *CONVERT],
    "exporting": ["-c", CHILD, "torch.export.export", *CONVERT],
    "writing": ["-c", CHILD, "torch.export.save", *CONVERT],
    "loading": ["-c", CHILD, "torch.export.load", *CONVERT],
}


@pytest.fixture
def place(tmp_path):
    (tmp_path / "interrupted.py").write_text(MODEL)
    return tmp_path


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "FXFUSE_CACHE": "0", "OMP_NUM_THREADS": "1"}


def contents(place):
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(number, stage, place):
    out = {"fusing": "net.pt2", "exporting": "net.pt2", "writing": "net", "loading": "net.pt2"}[stage]
    if out == "net.pt2":
        (place / out).write_bytes(b"before")
    before = contents(place)
    words = [sys.executable, *STAGES[stage], "-o", out]
    child = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=place, env=environment())
    while not (place / "now").exists() and child.poll() is None:
        time.sleep(0.05)
    child.send_signal(number)
    said, err = child.communicate(timeout=60)
    (place / "now").unlink(missing_ok=True)
    what = "interrupted" if number == signal.SIGINT else "terminated"
    assert (err, said) == (f"fxfuse: {what}; nothing was written\n", "")
    assert child.returncode == (codes.INTERRUPTED if number == signal.SIGINT else codes.TERMINATED)
    assert contents(place) == before


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs limits on the size of files")
@pytest.mark.parametrize("out", ["net.pt2", "net.safetensors", "net.onnx", "net"])
def test_a_file_that_cannot_be_written_to_its_end(out, place):
    """As on a full disk: the first kilobyte is written, and no more."""
    if out == "net.onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024)); from fxfuse.cli import main; sys.exit(main())"
    words = [sys.executable, "-c", limit, *CONVERT, "-o", out]
    before = contents(place)
    done = subprocess.run(words, capture_output=True, text=True, cwd=place, env=environment(), check=False)
    assert done.returncode == codes.OUTPUT, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "make room" in done.stderr
    assert contents(place) == before
    assert sorted(path.name for path in place.iterdir()) == ["interrupted.py"]
