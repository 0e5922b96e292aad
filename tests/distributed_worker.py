"""What ``test_distributed.py`` runs on several processes: ``distributed_worker.py PHASE FOLDER``. Raises where anything differs.

Every process makes the same model; each trains on its own rows of one batch. The reference trains in one process on all rows.
"""

from __future__ import annotations

import os
import re
import sys
from typing import Any

import pytest
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


def original(folder: str) -> None:
    """Sharded packs in the original's layout: read, written, refused; the optimizer's state too. Six lanes are uneven on four processes."""
    x, y = batch()
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    plain = network()
    one, stepping = trained_with(plain, x, y)
    model, each = trained_with(sharded(), x[mine], y[mine])
    state = fxfuse.original_state_dict(model)
    assert all(type(value) is Tensor and value.is_contiguous() for value in state.values())
    assert_same(dict(state), one.state_dict(), "original_state_dict")
    with fxfuse.checkpoint_format(model, "original"):
        written = model.state_dict()
    assert_same({name: getattr(value, "full_tensor", lambda value=value: value)() for name, value in written.items()}, state, "written")
    dcp.save({"model": written}, checkpoint_id=os.path.join(folder, "written"))

    again = sharded(3)
    with fxfuse.checkpoint_format(again, "original"):
        read = {"model": again.state_dict()}
    dcp.load(read, checkpoint_id=os.path.join(folder, "written"))
    again.load_state_dict(read["model"])
    assert_same(dict(fxfuse.original_state_dict(again)), state, "read")
    for load in (again.load_state_dict, lambda given: fxfuse.load_original_state_dict(again, given)):
        before = fxfuse.original_state_dict(again)
        lacking = {name: value + 1 for name, value in written.items() if name != "nets.2.0.weight"}
        odd = {**lacking, "nets.2.0.weight": torch.zeros(3, 3)}
        for given, said in ((lacking, "nets.2.0.weight"), (odd, "nets.2.0.weight")):
            assert_raises(RuntimeError, said, load, given)
            assert_same(dict(fxfuse.original_state_dict(again)), before, "a state dict that does not fit")
    fxfuse.load_original_state_dict(again, {"nets.1.0.bias": torch.full((5,), 2.0, dtype=torch.float64)}, strict=False)
    expected = {**state, "nets.1.0.bias": torch.full((5,), 2.0, dtype=torch.float64)}
    assert_same(dict(fxfuse.original_state_dict(again)), expected, "one lane")
    fxfuse.load_original_state_dict(again, state)
    assert_same(dict(fxfuse.original_state_dict(again)), state, "load_original_state_dict")

    ours, theirs = fxfuse.original_optimizer_state_dict(each, model), stepping.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    for number, values in theirs["state"].items():
        for key, value in values.items():
            found = ours["state"][number][key]
            found = found.full_tensor() if hasattr(found, "full_tensor") else found
            assert torch.allclose(found, value, rtol=1e-9, atol=1e-12), (number, key)
    later = OPTIMIZERS["adamw"](again.parameters())
    fxfuse.load_original_optimizer_state_dict(later, again, ours)
    for _ in range(2):
        for trained_model, optimizer, rows in ((one, stepping, slice(None)), (again, later, mine)):
            optimizer.zero_grad()
            (trained_model(x[rows]) - y[rows]).square().mean().backward()
            optimizer.step()
    assert_same(dict(fxfuse.original_state_dict(again)), one.state_dict(), "trained on")

    assert_raises(fxfuse.FxfuseError, "sharded over processes", fxfuse.unfuse, model)
    assert_raises(fxfuse.FxfuseError, "sharded over processes", lambda: [*fxfuse.named_original_parameters(model)])
    assert_raises(fxfuse.FxfuseError, "DTensor, and only plain Parameters", fxfuse.freeze, model, "nets.3.*")
    assert_raises(fxfuse.StateDictError, "sharded over processes", model.nets[1][0].load_state_dict, plain.nets[1][0].state_dict())


def trained_with(model: nn.Module, x: Tensor, y: Tensor) -> tuple[nn.Module, Any]:
    """The model after four steps, and the optimizer."""
    made: list[Any] = []
    OPTIMIZERS["kept"] = lambda parameters: made.append(OPTIMIZERS["adamw"](parameters)) or made[0]
    return trained(model, "kept", x, y), made[0]


def assert_raises(kind: type[Exception], said: str, call: Any, *args: Any) -> None:
    """It raises this, in these words."""
    with pytest.raises(kind, match=re.escape(said)):
        call(*args)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    {"train": train, "load": load, "original": original}[sys.argv[1]](sys.argv[2])
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then end a process that takes itself apart ("terminate called without an active exception")
