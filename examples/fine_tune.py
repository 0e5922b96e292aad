"""Fine-tune from a checkpoint of the original model, fused, and hand back a checkpoint of the original: weights and optimizer.

Run it: ``python examples/fine_tune.py``. Nobody who gave the checkpoint, or gets the new one, has to know of fxfuse.
"""

import tempfile
from pathlib import Path

import torch
from torch import nn

import fxfuse


class Additive(nn.Module):
    def __init__(self, features: int = 32):
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(1, 16), nn.ReLU(), nn.Linear(16, 1)) for _ in range(features))

    def forward(self, x):
        return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1).sum(1)


def train(model, optimizer, scheduler, steps):
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(64, 32, generator=generator)
        loss = (model(x) - x.sin().sum(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return loss.item()


def main():
    torch.manual_seed(0)
    folder = Path(tempfile.mkdtemp())

    # Somebody trained the model, and saved weights and optimizer.
    model = Additive()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    before = train(model, optimizer, scheduler, 100)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "original.pt")

    # Fine-tune: load both as usual, then fuse. The optimizer goes over to the packed weights, its moments too; the scheduler goes on.
    saved = torch.load(folder / "original.pt")
    model = Additive()
    model.load_state_dict(saved["model"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer.load_state_dict(saved["optimizer"])
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    fused = fxfuse.optimize(model, torch.randn(64, 32), optimizer=optimizer)
    frozen = fxfuse.freeze(fused, "nets.3.*")
    kept = fxfuse.original_state_dict(fused)
    after = train(fused, optimizer, scheduler, 200)
    print(f"loss {before:.3f} -> {after:.3f}; frozen: {', '.join(frozen)}")
    now = fxfuse.original_state_dict(fused)
    assert all(torch.equal(now[name], kept[name]) for name in frozen)
    assert not torch.equal(now["nets.4.0.weight"], kept["nets.4.0.weight"])

    # Hand back what was given: the original's class, its names, its optimizer.
    plain = fxfuse.unfuse(fused)
    fxfuse.migrate_optimizer(optimizer, fused, plain)
    torch.save({"model": plain.state_dict(), "optimizer": optimizer.state_dict()}, folder / "tuned.pt")

    tuned = torch.load(folder / "tuned.pt")
    again = Additive()
    again.load_state_dict(tuned["model"])
    torch.optim.AdamW(again.parameters()).load_state_dict(tuned["optimizer"])
    x = torch.randn(5, 32)
    print("difference of the two models:", (again(x) - fused(x)).abs().max().item())


if __name__ == "__main__":
    main()
