"""Loops in other methods than forward, and modules that are called in several forms: programs over one pack, each with its own guard."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checks
import fxfuse
from fxfuse.errors import ArgumentError, FallbackError


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 6), nn.Tanh(), nn.Linear(6, outputs))


def gradients(model: nn.Module, output: Any) -> dict[str, Tensor | None]:
    """Gradients by the original's names, for a random weighted sum of the output's tensors."""
    model.zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(5)
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    sum((leaf * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)).sum() for leaf in leaves).backward()
    found = fxfuse.weights.packing.original_gradients(model)
    return {name: None if gradient is None else gradient.clone() for name, gradient in found.items()}


def assert_same(model: nn.Module, fused: nn.Module, method: str, *args: Any, fallbacks: bool = False, **kwargs: Any) -> None:
    """One method of both models gives equal outputs and gradients, without falling back, in both modes."""
    owner, _, name = method.rpartition(".")
    for training in (True, False):
        model.train(training), fused.train(training)
        want, got = (getattr(m.get_submodule(owner), name)(*args, **kwargs) for m in (model, fused))
        for one, other in zip(*(torch.utils._pytree.tree_leaves(out) for out in (got, want)), strict=True):
            checks.assert_close(one.detach(), other.detach(), method)
        expected = gradients(model, want)
        for key, gradient in gradients(fused, got).items():
            if expected[key] is None:  # a lane of a pack that this method does not use
                assert gradient is None or not gradient.any(), key
            else:
                checks.assert_close(gradient, expected[key], f"{method}: gradient of {key}")
    assert fallbacks or not fxfuse.report(fused).fallbacks, fxfuse.report(fused).fallbacks


def lowered(fused: nn.Module) -> dict[str, list[str]]:
    """Per method, the ops that were fused."""
    found: dict[str, list[str]] = {}
    for plan in fxfuse.report(fused).fused:
        for method, ops in plan.method_ops.items():
            found[method] = [op.op for op in ops]
    return found


class Trainer(nn.Module):
    """A model whose only loop is in its training_step."""

    def __init__(self, n: int = 4) -> None:
        super().__init__()
        self.nets = nn.ModuleList(mlp(1, 2) for _ in range(n))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, target = batch
        outputs = [net(x[:, i : i + 1]) for i, net in enumerate(self.nets)]
        return F.mse_loss(torch.stack(outputs).sum(0), target)


@pytest.mark.parametrize("options", [{"objective": "launches"}, {"objective": "launches", "tune": False}])
def test_a_model_without_a_forward(options: dict[str, Any]) -> None:
    model = checks.randomized(Trainer())
    batch = (checks.randn(6, 4), checks.randn(6, 2, seed=2))
    with checks.untouched(model):
        fused = fxfuse.optimize(model, methods={"training_step": (batch, 0)}, strict=True, **options)
    report = fxfuse.report(fused)
    assert not report.refused
    assert report.methods["training_step"].ok
    assert "linear" in lowered(fused)["training_step"]
    assert "in training_step:" in str(report)
    assert list(fxfuse.graph(fused)) == ["training_step()"]
    assert report.to_dict()["fused"][0]["methods"]["training_step"][0]["lanes"] == 4
    for rows in (6, 3, 11):
        assert_same(model, fused, "training_step", (checks.randn(rows, 4, seed=rows), checks.randn(rows, 2)), 0)
    with pytest.raises(FallbackError, match="training_step: "):
        fused.training_step((checks.randn(6, 5), checks.randn(6, 2)), 0)
    checks.assert_same_state(fxfuse.original_state_dict(fused), model.state_dict(), "state dict")
    plain = fxfuse.unfuse(fused)
    assert type(plain) is Trainer
    assert type(plain).training_step is Trainer.training_step
    assert torch.allclose(plain.training_step(batch, 0), model.training_step(batch, 0))


class Critic(nn.Module):
    """Twin critics as in TD3, with more than two of them, and other questions asked of them than forward's."""

    def __init__(self, n: int = 5) -> None:
        super().__init__()
        self.q = nn.ModuleList(mlp(3, 1) for _ in range(n))

    def forward(self, obs: Tensor, action: Tensor) -> tuple[Tensor, ...]:
        x = torch.cat([obs, action], 1)
        return tuple(q(x) for q in self.q)

    def q1_forward(self, obs: Tensor, action: Tensor) -> Tensor:
        return self.q[0](torch.cat([obs, action], 1))

    def smallest(self, obs: Tensor, action: Tensor, offset: float = 0.0) -> Tensor:
        x = torch.cat([obs, action], dim=1)
        return torch.cat([q(x) + offset for q in self.q], 1).min(1).values

    def some(self, obs: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([obs, action], dim=1)
        return sum(q(x) for q in list(self.q)[1:4])


def test_methods_share_the_packs_of_forward() -> None:
    model = checks.randomized(Critic())
    x = (checks.randn(6, 2), checks.randn(6, 1, seed=2))
    fused = fxfuse.optimize(model, x, methods=["smallest", "some", "q1_forward"], objective="launches", strict=True)
    report = fxfuse.report(fused)
    assert set(lowered(fused)) == {"smallest", "some"}
    assert len(list(fused.parameters())) == 4, "one pack per layer and kind, for all methods"
    assert [str(r) for r in report.refused if r.region == "q1_forward"] == []
    assert set(report.methods) == {"smallest", "some", "q1_forward"}
    assert all(v.ok for v in report.methods.values())
    for rows in (6, 2, 9):
        args = (checks.randn(rows, 2, seed=rows), checks.randn(rows, 1, seed=3))
        for method in ("forward", "smallest", "some", "q1_forward"):
            assert_same(model, fused, method, *args)
    assert_same(model, fused, "smallest", action=x[1], obs=x[0])


def test_a_method_falls_back_where_it_was_not_recorded_so() -> None:
    model = checks.randomized(Critic())
    x = (checks.randn(6, 2), checks.randn(6, 1, seed=2))
    fused = fxfuse.optimize(model, x, methods=["smallest"], objective="launches", tune=False)
    assert_same(model, fused, "smallest", *x, 0.5, fallbacks=True)
    (reason,) = fxfuse.report(fused).fallbacks
    assert "smallest: " in reason
    for each in (model, fused):
        each.q[1][1] = nn.ReLU()
    assert_same(model, fused, "smallest", *x, fallbacks=True)
    assert_same(model, fused, "forward", *x, fallbacks=True)
    assert any("a submodule was replaced" in reason for reason in fxfuse.report(fused).fallbacks)


class Agent(nn.Module):
    """A critic inside, asked by a dotted name; forward itself has no loop."""

    def __init__(self) -> None:
        super().__init__()
        self.actor = nn.Linear(2, 1)
        self.critic = Critic(3)

    def forward(self, obs: Tensor) -> Tensor:
        return torch.tanh(self.actor(obs))


def test_a_dotted_method() -> None:
    model = checks.randomized(Agent())
    obs, action = checks.randn(5, 2), checks.randn(5, 1, seed=2)
    fused = fxfuse.optimize(model, obs, methods={"critic.smallest": (obs, action)}, objective="launches")
    assert [plan.path for plan in fxfuse.report(fused).fused] == ["critic"]
    assert_same(model, fused, "critic.smallest", obs, action)
    assert_same(model, fused, "forward", obs)
    assert_same(model, fused, "critic.forward", obs, action, fallbacks=True)
    assert list(fxfuse.report(fused).fallbacks) == ["critic: forward itself holds no program, other methods do"]


class Lightning(nn.Module):
    """As pytorch-lightning has it: training_step calls forward, predict_step goes its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"heads": nn.ModuleList(mlp(3, 2) for _ in range(3))})
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([head(x) for head in self.body["heads"]], 1)

    def training_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        out = self(batch["x"])
        return {"loss": F.mse_loss(out, batch["y"]), "out": out}

    def predict_step(self, x: Tensor) -> list[Tensor]:
        return [head(x).softmax(-1) * self.scale for head in self.body["heads"]]


def test_a_method_that_calls_forward() -> None:
    model = checks.randomized(Lightning())
    x = checks.randn(6, 3)
    batch = {"x": x, "y": checks.randn(6, 6, seed=4)}
    methods: dict[str, Any] = {"training_step": ((batch,), {}), "predict_step": x}
    fused = fxfuse.optimize(model, x, methods=methods, objective="launches", strict=True)
    assert set(fxfuse.report(fused).methods) == {"training_step", "predict_step"}
    for rows in (6, 4):
        own = {"x": checks.randn(rows, 3, seed=rows), "y": checks.randn(rows, 6)}
        assert_same(model, fused, "training_step", own)
        assert_same(model, fused, "predict_step", own["x"])
        assert_same(model, fused, "forward", own["x"])


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lanes = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([lane(x) for lane in self.lanes])


class Wide(nn.Module):
    """Forward's loop is inside of a child; another method loops over that child's lanes and its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.extra = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).mean(0)

    def both(self, x: Tensor) -> Tensor:
        return sum(extra(lane(x)) for lane, extra in zip(self.inner.lanes, self.extra, strict=True))


def test_regions_inside_each_other_become_one() -> None:
    model, x = checks.randomized(Wide()), checks.randn(5, 3)
    fused = fxfuse.optimize(model, x, methods=["both"], objective="launches", strict=True)
    assert [plan.path for plan in fxfuse.report(fused).fused] == [""]
    assert_same(model, fused, "forward", x)
    assert_same(model, fused, "both", x)


class TwoForms(nn.Module):
    """One module called with other shapes and other keywords in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.bank = Bank()

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.bank(x), self.bank(y, flip=True)


class Bank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lanes = nn.ModuleList(nn.Linear(3, 2) for _ in range(4))

    def forward(self, x: Tensor, flip: bool = False) -> Tensor:
        lanes = list(self.lanes)[::-1] if flip else list(self.lanes)
        return torch.stack([lane(x) for lane in lanes], 1)


def test_one_module_in_two_forms() -> None:
    model = checks.randomized(TwoForms())
    args = (checks.randn(5, 3), checks.randn(7, 2, 3, seed=2))
    fused = fxfuse.optimize(model, args, objective="launches", strict=True, validate=False)
    report = fxfuse.report(fused)
    (plan,) = report.fused
    assert plan.path == "bank"
    assert [len(programs) for programs in plan.methods["forward"].values()] == [1, 1], "one more form in each mode"
    assert_same(model, fused, "forward", *args)
    assert_same(model, fused, "forward", checks.randn(2, 3), checks.randn(9, 2, 3, seed=2))
    assert_same(model, fused, "bank.forward", args[0])
    assert_same(model, fused, "bank.forward", args[1], flip=True)


class Forms(nn.Module):
    """The same, with the two forms asked for by two methods: two programs of one child."""

    def __init__(self) -> None:
        super().__init__()
        self.bank = Bank()

    def forward(self, x: Tensor) -> Tensor:
        return self.bank(x).sum(1)

    def reverse(self, x: Tensor) -> Tensor:
        return self.bank(x, flip=True) * 2


def test_one_child_called_by_two_methods() -> None:
    model, x = checks.randomized(Forms()), checks.randn(5, 3)
    fused = fxfuse.optimize(model, x, methods=["reverse"], objective="launches", strict=True)
    (plan,) = fxfuse.report(fused).fused
    assert plan.path == "bank"
    assert list(plan.methods) == ["forward"]
    for rows in (5, 2):
        for method in ("forward", "reverse"):
            assert_same(model, fused, method, checks.randn(rows, 3, seed=rows))
    with pytest.raises(FallbackError):
        fused.bank(x, flip=1)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_keep_their_methods(how: str) -> None:
    model = checks.randomized(Critic())
    x = (checks.randn(6, 2), checks.randn(6, 1, seed=2))
    fused = fxfuse.optimize(model, x, methods=["smallest"], objective="launches", strict=True, tune=False)
    if how == "deepcopy":
        other = copy.deepcopy(fused)
    else:
        stream = io.BytesIO()
        torch.save(fused, stream)
        stream.seek(0)
        other = torch.load(stream, weights_only=False)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.add_(1)
    assert_same(model, other, "smallest", *x)
    assert_same(model, other, "forward", *x)


def test_alias_packing_is_not_asked_with_methods() -> None:
    with pytest.raises(ArgumentError, match="smallest needs example arguments"):
        fxfuse.optimize(Critic(), methods=["smallest"])


@pytest.mark.parametrize(
    ("methods", "sentence"),
    [
        (["missing"], "Critic has no method missing"),
        (["nowhere.smallest"], "the model has no module nowhere"),
        ("smallest", "methods must be a list of method names"),
        (["forward"], "forward is meant by example_inputs"),
        ({"smallest": 3}, "must be a tensor, a tuple of arguments"),
    ],
)
def test_wrong_methods_raise(methods: Any, sentence: str) -> None:
    with pytest.raises(ArgumentError, match=sentence):
        fxfuse.optimize(Critic(), (torch.zeros(2, 2), torch.zeros(2, 1)), methods=methods)


class Failing(Critic):
    def smallest(self, obs: Tensor, action: Tensor, offset: float = 0.0) -> Tensor:
        raise ValueError("not today")


def test_a_method_that_raises_costs_only_itself() -> None:
    model = checks.randomized(Failing())
    x = (checks.randn(6, 2), checks.randn(6, 1, seed=2))
    fused = fxfuse.optimize(model, x, methods=["smallest", "some"], objective="launches", tune=False)
    report = fxfuse.report(fused)
    assert [str(r) for r in report.refused] == ["smallest raises ValueError: not today"]
    assert_same(model, fused, "forward", *x)
    assert_same(model, fused, "some", *x)
    with pytest.raises(ValueError, match="not today"):
        fused.smallest(*x)


def test_inplace_and_explain() -> None:
    model = checks.randomized(Critic())
    before = copy.deepcopy(model)
    x = (checks.randn(6, 2), checks.randn(6, 1, seed=2))
    report = fxfuse.explain(model, methods={"smallest": x}, objective="launches", tune=False)
    assert list(report.fused[0].method_ops) == ["smallest"]
    assert fxfuse.optimize(model, x, methods=["smallest"], objective="launches", inplace=True) is model
    assert_same(before, model, "smallest", *x)
    assert_same(before, model, "forward", *x)
