"""What every example does with a model and its fused form: compare them, train both, carry a checkpoint from one to the other."""

import copy
import io

import torch
import torch.nn.functional as F

import fxfuse
from fxfuse import launches


def fuse(model, *inputs, **options):
    """Fuse for the fewest launches and print the report. Your own code wants `fxfuse.optimize(model, x)`, which decides by time."""
    fused = fxfuse.optimize(model, inputs, objective="launches", **options)
    print(fxfuse.report(fused))
    before, after = launches.count(lambda: model(*inputs)), launches.count(lambda: fused(*inputs))
    print(f"heavy launches: {before.heavy} -> {after.heavy}, all launches: {before.total} -> {after.total}")
    return fused


def compare(model, fused, *inputs):
    """Outputs and gradients, in float64 and in the model's own dtype."""
    print(fxfuse.verify(model, fused, inputs))


def train(model, fused, inputs, target, steps=5):
    """Train both from the same weights on the same data; the losses are the same but for rounding."""
    losses = []
    for each in (model, fused):
        optimizer = torch.optim.Adam(each.parameters(), lr=1e-3)
        losses.append([])
        for _ in range(steps):
            optimizer.zero_grad()
            loss = F.mse_loss(each(*inputs), target)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    for step, (loop, packed) in enumerate(zip(*losses)):
        print(f"step {step}: loss {loop:.6f} as a loop, {packed:.6f} fused")
    return losses


def carry_checkpoint(model, fused, *inputs):
    """Save the fused model by the original's names, load that into the plain class, and into the fused model again."""
    file = io.BytesIO()
    torch.save(fxfuse.original_state_dict(fused), file)
    file.seek(0)
    state = torch.load(file)
    plain = copy.deepcopy(model)
    plain.load_state_dict(state)  # strict: every key is there, by the name it always had
    fxfuse.load_original_state_dict(fused, state)
    with torch.no_grad():
        difference = (plain(*inputs) - fused(*inputs)).abs().max().item()
    print(f"checkpoint carried over, {len(state)} tensors: largest difference of the outputs {difference:.1e}")
    return difference
