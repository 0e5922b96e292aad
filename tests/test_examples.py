"""Every example runs as it stands, and says what it promises."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SHAPES = {  # example: its heavy launches, before and after, once per model
    "feature_networks": [(72, 3)],
    "linear_is_pointwise_conv": [(8, 1)],
    "generated_weights": [(19, 4), (10, 3)],
    "conv_per_row": [(10, 1)],
    "shared_conv": [(17, 2), (3, 1)],
}


@pytest.fixture
def output_of(monkeypatch, capsys):
    """Run an example's main() in this process and return what it printed."""
    def run(name, *args):
        monkeypatch.syspath_prepend(str(EXAMPLES))
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.main(*args)
        return capsys.readouterr().out

    return run


def test_every_file_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SHAPES, "demo", "both", "fine_tune", "lane_parallel"}


@pytest.mark.parametrize("name", SHAPES)
def test_example(name, output_of):
    out = output_of(name)
    assert [(int(a), int(b)) for a, b in re.findall(r"^heavy launches: (\d+) -> (\d+)", out, re.MULTILINE)] == SHAPES[name]
    assert out.count("equal to the original") >= len(SHAPES[name])
    assert "NOT equal" not in out
    losses = re.findall(r"^step (\d): loss ([\d.]+) as a loop, ([\d.]+) fused$", out, re.MULTILINE)
    assert len(losses) == 5 * len(SHAPES[name])
    for _, loop, fused in losses:
        assert float(fused) == pytest.approx(float(loop), rel=1e-4)
    assert all(float(last[1]) < float(first[1]) for first, last in zip(losses[::5], losses[4::5])), "training does not train"
    differences = re.findall(r"^checkpoint carried over, \d+ tensors: largest difference of the outputs (\S+)$", out, re.MULTILINE)
    assert len(differences) == len(SHAPES[name])
    assert all(float(difference) < 1e-5 for difference in differences)


def test_fine_tune(output_of):
    out = output_of("fine_tune")
    before, after = map(float, re.search(r"^loss ([\d.]+) -> ([\d.]+); frozen: nets.3.0.weight, ", out, re.MULTILINE).groups())
    assert after < before
    assert float(re.search(r"^difference of the two models: (\S+)$", out, re.MULTILINE)[1]) < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo here")
def test_lane_parallel():
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(EXAMPLES / "lane_parallel.py")]
    env = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ended = subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert "forward sums rows x 1 over processes: 4 bytes per row" in ended.stdout
    shared, alone = re.search(r"^loss after 30 steps: ([\d.]+) on 2 processes, ([\d.]+) on one$", ended.stdout, re.MULTILINE).groups()
    assert float(shared) == pytest.approx(float(alone), rel=1e-3)
    here, one = re.search(r"^bytes of weights and moments: ([\d,]+) in this process, ([\d,]+) in one$", ended.stdout, re.MULTILINE).groups()
    assert int(here.replace(",", "")) < 0.51 * int(one.replace(",", ""))
    assert "moved in 30 steps: 15,360 bytes in 30 calls" in ended.stdout


def test_demo(output_of):
    out = output_of("demo", 0.1)
    assert "\nmatmuls 384 -> " in out
    assert re.search(r"^fused .*us .*x.*us .*x.*us .*x$", out, re.MULTILINE)
    assert "bit for bit the original's: True" in out
    assert "NOT equal" not in out
