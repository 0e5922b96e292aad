"""A lane's parameter, asked for by name or of its module: filled as the original's, and errors that say what to do."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import checks
import fxfuse
from checks import QUICK, randn, randomized


def pair() -> tuple[nn.Module, nn.Module]:
    """A model and its fused form, whose packs hold the weights transposed."""
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return torch.cat([net(x[:, 4 * i : 4 * i + 4]) for i, net in enumerate(self.nets)], 1)

    model = randomized(checks.model_of(forward, nets=nn.ModuleList(nn.Linear(4, 6) for _ in range(5))))
    fused = fxfuse.optimize(model, randn(3, 20), objective="launches", **QUICK)
    assert fxfuse.report(fused).fused
    assert not fused.nets[1].weight.is_contiguous()
    return model, fused


FILLS: dict[str, Callable[[Tensor], object]] = {
    "normal_": lambda w: w.normal_(0.1, 0.5), "uniform_": lambda w: w.uniform_(-1, 1), "bernoulli_": lambda w: w.bernoulli_(0.3),
    "init.normal_": lambda w: nn.init.normal_(w, std=0.2), "init.kaiming_uniform_": lambda w: nn.init.kaiming_uniform_(w, a=5**0.5),
    "init.xavier_normal_": nn.init.xavier_normal_, "init.trunc_normal_": lambda w: nn.init.trunc_normal_(tensor=w, std=0.2),
    "init.orthogonal_": nn.init.orthogonal_, "init.sparse_": lambda w: nn.init.sparse_(w, 0.5), "zero_": lambda w: w.zero_(),
}  # fmt: skip


@pytest.mark.parametrize("name", FILLS)
def test_a_lane_is_filled_as_the_original_s_tensor(name: str) -> None:
    model, fused = pair()
    for each in (model, fused):
        torch.manual_seed(3)
        parameters = dict(fxfuse.original_named_parameters(each))
        for lane in (3, 1):
            with torch.no_grad():
                FILLS[name](parameters[f"nets.{lane}.weight"])
        for parameter in each.nets[2].parameters():
            with torch.no_grad():
                parameter.normal_()
    for key, value in model.state_dict().items():
        assert torch.equal(fxfuse.original_state_dict(fused)[key], value), key


def test_a_write_where_gradients_are_tracked_raises_as_before() -> None:
    for each in pair():
        with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
            fxfuse.original_named_parameters(each)["nets.0.weight"].normal_()


@pytest.mark.parametrize("how", ["method", "attribute", "module"])
def test_freezing_one_lane_by_torch_s_ways_says_how_to_do_it(how: str) -> None:
    _, fused = pair()
    weight = fxfuse.original_named_parameters(fused)["nets.1.weight"]
    with pytest.raises(fxfuse.FxfuseError, match=r"fxfuse\.freeze\(model, 'nets\.1\.(weight|bias)'\)"):
        if how == "method":
            weight.requires_grad_(False)
        elif how == "attribute":
            weight.requires_grad = False
        else:
            fused.nets[1].requires_grad_(False)
    frozen = copy.deepcopy(fused)
    assert fxfuse.freeze(frozen, "nets.1.weight") == ["nets.1.weight"]
