"""What ``test_distributed.py`` runs on several processes: ``distributed_worker.py train|load FOLDER``. Raises where anything differs.

Every process makes the same model; each trains on its own rows of one batch. The reference trains in one process on all rows.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fxfuse

ROWS, LANES = 8, 6


class Networks(nn.Module):
    """Networks per column, then a convolution per row of what they give, then a layer that is no lane."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 4)) for _ in range(LANES))
        self.convs = nn.ModuleList(nn.Conv1d(1, 2, 3) for _ in range(LANES))
        self.head = nn.Linear(LANES * 2 * 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.stack([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)
        rows = [conv(h[:, i : i + 1]).flatten(1) for i, conv in enumerate(self.convs)]
        return self.head(torch.cat(rows, 1))


def network(seed: int = 0) -> nn.Module:
    """Its weights are drawn by ``seed``."""
    torch.manual_seed(seed)
    return Networks().double()


def batch() -> tuple[Tensor, Tensor]:
    """Inputs and targets, the same everywhere."""
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(ROWS, width, generator=generator, dtype=torch.float64) for width in (LANES, 2)]
    return drawn[0], drawn[1]


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.05),
}


def trained(model: nn.Module, optimizer: str, x: Tensor, y: Tensor) -> nn.Module:
    """The model after four steps."""
    stepping = OPTIMIZERS[optimizer](model.parameters())
    for _ in range(4):
        stepping.zero_grad()
        (model(x) - y).square().mean().backward()
        stepping.step()
    return model


def fused(seed: int = 0) -> nn.Module:
    """The network, fused; validated elsewhere."""
    made = fxfuse.optimize(network(seed), batch()[0], objective="launches", tune=False, validate=False)
    assert fxfuse.report(made).fused
    return made


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    """Equal to rounding, name by name."""
    assert list(found) == list(expected), what
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=1e-9, atol=1e-12), f"{what}: {name}"


def whole(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model under FSDP2, unsharded, by the original's names."""
    plain = fused(7)
    plain.load_state_dict({name: value.full_tensor() for name, value in model.state_dict().items()})
    return dict(fxfuse.original_state_dict(plain))


def sharded(seed: int = 0) -> nn.Module:
    """Fused, and then sharded over all processes."""
    model = fused(seed)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


def train(folder: str) -> None:
    """DDP and FSDP2 come to the weights of one process; what FSDP2 trained is saved, packed and by the original's names."""
    x, y = batch()
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    for optimizer in OPTIMIZERS:
        expected = trained(network(), optimizer, x, y).state_dict()
        inner = fused()
        trained(DistributedDataParallel(inner), optimizer, x[mine], y[mine])
        assert_same(dict(fxfuse.original_state_dict(inner)), expected, f"DDP, {optimizer}")
        model = trained(sharded(), optimizer, x[mine], y[mine])
        assert_same(whole(model), expected, f"FSDP2, {optimizer}")
        for each in (inner, model):
            assert not fxfuse.report(each).fallbacks, fxfuse.report(each).fallbacks
    local = sum(p.to_local().numel() for p in model.parameters())
    assert local < 0.7 * sum(p.numel() for p in network().parameters()), "each process holds its share"
    dcp.save({"model": model.state_dict()}, checkpoint_id=os.path.join(folder, "packed"))
    dcp.save({"model": whole(model)}, checkpoint_id=os.path.join(folder, "original"))


def load(folder: str) -> None:
    """Both layouts are loaded by another number of processes."""
    x, y = batch()
    expected = trained(network(), "adamw", x, y).state_dict()
    model = sharded(3)
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=os.path.join(folder, "packed"))
    model.load_state_dict(state["model"])
    assert_same(whole(model), expected, "packed")
    plain = fused(4)
    original = {"model": dict(fxfuse.original_state_dict(plain))}
    dcp.load(original, checkpoint_id=os.path.join(folder, "original"))
    fxfuse.load_original_state_dict(plain, original["model"])
    assert_same(dict(fxfuse.original_state_dict(plain)), expected, "original")
    dcp.save({"model": model.state_dict()}, checkpoint_id=os.path.join(folder, "again"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    {"train": train, "load": load}[sys.argv[1]](sys.argv[2])
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then end a process that takes itself apart ("terminate called without an active exception")
