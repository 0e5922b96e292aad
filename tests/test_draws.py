"""Random numbers are compared by how many there are: lanes that share a mask draw fewer, whatever the numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from checks import randn
from fxfuse.recording.draws import FollowedDraws


class Masks(nn.Module):
    """Four lanes that drop out of one tensor, with masks of their own or one for all; ``wasted`` draws that nothing comes of."""

    def __init__(self, own: bool, wasted: int = 0, looked_at: bool = False) -> None:
        super().__init__()
        self.own, self.wasted, self.looked_at = own, wasted, looked_at

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.wasted):
            noise = torch.tanh(torch.randn(3) * 2)
            if self.looked_at and noise.sum() > 1e9:
                return noise
        out = x.new_zeros(4, *x.shape)
        masked = torch.nn.functional.dropout(x, 0.5, self.training)
        for i in range(4):
            out[i] = torch.nn.functional.dropout(x, 0.5, self.training) if self.own and i else masked
        return out


@pytest.mark.parametrize(
    ("other", "equal"),
    [(Masks(True), True), (Masks(False), False), (Masks(True, wasted=2), True), (Masks(True, wasted=2, looked_at=True), False)],
    ids=["own", "one for all", "thrown away", "looked at"],
)
def test_draws_that_matter_are_counted(other: Masks, equal: bool) -> None:
    result = fxfuse.verify(Masks(True), other, randn(6, 3))
    assert result.ok is equal
    if not equal:
        assert "random numbers" in str(result)


def test_draws_are_followed_through_views_writes_and_branches() -> None:
    with FollowedDraws() as random:
        base = torch.zeros(2, 3)
        base[0] = torch.rand(3)
        view = base[1].view(3, 1)
        apart = torch.rand(7)
        assert random.reaching([view]) == 3
        assert random.reaching([apart.add_(base.sum())]) == 10
        if torch.rand(()) < 2:
            pass
        assert random.reaching([]) == 1
    assert random.drawn == 11
