"""What modules may be besides plain: pruned, wrapped, hooked for all, moved in part, odd in dtype, one alone, a thousand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed
from hazards import Nets, X, fuse, handled, mlp, refused
from torch import Tensor, nn
from torch.nn.utils import prune

import fxfuse
from checks import assert_close, assert_equal_models, randn, randomized
from fxfuse.launches import count


@pytest.mark.parametrize("lanes", ["all", "one"])
def test_pruned_lanes(lanes: str) -> None:
    model = randomized(Nets())
    for net in model.nets if lanes == "all" else model.nets[:1]:
        prune.random_unstructured(net[2], "weight", amount=0.4)
    fused = fuse(model)
    assert_equal_models(model, fused, [(randn(n, 4, seed=n), {}) for n in (5, 2)])
    said = [str(refusal) for refusal in fxfuse.report(fused).refused]
    assert any("it has hooks, which only a call of the module itself runs (hazards.py:" in text for text in said), said


def test_pruned_after_fusing() -> None:
    model = randomized(Nets())
    fused = fuse(model)
    for each in (model, fused):
        torch.manual_seed(0)
        for net in each.nets:
            net[2].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0.5,))
    assert_close(fused(X), model(X), "hooked")
    assert fxfuse.report(fused).fallbacks == {"a hook was registered on a submodule": 1}


def test_hooks_for_all_modules() -> None:
    """``register_module_forward_hook``: every call of every module runs it."""
    model = randomized(Nets())
    fused = fuse(model)
    calls: list[str] = []

    def doubles(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        calls.append(type(module).__name__)
        return output * 2 if isinstance(module, nn.Linear) else None

    handle = nn.modules.module.register_module_forward_hook(doubles)
    try:
        want = model(X)
        expected, calls[:] = list(calls), []
        assert_close(fused(X), want, "hooked after fusing")
        assert calls == expected
        calls.clear()
        again = fuse(model)
        assert not calls
        assert_close(again(X), want, "fused under the hook")
    finally:
        handle.remove()
    assert fxfuse.report(fused).fallbacks == {"a hook for all modules is registered": 1}
    assert_close(fused(X), model(X), "without it")
    assert sum(fxfuse.report(fused).fallbacks.values()) == 1


@pytest.fixture
def process_group(tmp_path: Any) -> Any:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_model_under_ddp_is_left_as_it_is(process_group: Any) -> None:
    """Its reducer holds the Parameters that it was built with: packed ones would never be reduced."""
    model = nn.parallel.DistributedDataParallel(randomized(Nets()))
    fused = fxfuse.optimize(model, X, objective="launches", tune=False)
    assert not fxfuse.report(fused).fused
    assert fused is model
    reason = "the model is wrapped in DistributedDataParallel, which holds the Parameters that it was given: fuse first, then wrap"
    assert [str(refusal) for refusal in fxfuse.report(fused).refused] == [reason]
    assert_close(fused(X), model(X), "wrapped")


def test_a_fused_model_under_ddp(process_group: Any) -> None:
    model = randomized(Nets())
    wrapped = nn.parallel.DistributedDataParallel(fuse(model))
    assert_close(wrapped(X), model(X), "wrapped after fusing")
    wrapped(X).sum().backward()
    model(X).sum().backward()
    gradients = fxfuse.weights.packing.original_gradients(wrapped.module)
    for name, parameter in model.named_parameters():
        assert_close(gradients[name], parameter.grad, name)


def test_lanes_of_several_dtypes() -> None:
    class Model(Nets):
        def forward(self, x: Tensor) -> Tensor:
            outs = [net(x[:, i : i + 1].to(net[0].weight.dtype)) for i, net in enumerate(self.nets)]
            return torch.cat([out.double() for out in outs], 1)

    model = randomized(Model())
    model.nets[2].float()
    fused = fuse(model)
    assert fxfuse.report(fused).fused
    assert_close(fused(X), model(X), "mixed", rtol=1e-6)
    assert_close(fused(X)[:, [0, 1, 3]], model(X)[:, [0, 1, 3]], "the float64 lanes")
    assert [net[0].weight.dtype for net in fused.nets] == [torch.float64, torch.float64, torch.float32, torch.float64]


def test_lanes_on_several_devices() -> None:
    class Model(Nets):
        def forward(self, x: Tensor) -> Tensor:
            outs = [net(x[:, i : i + 1].to(net[0].weight.device)) for i, net in enumerate(self.nets)]
            return torch.cat([out for out in outs if not out.is_meta], 1)

    model = randomized(Model())
    model.nets[2].to("meta")
    fused = fxfuse.optimize(model, X, objective="launches", tune=False)
    assert_close(fused(X), model(X), "the lanes on the CPU")
    assert [net[0].weight.device.type for net in fused.nets] == ["cpu", "cpu", "meta", "cpu"]


def test_integer_lanes() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps = nn.ParameterList(nn.Parameter(torch.tensor([i, 2 * i, 5]), requires_grad=False) for i in range(4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([(x * step // 3).clamp(min=1) % 7 for step in self.steps], 1)

    model, x = Counts(), torch.arange(12).view(4, 3)
    fused = fuse(model, x)
    for given in (x, x[:1], torch.arange(-30, 30).view(20, 3)):
        assert torch.equal(fused(given), model(given))
    assert not fxfuse.report(fused).fallbacks


def test_one_lane() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nets = nn.ModuleList([mlp()])

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([net(x[:, :1]) for net in self.nets], 1)

    refused(randomized(One()), "no loop over equal networks was found", line=False)


def test_a_thousand_lanes() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nets = nn.ModuleList(nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1)) for _ in range(1000))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)

    model, x = randomized(Many()), randn(3, 1000)
    fused = fuse(model, x)
    assert_equal_models(model, fused, [(randn(2, 1000, seed=5), {})])
    assert count(lambda: fused(x)).heavy == 2


@pytest.mark.parametrize("lanes", ["all", "one"])
def test_inference_mode_inside(lanes: str) -> None:
    class Model(Nets):
        def forward(self, x: Tensor) -> Tensor:
            outs = []
            for i, net in enumerate(self.nets):
                with torch.inference_mode(lanes == "all" or i == 0):
                    h = net[0](x[:, i : i + 1])
                outs.append(net[1:](h.clone()))
            return torch.cat(outs, 1)

    model = randomized(Model())
    fused = fuse(model)
    assert_equal_models(model, fused, [(randn(n, 4, seed=n), {}) for n in (5, 2)])


def test_a_lane_that_reads_another_lanes_output() -> None:
    class Model(Nets):
        def forward(self, x: Tensor) -> Tensor:
            outs: list[Tensor] = []
            for i, net in enumerate(self.nets):
                outs.append(net(x[:, i : i + 1] + (outs[-2] if i > 1 else 0)))
            return torch.cat(outs, 1)

    model = randomized(Model())
    fused = fuse(model)  # two chains of two: what does not depend on each other may run at once
    assert_equal_models(model, fused, [(randn(n, 4, seed=n), {}) for n in (5, 2)])


def test_a_parameter_replaced_in_forward() -> None:
    class Model(Nets):
        def forward(self, x: Tensor) -> Tensor:
            net = self.nets[0][2]
            net.weight = nn.Parameter(net.weight.detach() / net.weight.detach().norm())
            return super().forward(x)

    model = randomized(Model())
    fused = fuse(model)
    said = [str(refusal) for refusal in fxfuse.report(fused).refused]
    assert any("forward changes self.nets.0.2.weight" in text and "hazards.py:" in text for text in said), said
    for _ in range(2):
        assert_close(fused(X), model(X), "replaced")


def test_a_momentum_encoder_is_refused_by_the_name_of_what_it_writes() -> None:
    class Momentum(Nets):
        def __init__(self) -> None:
            super().__init__()
            self.slow = copy.deepcopy(self.nets).requires_grad_(False)

        @torch.no_grad()
        def follow(self) -> None:
            for fast, slow in zip(self.nets.parameters(), self.slow.parameters(), strict=True):
                slow.data.mul_(0.9).add_(fast.data, alpha=0.1)

        def forward(self, x: Tensor) -> Tensor:
            self.follow()
            with torch.no_grad():
                target = torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.slow)], 1)
            return super().forward(x) - target

    refused(randomized(Momentum()), "changes the parameter slow.0.0.weight in forward (mul_)")


@pytest.mark.parametrize("how", ["data", "copy_", "clamp_"])
def test_a_parameter_written_in_forward(how: str) -> None:
    class Model(Nets):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.nets[0][2].weight
            if how == "data":
                weight.data = weight.data.clamp(-0.1, 0.1)
            else:
                with torch.no_grad():
                    weight.copy_(weight / 2) if how == "copy_" else weight.clamp_(-0.1, 0.1)
            return super().forward(x)

    model = randomized(Model())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fused = fuse(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    said = [str(refusal) for refusal in fxfuse.report(fused).refused]
    reason = "sets the data of nets.0.2.weight (" if how == "data" else f"changes the parameter nets.0.2.weight in forward ({how}) ("
    assert any(text.startswith(f"{reason}test_hazards_modules.py:") for text in said), said
    for n in range(3):
        x = randn(4, 4, seed=n)
        assert_close(fused(x), model(x), f"call {n}")
    for name, tensor in fxfuse.original_state_dict(fused).items():
        assert_close(tensor, model.state_dict()[name], name)


def test_tensor_subclasses_as_inputs_and_weights() -> None:
    class Marked(Tensor):
        pass

    model = randomized(Nets())
    fused = fuse(model)
    x = X.clone().as_subclass(Marked)
    assert type(fused(x)) is type(model(x)) is Marked
    assert fxfuse.report(fused).fallbacks == {"input 0 is a Marked, recorded a plain tensor": 1}
    assert_close(fused(x).as_subclass(Tensor), model(x).as_subclass(Tensor), "a subclass")


def test_an_argument_that_the_caller_changes() -> None:
    """An object that is the same and yet another: its attributes are part of what was recorded."""
    class Settings:
        scale = 2.0

    class Model(Nets):
        def forward(self, x: Tensor, settings: Settings) -> Tensor:  # type: ignore[override]
            return super().forward(x) * settings.scale

    model, settings = randomized(Model()), Settings()
    fused = fxfuse.optimize(model, (X, settings), objective="launches", tune=False, validate=False)
    assert_close(fused(X, settings), model(X, settings), "as recorded")
    settings.scale = 3.0
    assert_close(fused(X, settings), model(X, settings), "changed")
    assert_close(fused(X, Settings()), model(X, Settings()), "another")


@pytest.mark.parametrize("kind", [dict, list])
def test_lists_and_dicts_of_numbers_as_arguments(kind: type) -> None:
    class Model(Nets):
        def forward(self, x: Tensor, scales: Any) -> Tensor:  # type: ignore[override]
            values = scales.values() if isinstance(scales, dict) else scales
            return super().forward(x) * torch.tensor([float(v) for v in values], dtype=x.dtype)

    def scales(*values: float) -> Any:
        return dict(zip("abcd", values, strict=True)) if kind is dict else list(values)

    model = randomized(Model())
    fused = fxfuse.optimize(model, (X, scales(1, 2, 3, 4)), objective="launches", tune=False, validate=False)
    given = scales(1, 2, 3, 4)
    assert_close(fused(X, given), model(X, given), "as recorded")
    assert not fxfuse.report(fused).fallbacks
    if kind is dict:
        given["b"] = 7
        turned = {key: given[key] for key in "dcba"}
        assert_close(fused(X, turned), model(X, turned), "another order")
    else:
        given[1] = 7
    assert_close(fused(X, given), model(X, given), "changed")


def test_second_entries_and_handled_keywords() -> None:
    class Model(Nets):
        def forward(self, x: Tensor, *, scale: float = 1.0, mask: Tensor | None = None) -> Tensor:
            out = super().forward(x) * scale
            return out if mask is None else out * mask

    model = randomized(Model())
    fused = fuse(model)
    mask = randn(5, 4) > 0
    for keywords, fast in (({}, True), ({"scale": 1.0}, True), ({"mask": None}, True), ({"scale": 2.0}, False), ({"mask": mask}, False)):
        before = sum(fxfuse.report(fused).fallbacks.values())
        assert_close(fused(X, **keywords), model(X, **keywords), str(keywords))
        assert (sum(fxfuse.report(fused).fallbacks.values()) == before) is fast, keywords


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("channels", [2, 6])
def test_a_shared_input_with_groups(bias: bool, channels: int) -> None:
    """Weights laid end to end would mix the groups of one lane with those of another."""
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv1d(4, channels, 3, groups=2, bias=bias) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([conv(x) for conv in self.convs], 1)

    handled(randomized(Model()), 1, randn(3, 4, 7))


def test_functional_dropout_with_the_flag_of_the_module() -> None:
    class Model(Nets):
        def forward(self, x: Tensor) -> Tensor:
            outs = [nn.functional.dropout(net(x[:, i : i + 1]), 1.0, training=self.training) for i, net in enumerate(self.nets)]
            return torch.cat(outs, 1)

    handled(randomized(Model()), 3)


TRANSFORMS = {
    "vmap beside the loop": lambda s, x: s.loop(x) + torch.vmap(lambda i: torch.where(i > 1, 1.0, torch.tensor(0.5)))(torch.arange(4)),
    "vmap of vmap": lambda s, x: s.loop(x) @ torch.vmap(torch.vmap(lambda a, b: (a >= b) & torch.tensor(True), (None, 0)), (0, None))(
        torch.arange(4), torch.arange(4)).double(),
    "vmap of the loop": lambda s, x: torch.vmap(lambda row: s.loop(row[None])[0])(x),
    "grad": lambda s, x: s.loop(x) + torch.func.grad(lambda y: (y**2).sum())(x),
    "jvp of the loop": lambda s, x: torch.func.jvp(s.loop, (x,), (torch.ones_like(x),))[1],
}  # fmt: skip


@pytest.mark.parametrize("what", TRANSFORMS)
def test_transforms_inside_of_forward(what: str) -> None:
    """Tensors of a transform are dead after it: nothing of what it runs is looked at later, and the call that runs it stays."""
    class Transformed(Nets):
        def loop(self, x):
            return super().forward(x)

        def forward(self, x):
            return TRANSFORMS[what](self, x)

    model = randomized(Transformed())
    refused(model, "runs inside a transform of torch.func (vmap, grad and their like)")
