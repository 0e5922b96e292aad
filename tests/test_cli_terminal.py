"""Tables and a progress bar in a terminal; plain text, and no bar, in a pipe."""

import json
import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("click")
pytest.importorskip("rich")
pty = pytest.importorskip("pty")

ROOT = Path(__file__).resolve().parents[1]
DEMO = [sys.executable, "-m", "fxfuse", "demo", "--features", "4", "--hidden", "3", "--batch", "5", "--seconds", "0.02"]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
RULE, ESCAPE = "\N{BOX DRAWINGS LIGHT HORIZONTAL}", "\x1b["


def in_terminals(words):
    """What a command writes to stdout and to stderr, each a terminal of its own."""
    ends = [pty.openpty() for _ in range(2)]
    child = subprocess.Popen(words, stdout=ends[0][1], stderr=ends[1][1], env=ENV)
    for _, writer in ends:
        os.close(writer)
    found: dict[int, bytes] = {reader: b"" for reader, _ in ends}
    still = list(found)
    while still:
        for reader in select.select(still, [], [])[0]:
            try:
                part = os.read(reader, 1 << 16)
            except OSError:  # what Linux says where the other end is closed
                part = b""
            found[reader] += part
            if not part:
                os.close(reader)
                still.remove(reader)
    assert child.wait(timeout=60) == 0, found
    return tuple(text.decode() for text in found.values())


@pytest.mark.slow
def test_a_terminal_gets_tables_and_a_progress_bar():
    out, err = in_terminals(DEMO)
    assert RULE * 5 in out
    assert "computed by" in out
    assert "fusing" in err
    assert ESCAPE in err


@pytest.mark.slow
def test_a_pipe_gets_plain_text():
    done = subprocess.run(DEMO, capture_output=True, text=True, env=ENV, check=False)
    assert done.returncode == 0, done.stderr
    assert ESCAPE not in done.stdout
    assert RULE not in done.stdout
    assert "loop" in done.stdout
    assert not done.stderr


@pytest.mark.slow
def test_json_in_a_terminal_is_json():
    out, _ = in_terminals([*DEMO, "--json"])
    assert json.loads(out)["ok"]
