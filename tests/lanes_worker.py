"""What ``test_shard_lanes.py`` runs on several processes: ``lanes_worker.py PHASE FOLDER``. Raises where anything differs.

Every process makes the same models; the reference trains in one process, as a loop.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import distributed_worker as worker
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fxfuse
from fxfuse.distributed.traffic import traffic
from fxfuse.fused import regions
from fxfuse.packing import original_gradients

ROWS = 8


class Additive(nn.Module):
    """Networks per column; ``join`` is how they come together."""

    def __init__(self, lanes: int, join: str) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(lanes))
        self.head = nn.Linear(2 * lanes if join == "cat" else 2, 2)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        outs = [net(x[:, i : i + 1]) for i, net in enumerate(self.nets)]
        if self.join == "cat":
            return self.head(torch.cat(outs, 1))
        return self.head(torch.stack(outs, 1).sum(1) if self.join == "stack" else sum(outs))


class Images(nn.Module):
    """Convolutions of one image with BatchNorm (which makes gradients of biases rounding alone: there are none), embeddings of columns, then a second stage of lanes on both."""

    def __init__(self, lanes: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Sequential(nn.Conv1d(2, 4, 3, bias=False), nn.BatchNorm1d(4), nn.ReLU()) for _ in range(lanes))
        self.tables = nn.ModuleList(nn.Embedding(7, 3) for _ in range(lanes))
        self.experts = nn.ModuleList(nn.Sequential(nn.LayerNorm(lanes * 7), nn.Linear(lanes * 7, 5), nn.GELU()) for _ in range(lanes))
        self.gate = nn.Linear(2, lanes)
        self.out = nn.Linear(5, 2)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        image = x[:, :6].unflatten(1, (2, 3))
        h = torch.cat([conv(image).mean(2) for conv in self.convs] + [table(ids[:, i]) for i, table in enumerate(self.tables)], 1)
        gates = self.gate(x[:, :2]).softmax(1)
        return self.out(torch.stack([expert(h) * gates[:, i : i + 1] for i, expert in enumerate(self.experts)], 1).sum(1))


def build(kind: str, lanes: int) -> nn.Module:
    torch.manual_seed(0)
    return (Images(lanes) if kind == "images" else Additive(lanes, kind)).double()


def batch(lanes: int, kind: str, rows: int = ROWS) -> tuple[tuple[Tensor, ...], Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, max(lanes, 6), generator=generator, dtype=torch.float64)
    y = torch.randn(rows, 2, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, 7, (rows, lanes), generator=generator)
    return ((x, ids) if kind == "images" else (x,)), y


def fused(kind: str, lanes: int) -> nn.Module:
    made = fxfuse.optimize(build(kind, lanes), batch(lanes, kind)[0], objective="launches", tune=False, validate=False)
    assert fxfuse.report(made).fused
    return made


def trained(model: nn.Module, optimizer: str, inputs: tuple[Tensor, ...], y: Tensor, steps: int = 4) -> nn.Module:
    stepping = worker.OPTIMIZERS[optimizer](model.parameters())
    for _ in range(steps):
        stepping.zero_grad()
        (model(*inputs) - y).square().mean().backward()
        stepping.step()
    return model


def input_gradient(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    x = inputs[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x, *inputs[1:]).square().sum(), x)
    return gradient


def compared(kind: str, lanes: int, expect_sharded: bool = True) -> None:
    """Training, inference, input gradients, gradients by name."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    inputs, y = batch(lanes, kind)
    for optimizer in worker.OPTIMIZERS:
        what = f"{kind}, {lanes} lanes, {optimizer}"
        plain, model = build(kind, lanes), fxfuse.shard_lanes(fused(kind, lanes), mesh)
        (state,) = regions(model).values()
        if dist.get_rank() == 0 and optimizer == "sgd":
            print(what, *state.plan.notes, sep="\n    ", flush=True)
        assert bool(state.sharding.sharded) is expect_sharded, what
        trained(plain, optimizer, inputs, y)
        trained(model, optimizer, inputs, y)
        assert not fxfuse.report(model).fallbacks, fxfuse.report(model).fallbacks
        worker.assert_same(dict(fxfuse.original_state_dict(model)), dict(plain.state_dict()), what)
        gradients = {name: grad for name, grad in original_gradients(model).items() if grad is not None}
        worker.assert_same(gradients, {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}, what)
        worker.assert_same({"x": input_gradient(model, inputs)}, {"x": input_gradient(plain, inputs)}, what)
        plain.eval(), model.eval()
        with torch.no_grad():
            for rows in (ROWS, 3):
                some = batch(lanes, kind, rows)[0]
                worker.assert_same({"y": model(*some)}, {"y": plain(*some)}, f"{what}, eval")
        assert not fxfuse.report(model).fallbacks, fxfuse.report(model).fallbacks


def train(folder: str) -> None:
    world = dist.get_world_size()
    for kind in ("cat", "stack", "sum", "images"):
        for lanes in (2 * world, 2 * world + 1) if world == 2 else (world, world + 3):
            compared(kind, lanes)
    compared("cat", 3, expect_sharded=world < 3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    globals()[sys.argv[1]](sys.argv[2])
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)
