"""``.onnx``: weights in a file beside the model, results of single lanes, what the exporter lacks in words."""

import shutil

import pytest
import torch
from torch import nn

import fxfuse
from checks import assert_close, randomized
from fxfuse import convert
from fxfuse.errors import ConvertError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("click")

from fxfuse.cli import codes, main  # noqa: E402
from fxfuse.convert import onnx as writer  # noqa: E402

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, hidden=100, scale=1.0):
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, 1)) for _ in range(6))
        self.scale = scale

    def forward(self, x):
        return torch.cat([net(x[:, i:i + 1]) for i, net in enumerate(self.nets)], 1) * self.scale
"""
INPUTS = ["--inputs", "float32[4,6]", "--objective", "launches"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "onnx_model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_weights_beside_the_model_come_along(place, monkeypatch, capsys):
    monkeypatch.setattr(writer, "_LARGE", 100)
    for scale in (2.0, 3.0):  # the second time, both files are there
        words = ["onnx_model.py:Net", "--args", f'{{"scale": {scale}}}', *INPUTS]
        assert main(["convert", *words, "-o", "net.onnx"]) == codes.OK
        assert sorted(path.name for path in place.iterdir() if path.suffix in (".onnx", ".data")) == ["net.onnx", "net.onnx.data"]
        assert not list(place.glob(".net*"))
        assert main(["verify", words[0], "net.onnx", *words[1:-2]]) == codes.OK
    kept = onnx.load(place / "net.onnx", load_external_data=False).graph.initializer
    assert any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in kept)
    (place / "elsewhere").mkdir()
    for name in ("net.onnx", "net.onnx.data"):
        shutil.move(place / name, place / "elsewhere" / name)
    convert.load(place / "elsewhere" / "net.onnx")(torch.randn(3, 6))


def test_what_fails_leaves_both_files_as_they_were(place, monkeypatch, capsys):
    monkeypatch.setattr(writer, "_LARGE", 100)
    assert main(["convert", "onnx_model.py:Net", *INPUTS, "-o", "net.onnx"]) == codes.OK
    before = {path.name: path.read_bytes() for path in place.glob("net.onnx*")}
    assert len(before) == 2
    real = convert.load
    monkeypatch.setattr(convert, "load", lambda *args, **kwargs: lambda x: real(*args, **kwargs)(x) * 1.01)
    assert main(["convert", "onnx_model.py:Net", "--args", "[5]", *INPUTS, "-o", "net.onnx"]) == codes.DIFFERENT
    assert {path.name: path.read_bytes() for path in place.glob("net.onnx*")} == before
    assert not list(place.glob(".net*"))


def test_train_mode_with_dropout_says_why_it_cannot_be_compared(place, capsys):
    (place / "dropping.py").write_text(MODEL.replace("nn.Tanh()", "nn.Dropout(0.5)"))
    assert main(["convert", "dropping.py:Net", *INPUTS, "--mode", "train", "-o", "net.onnx"]) == codes.DIFFERENT
    assert "leave --mode train out" in capsys.readouterr().err
    assert not (place / "net.onnx").exists()


class Singles(nn.Module):
    """Results of single lanes, and of all of them."""

    def __init__(self, widths):
        super().__init__()
        self.nets = nn.ModuleList(nn.Linear(3, width) for width in widths)

    def forward(self, x):
        found = [net(x[:, i]) for i, net in enumerate(self.nets)]
        return {"first": found[0], "all": found, "sum": torch.cat(found, 1).sum(1)}


@pytest.mark.parametrize("widths", [(4, 4, 4, 4), (4, 2, 3, 4)], ids=["equal", "unequal"])
def test_single_lanes_as_results(widths, tmp_path):
    model = randomized(Singles(widths)).eval()
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    fused = fxfuse.optimize(model, x, objective="launches", tune=False)
    assert fxfuse.report(fused).fused
    convert.write(fused, None, ((x,), {}), tmp_path / "net.onnx")
    x = torch.randn(7, 4, 3, dtype=torch.float64)
    found, expected = convert.load(tmp_path / "net.onnx")(x), model(x)
    for a, b in zip([found["first"], *found["all"], found["sum"]], [expected["first"], *expected["all"], expected["sum"]]):
        assert_close(a, b, "out", rtol=1e-12)


class NotInOnnx(nn.Module):
    def forward(self, x):
        return torch.linalg.eigvalsh(x @ x.transpose(1, 2))


def test_an_operator_that_the_exporter_lacks_is_named(tmp_path):
    x = torch.randn(3, 2, 2, dtype=torch.float64)
    with pytest.raises(ConvertError, match=r"_linalg_eigh.*write a \.pt2") as caught:
        convert.write(NotInOnnx().eval(), None, ((x,), {}), tmp_path / "net.onnx")
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


class Mixed(nn.Module):
    """Results of every kind; a dict's keys that are names of an input, of an op inside and of a weight."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.nets = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))

    def forward(self, x):
        found = torch.stack([net(x[:, i]) for i, net in enumerate(self.nets)], 1)
        mean = found.mean(1).exp()
        parts = (found, [found[:, 0], 3])
        values = {"none": None, "name": "fused", "rows": True}
        return {"mean": mean.sum(1), "x": mean * self.scale, "c": parts, **values, "scale": mean * 2}


def test_results_have_the_names_of_the_original_and_plain_values_come_back(tmp_path):
    model = randomized(Mixed()).eval()
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    fused = fxfuse.optimize(model, x, objective="launches", tune=False)
    assert fxfuse.report(fused).fused
    convert.write(fused, None, ((x,), {}), tmp_path / "net.onnx")
    loaded = convert.load(tmp_path / "net.onnx")
    x = torch.randn(7, 4, 3, dtype=torch.float64)
    found, expected = loaded(x), model(x)
    assert loaded.outputs == ["mean", "output_x", "c.0", "c.1.0", "output_scale"]
    assert list(found) == list(expected)
    assert (found["none"], found["name"], found["c"][1][1], found["rows"]) == (None, "fused", 3, True)
    for a, b in ((found[name], expected[name]) for name in ("mean", "x", "scale")):
        assert_close(a, b, "out", rtol=1e-12)
    for a, b in zip([found["c"][0], found["c"][1][0]], [expected["c"][0], expected["c"][1][0]]):
        assert_close(a, b, "out", rtol=1e-12)


@pytest.mark.parametrize(("made", "names"), [
    (lambda y: y, ["output"]),
    (lambda y: (y, [y * 2]), ["output_0", "output_1.0"]),
    (lambda y: {"a": {"b": y}, "c": y + 1}, ["a.b", "c"]),
], ids=["tensor", "tuple", "dict"])  # fmt: skip
def test_names_of_results(made, names, tmp_path):
    class Net(nn.Module):
        def forward(self, x):
            return made(x.exp())

    convert.write(Net().eval(), None, ((torch.ones(4, 2),), {}), tmp_path / "net.onnx")
    loaded = convert.load(tmp_path / "net.onnx")
    assert loaded.outputs == names
    x = torch.randn(6, 2)
    torch.testing.assert_close(loaded(x), Net()(x))
