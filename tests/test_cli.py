"""The ``fxfuse`` command: results, exit codes, one line on stderr where something is wrong, OUT untouched by what fails."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("click")

from fxfuse.cli import codes, main
from fxfuse.cli.specs import make_inputs

ROOT = Path(__file__).resolve().parents[1]
MODEL = '''
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, lanes=6, hidden=5):
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, 1)) for _ in range(lanes))

    def forward(self, x):
        print("the model speaks")
        return torch.cat([net(x[:, i:i + 1]) for i, net in enumerate(self.nets)], 1)

class Buffer(Net):
    def forward(self, x):
        out = torch.zeros(x.shape[0], len(self.nets), dtype=x.dtype)
        for i, net in enumerate(self.nets):
            out[:, i] = net(x[:, i:i + 1]).squeeze(-1)
        return out

class Off(Net):
    def forward(self, x):
        return super().forward(x) * 1.001

class Flagged(Net):
    def get_extra_state(self):
        return {"flag": 1}

    def set_extra_state(self, state):
        self.flag = state["flag"]

def without_memory():
    with torch.device("meta"):
        return Flagged()

class Control(Net):
    def forward(self, x):
        return super().forward(x) if x.sum().item() > 0 else super().forward(-x)

def broken():
    raise ValueError("no such configuration")

def slow():
    import time
    time.sleep(60)

number = 3
'''
X = "float64[4,6]"
USUAL = ["--inputs", X, "--dtype", "float64", "--objective", "launches"]


@pytest.fixture
def place(importable):
    """A folder with a model in it, in which commands run."""
    return importable("cli_model", MODEL)


@pytest.fixture
def run(place, capsys):
    """Run a command line in this process: its exit code, stdout, stderr."""
    def run(*words):
        capsys.readouterr()
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_explain_says_what_fuses_and_writes_nothing(run, place):
    before = sorted(place.iterdir())
    code, out, err = run("explain", "cli_model:Net", *USUAL, "--json")
    assert code == codes.OK
    assert [op["op"] for op in json.loads(out)["report"]["fused"][0]["ops"]] == ["linear", "tanh", "linear"]
    assert "the model speaks" in err  # and not on stdout, which is JSON
    assert [p for p in sorted(place.iterdir()) if p.name != "__pycache__"] == [p for p in before if p.name != "__pycache__"]


def test_verify(run):
    assert run("verify", "cli_model:Net", "cli_model:Net", "--inputs", "float32[4,6]")[0] == codes.OK
    code, out, _ = run("verify", "cli_model:Net", "cli_model:Off", "--inputs", "float32[4,6]", "--json")
    assert code == codes.DIFFERENT
    found = json.loads(out)
    assert not found["ok"]
    assert 5e-4 < max(row["max_rel"] for row in found["tensors"]) < 2e-3
    assert run("verify", "cli_model:Net", "cli_model:Off", "--inputs", "float32[4,6]", "--rtol", "0.01")[0] == codes.OK


def test_verify_compares_gradients_in_train_mode(run):
    code, out, _ = run("verify", "cli_model:Net", "cli_model:Net", "--inputs", X, "--dtype", "float64", "--mode", "train", "--json")
    assert code == codes.OK
    assert {"gradient of input[0]", "gradient of nets.5.2.bias"} <= {row["name"] for row in json.loads(out)["tensors"]}


def test_bench_measures_what_computes_the_same(run):
    code, out, _ = run("bench", "cli_model:Net", *USUAL, "--without", "compile", "--seconds", "0.05", "--json")
    assert code == codes.OK
    rows = {row["name"]: row for row in json.loads(out)["candidates"]}
    assert list(rows) == ["loop", "fused", "vmap"]
    assert all(row["seconds"] > 0 and row["max_rel"] < 1e-10 for row in rows.values())
    assert (rows["loop"]["heavy"], rows["fused"]["heavy"], rows["vmap"]["heavy"]) == (12, 2, 2)


@pytest.mark.parametrize("out", ["net.pt2", "net.onnx", "net.safetensors", "net"])
def test_convert(run, place, out):
    if out.endswith(".onnx"):
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    code, said, err = run("convert", "cli_model:Net", *USUAL, "-o", out, "--json")
    assert code == codes.OK, err
    assert "equal" in json.loads(said)["compared"]
    assert (place / out).exists()
    assert not list(place.glob(f".{out}*"))
    if out != "net.safetensors":
        assert run("verify", "cli_model:Net", out, "--inputs", X, "--dtype", "float64")[0] == codes.OK


def test_restore_is_bit_exact(run):
    import cli_model
    from safetensors.torch import load_file

    assert run("convert", "cli_model:Net", "--args", '{"hidden": 3}', *USUAL, "--seed", "5", "-o", "net")[0] == codes.OK
    assert run("restore", "net", "-o", "back.safetensors")[0] == codes.OK
    torch.manual_seed(5)
    expected, found = cli_model.Net(hidden=3).double().state_dict(), load_file("back.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_restore_of_a_state_dict(run):
    import cli_model

    import fxfuse

    model = cli_model.Net().double()
    fused = fxfuse.optimize(model, torch.randn(4, 6).double(), objective="launches", tune=False)
    assert fxfuse.report(fused).fused
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.add_(torch.randn_like(parameter))
    for saved in (fused.state_dict(), {"epoch": 3, "state_dict": fused.state_dict()}):
        torch.save(saved, "fused.pt")
        assert run("restore", "fused.pt", "-o", "back.pt")[0] == codes.OK
        expected, found = fxfuse.original_state_dict(fused), torch.load("back.pt", weights_only=True)
        assert list(expected) == list(found)
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    torch.save(model.state_dict(), "plain.pt")
    code, _, said = run("restore", "plain.pt", "-o", "again.pt")
    assert code == codes.INPUT
    assert "holds no recipes" in said


def test_extra_state_and_a_model_without_memory(run):
    import cli_model

    torch.save(cli_model.Flagged().state_dict(), "flagged.pt")
    weights = ["--weights", "flagged.pt", "--inputs", "float32[4,6]"]
    assert run("convert", "cli_model:without_memory", *weights, "-o", "net.pt2")[0] == codes.OK
    assert run("verify", "cli_model:Flagged", "net.pt2", *weights)[0] == codes.OK
    code, out, err = run("bench", "cli_model:Flagged", *weights, "--without", "compile", "--seconds", "0.02", "--json")
    assert code == codes.OK, err
    assert not any(row["why"] for row in json.loads(out)["candidates"] if row["name"] == "vmap")
    code, _, err = run("convert", "cli_model:Flagged", *weights, "-o", "net")
    assert code == codes.INPUT
    assert "_extra_state of the checkpoint is a dict, and only tensors are written: write a .pt2 instead" in err
    code, _, err = run("explain", "cli_model:without_memory", "--inputs", "float32[4,6]")
    assert code == codes.INPUT
    assert "on the meta device, without values: make it on the CPU, or give its --weights" in err


def test_an_exported_program_is_a_source(run, place):
    import cli_model

    rows = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(cli_model.Net().double(), (torch.randn(4, 6).double(),), dynamic_shapes=rows)
    torch.export.save(program, place / "plain.pt2")
    code, out, _ = run("explain", "plain.pt2", *USUAL, "--json")
    assert code == codes.OK
    assert [op["op"] for op in json.loads(out)["report"]["fused"][0]["ops"]] == ["linear", "tanh", "linear"]


def test_an_exported_program_of_one_batch_size_stays_one(run, place):
    import cli_model

    program = torch.export.export(cli_model.Net().double(), (torch.randn(4, 6).double(),))
    torch.export.save(program, place / "plain.pt2")
    code, out, err = run("convert", "plain.pt2", *USUAL, "-o", "net.pt2", "--json")
    assert code == codes.OK, err
    assert "for this batch size only" in json.loads(out)["notes"]
    code, _, err = run("convert", "plain.pt2", "--inputs", "float64[1,6]", "-o", "other.pt2")  # 1 row would be broadcast to 4
    assert code == codes.INPUT
    assert "check --inputs" in err


def test_an_exported_program_that_names_the_dtype_of_its_input_fuses(run, place):
    import cli_model

    program = torch.export.export(cli_model.Buffer(), (torch.randn(4, 6),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.export.save(program, place / "plain.pt2")
    code, out, _ = run("convert", "plain.pt2", "--inputs", "float32[4,6]", "--objective", "launches", "-o", "net.pt2", "--json")
    assert code == codes.OK
    assert [op["op"] for op in json.loads(out)["report"]["fused"][0]["ops"]] == ["linear", "tanh", "linear"]


@pytest.mark.parametrize("source", ["first.pt2", "first"])
def test_what_fxfuse_wrote_is_a_source(run, place, source):
    assert run("convert", "cli_model:Net", *USUAL, "-o", source)[0] == codes.OK
    assert run("explain", source, *USUAL)[0] == codes.OK
    for out in ("again.pt2", "again"):
        code, said, err = run("convert", source, *USUAL, "-o", out, "--json")
        assert code == codes.OK, err
        assert "equal" in json.loads(said)["compared"]
        assert run("verify", "cli_model:Net", out, "--inputs", X, "--dtype", "float64")[0] == codes.OK


BAD = [
    (["explain", "nowhere:Net", "--inputs", X], codes.INPUT, "no module nowhere"),
    (["explain", "cli_model:Nett", "--inputs", X], codes.INPUT, "did you mean Net?"),
    (["explain", "cli_model:broken", "--inputs", X], codes.INPUT, "no such configuration"),
    (["explain", "cli_model:number", "--inputs", X], codes.INPUT, "must be a torch.nn.Module"),
    (["explain", "cli_model:Net", "--inputs", "float32[4,5]"], codes.INPUT, "check --inputs"),
    (["explain", "cli_model:Net", "--inputs", "float32[4,x]"], codes.USAGE, "does not parse"),
    (["explain", "cli_model:Net", "--inputs", "float31[4]"], codes.USAGE, "is no dtype"),
    (["explain", "cli_model:Net"], codes.USAGE, "--inputs"),
    (["explain", "cli_model:Net", "--args", "{", "--inputs", X], codes.USAGE, "JSON"),
    (["explain", "cli_model:Net", "--wrong"], codes.USAGE, "--wrong"),
    (["convert", "cli_model:Net", "--inputs", X, "-o", "no/folder/net.pt2"], codes.OUTPUT, "does not exist"),
    (["convert", "cli_model:Net", "--inputs", X, "-o", "net.pth"], codes.USAGE, ".pth is not written"),
    (["convert", "cli_model:Net", "--inputs", X, "-o", "."], codes.USAGE, "name a new folder"),
    (["convert", "missing.pt2", "--inputs", X, "-o", "net.pt2"], codes.INPUT, "no file or folder"),
    (["convert", "cli_model:Net", "--weights", "no.safetensors", "--inputs", X, "-o", "net.pt2"], codes.INPUT, "no.safetensors"),
    (["convert", "cli_model:Control", "--inputs", "float32[4,6]", "-o", "net.pt2"], codes.INPUT, "data-dependent"),
    (["explain", "no_file.py:Net", "--inputs", X], codes.INPUT, "no file no_file.py"),
    (["restore", "nothing", "-o", "back.safetensors"], codes.INPUT, "no folder nothing"),
]


@pytest.mark.parametrize(("words", "code", "phrase"), BAD)
def test_bad_input_is_one_line(run, words, code, phrase):
    found, out, err = run(*words)
    assert found == code
    lines = [line for line in err.splitlines() if line != "the model speaks"]
    assert len(lines) == 1
    assert phrase in lines[0]
    assert not out


def test_a_failed_conversion_leaves_out_as_it_was(run, place, monkeypatch):
    from fxfuse import convert as files

    (place / "net.pt2").write_bytes(b"before")
    monkeypatch.setattr(files, "write", lambda *args, **kwargs: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    code, _, err = run("convert", "cli_model:Net", *USUAL, "-o", "net.pt2")
    assert code == codes.OUTPUT
    assert "make room" in err
    assert (place / "net.pt2").read_bytes() == b"before"
    assert not list(place.glob(".net.pt2*"))


def test_what_is_not_equal_is_not_written(run, place, monkeypatch):
    from fxfuse import convert as files

    real = files.load
    monkeypatch.setattr(files, "load", lambda *args, **kwargs: lambda x: real(*args, **kwargs)(x) * 1.001)
    code, _, err = run("convert", "cli_model:Net", *USUAL, "-o", "net.pt2")
    assert code == codes.DIFFERENT
    assert "NOT equal" in err
    assert not (place / "net.pt2").exists()


class Evil:
    def __reduce__(self):
        return os.system, ("touch was_run",)


def test_pickled_code_is_refused(run, place):
    for name in ("evil.pt", "evil.pth"):
        (place / name).write_bytes(pickle.dumps({"x": Evil()}))
        assert run("explain", "cli_model:Net", "--inputs", name)[0] == codes.INPUT
        assert run("explain", "cli_model:Net", "--weights", name, "--inputs", X)[0] == codes.INPUT
    assert not (place / "was_run").exists()


def test_specs_draw_what_they_say():
    (x, n), kwargs = make_inputs(["float32[2,3]", "int64[50]<7"], seed=1)
    assert x.dtype is torch.float32
    assert n.min() >= 0
    assert 4 < n.max() < 7
    assert kwargs == {}


def test_ctrl_c_is_one_line_and_leaves_nothing(place):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "fxfuse", "convert", "cli_model:slow", "--inputs", X, "-o", "net.pt2"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    # 130 in a shell either way: where the signal arrives in an ``exec`` of a string (dataclasses, as torch is imported), CPython notes it
    # as unhandled, whoever handles it, and ends by the signal itself.
    assert process.returncode in (codes.INTERRUPTED, -signal.SIGINT), err
    assert err.strip() == "fxfuse: interrupted; nothing was written"
    assert not out
    assert not list(place.glob("*net.pt2*"))


def test_weights_are_let_go_except_where_answers_are_views_of_them():
    from fxfuse.cli.compare import Expected
    from fxfuse.cli.conversion import _let_go

    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 5))
    kept = model[1].weight.detach().clone()
    _let_go(model, [Expected(((), {}), {"the output": model[1].weight.detach()[1:]}, {})])
    assert model[0].weight.untyped_storage().nbytes() == 0
    assert torch.equal(model[1].weight, kept)


def test_sentences_about_files_and_names_are_whole(run, place):
    (place / "cut.pt").write_bytes(b"PK\x03\x04" + bytes(50))
    code, _, err = run("explain", "cli_model:Net", "--inputs", "cut.pt")
    assert code == codes.INPUT
    assert "cut.pt cannot be read" in err
    assert err.rstrip().endswith("write it with torch.save((x, y), path)")
    code, _, err = run("explain", "", *USUAL[:2])
    assert code == codes.USAGE
    assert "SOURCE is empty" in err
