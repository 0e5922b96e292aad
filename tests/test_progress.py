"""The planner's progress: a line in a terminal where it takes a while, nothing anywhere else, and never a failure."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.planning import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Nets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Linear(1, 4) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)


def planned(monkeypatch: pytest.MonkeyPatch, stream: Any, patience: float = -1.0, **options: Any) -> str:
    monkeypatch.setattr(progress, "PATIENCE", patience)
    monkeypatch.setattr(sys, "stderr", stream)
    fxfuse.optimize(Nets(), torch.randn(3, 6), validate=False, **options)
    return stream.getvalue() if stream is not None else ""


def without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("rich", "rich.console", "rich.progress"):
        monkeypatch.setitem(sys.modules, name, None)


def test_rich_draws_a_bar_in_a_terminal(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm")
    text = planned(monkeypatch, Terminal())
    assert "fxfuse: timing" in text
    assert "/" in text
    assert text.rstrip().endswith(("\x1b[2K", "\x1b[?25h")), "the line is taken away at the end"


def test_plain_text_without_rich(monkeypatch):
    without_rich(monkeypatch)
    text = planned(monkeypatch, Terminal())
    lines = [line.strip() for line in text.split("\r") if line.strip()]
    assert lines[0].startswith("fxfuse: timing 1/")
    done, total = lines[-1].split()[2].split("/")
    assert 1 <= int(done) <= int(total)
    assert text.endswith("\r")
    assert not text.split("\r")[-2].strip(), "the line is blank at the end"


@pytest.mark.parametrize("rich", [True, False])
def test_nothing_where_nobody_looks(monkeypatch, rich):
    if not rich:
        without_rich(monkeypatch)
    assert planned(monkeypatch, io.StringIO()) == ""
    assert planned(monkeypatch, Terminal(), patience=1e9, cache=False) == "", "it is over before anybody waits"
    assert planned(monkeypatch, Terminal(), progress=False, cache=False) == ""
    assert planned(monkeypatch, Terminal(), tune=False) == ""
    planned(monkeypatch, None, cache=False)


def test_a_terminal_that_cannot_be_written_to(monkeypatch):
    class Broken(Terminal):
        def write(self, text: str) -> int:
            raise OSError("gone")

    without_rich(monkeypatch)
    assert planned(monkeypatch, Broken()) == ""


def test_the_line_goes_when_planning_is_interrupted(monkeypatch):
    without_rich(monkeypatch)
    monkeypatch.setattr(progress, "PATIENCE", -1.0)
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with pytest.raises(KeyboardInterrupt), progress.Progress(True) as bar:
        bar.expect(3)
        bar.step("one")
        raise KeyboardInterrupt
    assert stream.getvalue() == "\rfxfuse: timing 1/3 one\r" + " " * 22 + "\r"
