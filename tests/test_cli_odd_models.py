"""Models and factories that print, exit, raise oddly, move elsewhere: stdout stays the command's, and what is wrong is one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("click")
pytest.importorskip("safetensors")

from fxfuse.cli import codes, main

ROOT = Path(__file__).resolve().parents[1]
MODEL = '''
import os
import subprocess
import sys
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(nn.Linear(2, 3) for _ in range(3))

    def forward(self, x):
        return torch.stack([net(x) for net in self.nets], 1)

class Loud(Net):
    def __init__(self):
        super().__init__()
        print("printed")
        subprocess.run(["echo", "from a child"])

    def forward(self, x):
        os.write(1, b"from C")
        return super().forward(x)

class Exits(Net):
    def forward(self, x):
        sys.exit(0)

class Two(Net):
    def forward(self, x, y):
        return super().forward(x) + y

class Text(Net):
    def forward(self, x):
        return super().forward(x), "text"

class Nothing(Net):
    def forward(self, x):
        return None

class Unprintable(Exception):
    def __str__(self):
        raise ValueError

def nothing():
    return None

def the_class():
    return Net

async def later():
    return Net()

def exits():
    sys.exit("bye")

def unprintable():
    raise Unprintable

def coloured():
    raise ValueError("\\x1b[31mred\\n\\x07 text")

def elsewhere():
    os.chdir("/")
    torch.set_grad_enabled(False)
    return Net()

def scripted():
    return torch.jit.trace(Net(), torch.zeros(4, 2))
'''
X = ["--inputs", "float32[4,2]"]


@pytest.fixture
def run(importable, capsys):
    importable("odd_model", MODEL)

    def run(*words):
        capsys.readouterr()
        code = main([*words, "--json"])
        out, err = capsys.readouterr()
        return code, json.loads(out), err.strip()

    return run


def test_only_json_reaches_stdout(run):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "fxfuse", "explain", "odd_model:Loud", *X, "--json"]
    done = subprocess.run(words, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == codes.OK, done.stderr
    assert json.loads(done.stdout)["ok"]
    assert all(text in done.stderr for text in ("printed", "from a child", "from C"))


ODD = [
    (["explain", "odd_model:nothing", *X], codes.INPUT, "returned a NoneType: it must return a torch.nn.Module"),
    (["explain", "odd_model:the_class", *X], codes.INPUT, "returned the class Net, no instance of it"),
    (["explain", "odd_model:later", *X], codes.INPUT, "returned a coroutine"),
    (["explain", "odd_model:exits", *X], codes.INPUT, "raised SystemExit('bye')"),
    (["explain", "odd_model:Exits", *X], codes.INPUT, "the model's code ended the process: SystemExit(0) (odd_model.py:"),
    (["explain", "odd_model:unprintable", *X], codes.INPUT, "raised Unprintable: without a message"),
    (["explain", "odd_model:coloured", *X], codes.INPUT, "raised ValueError: red text"),
    (["explain", "odd_model.Net", *X], codes.INPUT, "for a factory in a module write odd_model:Net"),
    (["explain", "odd_model:Net", "--inputs", "float32[99999999999999999999,0]"], codes.USAGE, "larger than what fits in memory"),
    (["explain", "odd_model:Net", "--inputs", "x=\u0664"], codes.USAGE, "does not parse"),
    (["explain", "odd_model:Net", "--weights", "", *X], codes.USAGE, "--weights is empty"),
    (["convert", "odd_model:scripted", *X, "-o", "net.pt2"], codes.INPUT, "torch.jit, which torch.export does not take"),
    (["convert", "odd_model:Text", *X, "-o", "net.pt2"], codes.INPUT, "returns the text 'text', which torch.export.load cannot read"),
    (["convert", "odd_model:Nothing", *X, "-o", "net.pt2"], codes.INPUT, "returns no tensor and no number"),
    (["verify", "odd_model:Two", "odd_model:Net", *X], codes.INPUT, "odd_model:Two cannot be called with float32[4,2]"),
]


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is")
@pytest.mark.parametrize(("words", "code", "phrase"), ODD)
def test_odd_models_are_one_line(run, words, code, phrase):
    found, said, err = run(*words)
    assert (found, said["exit_code"]) == (code, code), err
    assert phrase in err
    assert len(err.splitlines()) == 1


def test_two_models_of_other_signatures_differ(run):
    code, said, _ = run("verify", "odd_model:Net", "odd_model:Two", *X)
    assert code == codes.DIFFERENT
    assert "it raises TypeError" in said["verdict"]


def test_paths_are_relative_to_where_the_command_was_started(run, tmp_path):
    code, _, err = run("convert", "odd_model:elsewhere", *X, "--mode", "train", "-o", "net w\u00efth space.pt2")
    assert code == codes.OK, err
    assert (tmp_path / "net w\u00efth space.pt2").exists()
    assert torch.is_grad_enabled()


def test_files_that_are_no_checkpoints(run, tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    os.mkfifo(tmp_path / "pipe.pt2")
    run("convert", "odd_model:Net", *X, "-o", "net.pt2")
    for weights, phrase in (("pipe.pt", "pipe.pt is no file"), (".", ". is a folder"), ("net.pt2", "a zip file that holds no checkpoint")):
        code, _, err = run("explain", "odd_model:Net", "--weights", weights, *X)
        assert code == codes.INPUT
        assert phrase in err
    code, _, err = run("explain", "odd_model:Net", "--inputs", "pipe.pt")
    assert (code, "pipe.pt is no file" in err) == (codes.INPUT, True)
    code, _, err = run("convert", "odd_model:Net", *X, "-o", "pipe.pt2")
    assert (code, "is a pipe or a device" in err) == (codes.OUTPUT, True)


def test_packed_weights_are_not_the_original_s(run):
    assert run("convert", "odd_model:Net", *X, "--objective", "launches", "-o", "packed.safetensors")[0] == codes.OK
    code, _, err = run("explain", "odd_model:Net", "--weights", "packed.safetensors", *X)
    assert (code, "fxfuse restore FILE -o OUT.safetensors writes them by the original's names" in err) == (codes.INPUT, True), err
    assert run("restore", "packed.safetensors", "-o", "back.pt")[0] == codes.OK
    assert run("explain", "odd_model:Net", "--weights", "back.pt", *X)[0] == codes.OK


def test_what_is_read_is_not_written_over(run, tmp_path):
    from safetensors.torch import load_file

    assert run("convert", "odd_model:Net", *X, "-o", "net")[0] == codes.OK
    assert run("restore", "net", "-o", "w.safetensors")[0] == codes.OK
    before = {path: path.read_bytes() for path in tmp_path.glob("net/*")}
    for words, phrase in (
        (["net", "-o", "net"], "-o net is SOURCE itself"),
        (["net", "-o", "net/model.pt2"], "-o net/model.pt2 would replace a part of a folder"),
        (["odd_model:Net", "-o", "net/weights.safetensors"], "would replace a part of a folder"),
        (["odd_model:Net", "--weights", "w.safetensors", "-o", "w.safetensors"], "-o w.safetensors is the --weights file itself"),
    ):
        code, _, err = run("convert", *words, *X)
        assert (code, phrase in err) == (codes.OUTPUT, True), err
    assert before == {path: path.read_bytes() for path in tmp_path.glob("net/*")}
    assert "nets.0.weight" in load_file("w.safetensors")
    assert run("convert", "odd_model:Net", *X, "-o", "net")[0] == codes.OK  # anew
