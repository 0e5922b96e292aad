"""The README's section on the ``fxfuse`` command: every line of it, as a user would type it."""

import shlex
from pathlib import Path

import pytest
import torch

pytest.importorskip("click")
pytest.importorskip("safetensors")

import fxfuse
from fxfuse.cli import codes, main

RECORDS = "recipes.json", "report.json", "report.txt"
README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
MODEL = '''
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1)) for _ in range(features))

    def forward(self, x):
        return torch.cat([net(x[:, i:i + 1]) for i, net in enumerate(self.nets)], 1)
'''


def block(heading, language):
    """The first block of code under a heading."""
    section = README.split(f"\n## {heading}", 1)[1].split("\n## ", 1)[0]
    return section.split(f"```{language}\n", 1)[1].split("```", 1)[0]


@pytest.fixture
def place(importable):
    from safetensors.torch import save_file

    importable("model", MODEL)
    import model

    torch.manual_seed(3)
    save_file(model.Net(24).state_dict(), "net.safetensors")
    return model


@pytest.mark.slow
def test_every_command_line(place, monkeypatch, capsys):
    from fxfuse.cli import measuring

    monkeypatch.setattr(measuring, "compiled_model", lambda *args: "not compiled in a test: it takes half a minute")
    lines = [shlex.split(line, comments=True) for line in block("Offline conversion", "sh").splitlines() if line.startswith("fxfuse ")]
    assert {words[1] for words in lines} == {"convert", "restore", "explain", "verify", "bench", "demo"}
    for words in lines:
        assert main(words[1:]) == codes.OK, (words, capsys.readouterr().err)
    assert {path.name for path in Path("net").iterdir()} == {"model.pt2", "weights.safetensors", *RECORDS}
    assert Path("back.safetensors").exists()


def test_the_lines_of_python(place):
    model = place.Net(24).eval()
    x = torch.randn(8, 24)
    fused = fxfuse.optimize(model, x, objective="launches", tune=False)
    scope = {"fused": fused, "x": x}
    lines = block("Files: formats", "python")
    main(["convert", "model:Net", "--args", "[24]", "--inputs", "float32[8,24]", "-o", "net"])
    exec(lines, scope)
    torch.testing.assert_close(scope["net"](x), model(x))
    assert Path("back.safetensors").exists()
