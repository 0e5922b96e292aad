"""Round trips of weights, bit for bit, for every rule; and of whole models through files, other processes, dtypes and the meta device."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import test_rules_generated as generated
import torch
from rule_samples import SAMPLES
from small_loops import KINDS
from torch import nn
from torch.testing import assert_close

import fxfuse
from checks import QUICK, randn, randomized
from fxfuse.passes.writer import CannotVectorize

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def odd(state: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Random numbers, with a nan, an inf and a negative zero at the end of each tensor that has room."""
    made = {}
    for number, (name, tensor) in enumerate(state.items()):
        value = tensor.clone()
        if value.is_floating_point():
            value = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed + number), dtype=torch.float64).to(tensor.dtype)
            flat = value.view(-1)
            for k, special in enumerate((torch.nan, torch.inf, -0.0)[: flat.numel() // 2]):
                flat[-1 - k] = special
        made[name] = value
    return made


def same_bits(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], where: str) -> None:
    assert list(got) == list(want), where
    for name, tensor in want.items():
        assert got[name].dtype is tensor.dtype, f"{where}: {name}"
        one, other = (t.contiguous().flatten().view(torch.uint8) if t.numel() else t for t in (got[name], tensor))
        assert torch.equal(one, other), f"{where}: {name}"


@pytest.mark.parametrize("op", sorted(SAMPLES))
def test_every_rule_packs_and_unpacks_bit_for_bit(op: str) -> None:
    for number, sample in enumerate(SAMPLES[op]):
        for seed, layout in enumerate(generated.layouts(sample, False)):
            if sample.module is None and "own" not in layout:
                continue
            original = generated.Loop(sample, layout, 3, False, seed)
            try:
                made, _ = generated.packed(copy.deepcopy(original), op)
            except (AssertionError, RuntimeError, TypeError, ValueError):
                original(*original.inputs)  # raises for a sample that cannot be computed at all
                raise
            if isinstance(made, CannotVectorize):
                continue
            where = f"{op}, sample {number}, {layout}"
            for dtype in DTYPES:
                if not all(p.is_floating_point() for p in original.parameters()):
                    break
                plain, fused = copy.deepcopy(original).to(dtype), copy.deepcopy(made).to(dtype)
                given = odd(plain.state_dict(), seed)
                fused.load_state_dict(given)
                same_bits(fxfuse.original_state_dict(fused), given, f"{where}, {dtype}")
                other = copy.deepcopy(made).to(dtype)
                other.load_state_dict(fused.state_dict())  # packed names
                same_bits(fxfuse.original_state_dict(other), given, f"{where}, {dtype}, packed names")
                same_bits(fxfuse.unfuse(other).state_dict(), given, f"{where}, {dtype}, unfused")
            break


@pytest.mark.parametrize("kind", ["columns", "conv_norm", "embeddings", "unequal", "lstms"])
def test_weights_come_onto_memory_that_holds_none(kind: str) -> None:
    model, inputs = KINDS[kind]()
    fused = fxfuse.optimize(model, inputs(1, 6), objective="launches", **QUICK)
    given = odd(model.state_dict(), 9)
    for assign in (False, True):
        empty = copy.deepcopy(fused).to("meta")
        if not assign:
            empty.to_empty(device="cpu")
        empty.load_state_dict(given, assign=assign)
        same_bits(fxfuse.original_state_dict(empty), given, f"{kind}, assign={assign}")


class Lanes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Linear(1, 2) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([net(x[:, i : i + 1]).relu() for i, net in enumerate(self.nets)], 1)


READ = """
import sys, torch, fxfuse
import test_recipes_every_rule as here
fused = torch.load(sys.argv[1], weights_only=False)
plain = fxfuse.unfuse(fused)
assert type(plain) is here.Lanes, type(plain)
torch.save(plain.state_dict(), sys.argv[2])
"""


def test_unfused_in_another_process_after_training(tmp_path: Path) -> None:
    model = randomized(Lanes())
    fused: Any = fxfuse.optimize(model, randn(5, 4), objective="launches", **QUICK)
    optimizer = torch.optim.Adam(fused.parameters(), 0.1)
    fxfuse.freeze(fused, "nets.1.weight")
    for step in range(3):
        optimizer.zero_grad()
        fused(randn(5, 4, seed=step)).square().sum().backward()
        optimizer.step()
    torch.save(fused, tmp_path / "fused.pt")
    paths = f"import sys; sys.path[:0] = {[str(Path(__file__).parents[1]), str(Path(__file__).parent)]!r}\n"
    subprocess.run([sys.executable, "-c", paths + READ, str(tmp_path / "fused.pt"), str(tmp_path / "plain.pt")], check=True)
    state = torch.load(tmp_path / "plain.pt")
    same_bits(state, fxfuse.original_state_dict(fused), "another process")
    assert torch.equal(state["nets.1.weight"], model.nets[1].weight)
    assert not torch.equal(state["nets.0.weight"], model.nets[0].weight)


def test_a_frozen_lane_under_autocast_takes_the_fast_way() -> None:
    model = randomized(Lanes()).float()
    fused = fxfuse.optimize(model, randn(5, 4).float(), objective="launches", tune=False)
    fxfuse.freeze(fused, "nets.1.*")
    with torch.autocast("cpu", torch.bfloat16):
        x = randn(5, 4).float()
        assert_close(fused(x), model(x), rtol=0.02, atol=0.02)
    assert not fxfuse.report(fused).fallbacks, fxfuse.report(fused).fallbacks
