"""A packed state dict carries its recipes: the original's is had from it in another process, and by a model that was fused otherwise."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_loops import KINDS
from torch import Tensor, nn

import fxfuse
from checks import QUICK, model_of, randomized


def fuse(model: nn.Module, inputs: Any, **options: Any) -> nn.Module:
    fused = fxfuse.optimize(model, *inputs(1, 6), **{"objective": "launches", **QUICK, **options})
    assert fxfuse.report(fused).fused
    return fused


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Around(nn.Module):
    """The loop is somewhere below, between other things."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.scale, self.inner, self.after = nn.Parameter(torch.ones(1)), inner, nn.BatchNorm1d(2)

    def forward(self, *inputs: Any) -> Any:
        return self.inner(*inputs)


def assert_same(found: Any, expected: Any) -> None:
    assert [*found] == [*expected]
    assert found._metadata == expected._metadata
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
        assert found[name].is_contiguous()


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_original_s_state_from_a_file(kind: str, below: bool) -> None:
    model, inputs = KINDS[kind]()
    model = randomized(Around(model), 3) if below else model
    fused = fuse(model, inputs)
    saved = through_a_file(fused.state_dict())
    assert [*saved] == [*fused.state_dict()]
    assert [*saved] != [*model.state_dict()]
    assert_same(fxfuse.original_state_dict(saved), model.state_dict())
    assert_same(fxfuse.original_state_dict(through_a_file(model.state_dict())), model.state_dict())
    assert_same(fxfuse.original_state_dict(through_a_file(fxfuse.original_state_dict(fused))), model.state_dict())
    again = randomized(copy.deepcopy(fused), 8)
    again.load_state_dict(saved)
    assert_same(fxfuse.original_state_dict(again), model.state_dict())


def test_packs_in_parts() -> None:
    model, inputs = KINDS["columns"]()
    fused = fuse(model, inputs)
    fxfuse.freeze(fused, "nets.1.*")
    saved = through_a_file(fused.state_dict())
    assert "packed.nets.0.lane_1.weight" in saved
    assert_same(fxfuse.original_state_dict(saved), model.state_dict())
    other = fuse(randomized(copy.deepcopy(model), 4), inputs)
    other.load_state_dict(saved)
    assert_same(fxfuse.original_state_dict(other), model.state_dict())
    assert [*other.state_dict()] != [*saved]


WAYS: dict[str, Any] = {
    "fewer lanes": lambda model, inputs: fuse(model, inputs, min_lanes=5),
    "the part alone": lambda model, inputs: setattr(model, "inner", fuse(model.inner, inputs)) or model,
    "fewer in the part": lambda model, inputs: setattr(model, "inner", fuse(model.inner, inputs, min_lanes=5)) or model,
}


def mixed() -> Any:
    """Four lanes of one kind and six of another, in a model in a model."""
    def forward(self: Any, x: Tensor) -> Tensor:
        out = torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.few)], 1)
        return out.sum(1, keepdim=True) + torch.cat([net(x) for net in self.many], 1)

    model = model_of(forward, few=nn.ModuleList(nn.Linear(1, 3) for _ in range(4)), many=nn.ModuleList(nn.Linear(4, 2) for _ in range(6)))
    return randomized(Around(model), 1), KINDS["columns"]()[1]


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_was_fused_otherwise_loads_it(way: str) -> None:
    model, inputs = mixed()
    model.after = nn.Identity()
    whole = fuse(copy.deepcopy(model), inputs)
    other = WAYS[way](randomized(copy.deepcopy(model), 5), inputs)
    for one, two in ((whole, other), (other, whole)):
        saved = through_a_file(one.state_dict())
        expected = fxfuse.original_state_dict(one)
        if "fewer" in way:
            assert [*saved] != [*two.state_dict()]
        two.load_state_dict(saved)
        assert_same(fxfuse.original_state_dict(two), expected)
        randomized(one, 11)
    lacking = through_a_file(whole.state_dict())
    del lacking["inner.packed.many.weight"]
    before = fxfuse.original_state_dict(other)
    with pytest.raises(RuntimeError, match=r"inner\.(packed\.)?many\.?.*weight"):
        other.load_state_dict(lacking)
    if way == "fewer lanes":  # a model that fxfuse has seen as a whole
        assert_same(fxfuse.original_state_dict(other), before)


def test_in_a_process_without_the_model(tmp_path: Path) -> None:
    model, inputs = KINDS["conv_norm"]()
    torch.save(fuse(model, inputs).state_dict(), tmp_path / "packed.pt")
    script = (
        "import sys, torch, fxfuse\n"
        "torch.save(fxfuse.original_state_dict(torch.load(sys.argv[1], weights_only=True)), sys.argv[2])\n"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "packed.pt", tmp_path / "back.pt"], check=True, cwd=Path(__file__).parents[1])
    assert_same(torch.load(tmp_path / "back.pt", weights_only=True), model.state_dict())


def test_what_carries_no_recipes_or_wrong_ones_is_refused() -> None:
    model, inputs = KINDS["columns"]()
    saved = fuse(model, inputs).state_dict()
    with pytest.raises(fxfuse.StateDictError, match=r"packed names \(packed\.nets\.0\.bias\) and carries no recipes"):
        fxfuse.original_state_dict(dict(saved))

    def spoilt(change: Any) -> Any:
        state = copy.deepcopy(saved)
        change(state, state._metadata[""]["fxfuse"])
        return state

    for change, said in [
        (lambda state, note: note.update(version=7), "of version 7"),
        (lambda state, note: note.pop("names"), "corrupt"),
        (lambda state, note: note["names"].update({"nets.0.0.weight": ["packed.nets.0.weight", 9]}), "has no lane 9"),
        (lambda state, note: note["recipes"][0].update(style="other"), "corrupt"),
        (lambda state, note: state.update({"packed.nets.0.weight": torch.zeros(2, 2)}), r"has shape \(2, 2\), its recipe says"),
    ]:
        with pytest.raises(fxfuse.StateDictError, match=said):
            fxfuse.original_state_dict(spoilt(change))
