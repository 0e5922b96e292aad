"""Arguments by keyword: a ``.pt2`` that takes some as SOURCE of every command, and forwards with ``**kwargs``."""

import inspect
import json

import pytest
import torch

pytest.importorskip("click")
pytest.importorskip("safetensors")

from fxfuse import convert
from fxfuse.cli import codes, main

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(4, 5), nn.Tanh()) for _ in range(3))

    def forward(self, x, *, k):
        return torch.stack([net(x) * k for net in self.nets], 1)

class Open(Net):
    def forward(self, *xs, **named):
        return super().forward(xs[0], k=named["k"])
"""
INPUTS = ["--inputs", "float64[4,4]", "--inputs", "k=float64[4,1]", "--dtype", "float64"]


@pytest.fixture
def place(importable):
    return importable("keyword_model", MODEL)


def loop(path):
    """The model's loop as torch.export writes it, for any batch size."""
    import keyword_model

    torch.manual_seed(2)
    model, batch = keyword_model.Net().double().eval(), torch.export.Dim("batch", min=1)
    call = {"k": torch.rand(4, 1).double()}
    program = torch.export.export(model, (torch.rand(4, 4).double(),), call, dynamic_shapes={"x": {0: batch}, "k": {0: batch}})
    torch.export.save(program, path)
    return model


def test_an_exported_program_as_source(place, capsys):
    model = loop("loop.pt2")
    outs = ["net.pt2", "net"]
    for words in (
        *(["convert", "loop.pt2", *INPUTS, "--objective", "launches", "--json", "-o", out] for out in outs),
        ["convert", "net.pt2", *INPUTS, "-o", "again.pt2"],
        ["convert", "net", *INPUTS, "-o", "from_folder.pt2"],
        ["explain", "loop.pt2", *INPUTS],
        ["verify", "loop.pt2", "net.pt2", *INPUTS],
        ["bench", "loop.pt2", *INPUTS, "--without", "compile", "--seconds", "0.02"],
    ):
        code, said = main(words), capsys.readouterr()
        assert code == codes.OK, (words, said.err)
        if words[0] == "convert" and words[1] == "loop.pt2":
            assert json.loads(said.out)["report"]["fused"], said.out
    x, k = torch.rand(7, 4).double(), torch.rand(7, 1).double()
    for path in (*outs, "again.pt2", "from_folder.pt2"):
        written = convert.load(path)
        torch.testing.assert_close(written(x, k=k), model(x, k=k), rtol=1e-12, atol=1e-12)
        assert list(inspect.signature(written.forward).parameters) == ["x", "k"], path


@pytest.mark.parametrize("objective", ["launches", "time"])
def test_a_forward_that_takes_any_keywords(place, capsys, objective):
    import keyword_model

    assert main(["convert", "keyword_model:Open", *INPUTS, "--objective", objective, "-o", "open.pt2"]) == codes.OK, capsys.readouterr().err
    torch.manual_seed(0)
    model = keyword_model.Open().double().eval()
    x, k = torch.rand(7, 4).double(), torch.rand(7, 1).double()
    torch.testing.assert_close(convert.load("open.pt2")(x, k=k), model(x, k=k), rtol=1e-12, atol=1e-12)
