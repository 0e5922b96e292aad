"""Lane parallelism: each process holds, computes and steps its share of the networks of one loop.

Run it: ``torchrun --nproc-per-node=2 examples/lane_parallel.py``. The model is an additive one, a network per feature, whose sum leaves:
however many features and hidden units there are, a forward moves one number per row.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import fxfuse
from fxfuse.distributed.traffic import traffic

FEATURES, HIDDEN, ROWS, STEPS = 30, 64, 128, 30


def network():
    return nn.Sequential(nn.Linear(1, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))


class Additive(nn.Module):
    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(network() for _ in range(FEATURES))

    def forward(self, x):
        return sum(net(x[:, i : i + 1]) for i, net in enumerate(self.nets))


def train(model, optimizer):
    for step in range(STEPS):
        x = torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x.sin().sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def held(model, optimizer):
    """Bytes of parameters and moments in this process."""
    tensors = [t for p in model.parameters() for t in (p, *optimizer.state[p].values())]
    return sum((t.to_local() if hasattr(t, "to_local") else t).nbytes for t in tensors)


def main():
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same model in every process
    model = Additive()

    alone = fxfuse.optimize(model, torch.randn(ROWS, FEATURES), objective="launches", tune=False)
    adam = torch.optim.Adam(alone.parameters(), lr=0.003)
    expected = train(alone, adam)

    fused = fxfuse.optimize(model, torch.randn(ROWS, FEATURES), objective="launches", tune=False)
    fxfuse.shard_lanes(fused, init_device_mesh("cpu", (world,), mesh_dim_names=("lanes",)))
    optimizer = torch.optim.Adam(fused.parameters(), lr=0.003)  # after shard_lanes: it holds this process's lanes
    with traffic() as moved:
        loss = train(fused, optimizer)

    together = fxfuse.original_state_dict(fused)  # every process asks, and has all lanes
    apart = max((value - together[name]).abs().max().item() for name, value in fxfuse.original_state_dict(alone).items())
    if rank == 0:
        print("\n".join(fxfuse.report(fused).fused[0].notes))
        print(f"loss after {STEPS} steps: {loss:.4f} on {world} processes, {expected:.4f} on one")
        print(f"largest difference of a weight: {apart:.1e}")
        print(f"bytes of weights and moments: {held(fused, optimizer):,} in this process, {held(alone, adam):,} in one")
        print(f"moved in {STEPS} steps: {moved.bytes.total():,} bytes in {moved.calls.total()} calls")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
