"""Fused models on PyTorch's own engine for several processes: DDP, FSDP2, checkpoints that are resharded, activation checkpointing."""

import os
import subprocess
import sys
from pathlib import Path

import distributed_worker as worker
import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxfuse
from checks import assert_close
from fxfuse.weights.packing import original_gradients

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo here")


def torchrun(processes: int, phase: str, folder: Path, worker_file: str = "distributed_worker.py") -> None:
    tests = Path(__file__).parent
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", str(tests / worker_file)]
    paths = os.pathsep.join([str(tests.parent), str(tests)])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    for _ in range(3):
        ended = subprocess.run([sys.executable, *words, phase, str(folder)], env=env, capture_output=True, text=True, timeout=300)
        # A thread of gloo's or of the checkpoint's may abort its process (std::terminate). What fails of ours raises, and is no signal.
        if "(SIGABRT)" not in ended.stderr and "terminate called without an active exception" not in ended.stderr:
            break
    assert ended.returncode == 0, ended.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # so it is, in this process
def test_several_processes_train_as_one_and_checkpoints_are_resharded(tmp_path):
    torchrun(2, "train", tmp_path)
    torchrun(4, "load", tmp_path)
    torchrun(4, "train", tmp_path / "four")
    x, y = worker.batch()
    expected = worker.trained(worker.network(), "adamw", x, y).state_dict()
    for saved in ("packed", "again"):  # of two processes, of four; read by one
        model = worker.fused(5)
        state = {"model": model.state_dict()}
        dcp.load(state, checkpoint_id=tmp_path / saved, no_dist=True)
        model.load_state_dict(state["model"])
        worker.assert_same(dict(fxfuse.original_state_dict(model)), expected, saved)
    model = worker.fused(6)
    original = {"model": dict(fxfuse.original_state_dict(model))}
    dcp.load(original, checkpoint_id=tmp_path / "original", no_dist=True)
    fxfuse.load_original_state_dict(model, original["model"])
    worker.assert_same(dict(fxfuse.original_state_dict(model)), expected, "original")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_sharded_packs_in_the_original_s_layout(processes, tmp_path):
    torchrun(processes, "original", tmp_path)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    class Around(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=reentrant).tanh()

    plain, fused = Around(worker.network()), Around(worker.fused())
    gradients = []
    for model in (plain, fused):
        x = worker.batch()[0].requires_grad_()
        model(x).square().sum().backward()
        gradients.append({"x": x.grad, **original_gradients(model)})
    assert not fxfuse.report(fused.inner).fallbacks
    assert list(gradients[0]) == list(gradients[1])
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, name)


def test_a_class_with_another_forward_is_not_taken_for_a_wrapper():
    plain, fused = worker.network(), worker.fused()
    for model in (plain, fused):
        lane = model.nets[2][0]
        lane.__class__ = type("Doubled", (type(lane),), {"forward": lambda self, x: nn.Linear.forward(self, x) * 2})
    x = worker.batch()[0]
    assert_close(fused(x), plain(x), "output")
    assert "set after fusing" in next(iter(fxfuse.report(fused).fallbacks))
