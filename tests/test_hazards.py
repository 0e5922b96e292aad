"""One test for each hazard of fusing: it is handled, with the original's numbers, or refused in a sentence with a line.

fxfuse does not validate its result here (``validate=False``), so that a wrong rewrite shows.
"""

from __future__ import annotations

import collections

import pytest
import torch
import torch.nn.functional as F
from hazards import Nets, X, fuse, handled, mlp, refused
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import checks
import fxfuse
from checks import assert_close, assert_equal_models, own_gradients, randn, randomized
from fxfuse.launches import count

# -- weights ----------------------------------------------------------------------------------------------------------------------


def test_tied_lanes():
    model = Nets()
    model.nets[2] = model.nets[0]
    handled(randomized(model), 3)


def test_one_tied_weight_is_packed_once_and_trains_once():
    model = Nets()
    model.nets[2][2].weight = model.nets[0][2].weight
    fused = handled(randomized(model), 3)
    (recipe,) = [recipe for recipe in fxfuse.report(fused).fused[0].recipes if recipe.members[0] == "nets.0.2.weight"]
    assert recipe.members == ("nets.0.2.weight", "nets.1.2.weight", "nets.3.2.weight")
    with torch.no_grad():
        fused.nets[2][2].weight.add_(1.0)
    assert torch.equal(fused.nets[0][2].weight, model.nets[0][2].weight + 1.0)
    plain = fxfuse.unfuse(fused)
    assert plain.nets[2][2].weight is plain.nets[0][2].weight


def test_partly_frozen_lanes():
    model = randomized(Nets())
    model.nets[1].requires_grad_(False)
    model.nets[3][0].weight.requires_grad_(False)
    fused = handled(model, 7)
    assert not fused.nets[1][2].weight.requires_grad
    assert fused.nets[0][2].weight.requires_grad


def test_a_module_used_twice_and_outside_of_the_loop():
    class Twice(Nets):
        def forward(self, x):
            return super().forward(x) + self.nets[1](x[:, :1])

    handled(randomized(Twice()), 3)


def test_weight_norm():
    model = Nets()
    for net in model.nets:
        parametrizations.weight_norm(net[2])
    fused = handled(randomized(model), 3)
    plain = fxfuse.unfuse(fused)  # a parametrized module can be copied, but not pickled
    assert torch.equal(plain(X), model(X))


def test_own_parametrization():
    class Symmetric(nn.Module):
        def forward(self, w):
            return w.triu() + w.triu(1).T

    model = Nets()
    for net in model.nets:
        parametrize.register_parametrization(net[2], "weight", Symmetric())
    handled(randomized(model), 3)


def test_spectral_norm_writes_its_buffers_as_before():
    model = Nets()
    for net in model.nets:
        parametrizations.spectral_norm(net[2])
    fused = fuse(randomized(model))
    assert not [refusal for refusal in fxfuse.report(fused).refused if "fxfuse failed" in str(refusal)]
    for _ in range(2):
        assert_close(fused(X), model(X), "train")
    for name, buffer in model.named_buffers():
        assert_close(fxfuse.original_state_dict(fused)[name], buffer, name)
    assert_close(fused.eval()(X), model.eval()(X), "eval")


def test_parameters_with_attributes_keep_them():
    model = randomized(Nets())
    for parameter in model.parameters():
        parameter.no_weight_decay = True
    fused = handled(model, 3)
    assert all(parameter.no_weight_decay for parameter in fused.parameters())


def test_parameter_hooks_run_in_the_result_and_not_while_fusing():
    model, calls = randomized(Nets()), []
    model.nets[1][0].weight.register_hook(lambda grad: calls.append("gradient") or grad * 2)
    model.nets[2][0].weight.register_post_accumulate_grad_hook(lambda parameter: calls.append("accumulated"))
    fused = fuse(model, objective="time", tune=True, lowering="bmm")
    assert calls == []
    fused(X).sum().backward()
    assert sorted(calls) == ["accumulated", "gradient"]
    model(X).sum().backward()
    for name, grad in own_gradients(model).items():
        assert_close(fxfuse.weights.packing.original_gradients(fused)[name], grad, name)


def test_parameter_subclass():
    class Special(nn.Parameter):
        pass

    model = randomized(Nets())
    for net in model.nets:
        net[0].weight = Special(net[0].weight.detach().clone())
    fused = handled(model, 3)
    assert type(fused.nets[0][0].weight) is Special


def test_a_linear_with_its_own_forward():
    class Doubled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2 + x.mean()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.nets = nn.ModuleList(Doubled(1, 3) for _ in range(4))

        def forward(self, x):
            return torch.stack([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], -1)

    handled(randomized(Model()), 1)


def test_a_plain_list_of_modules_does_not_appear_in_parameters():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.nets = [mlp().double() for _ in range(4)]
            self.last = nn.Linear(4, 1)

        def forward(self, x):
            return self.last(torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1))

    model = Hidden().double()
    fused = handled(model, 4)
    assert [name for name, _ in fused.named_parameters()] == ["last.weight", "last.bias"]
    assert list(fused.state_dict()) == ["last.weight", "last.bias"]


# -- hooks on modules -------------------------------------------------------------------------------------------------------------


def test_a_forward_hook_that_changes_one_lane():
    model = randomized(Nets())
    model.nets[1].register_forward_hook(lambda module, inputs, output: output * 2)
    fused = handled(model, 6)
    assert any("nets.1" in str(refusal) and "hooks" in str(refusal) for refusal in fxfuse.report(fused).refused)


def test_hooks_run_once_per_call_and_not_while_tuning():
    model, calls = randomized(Nets()), collections.Counter()
    model.nets[3].register_forward_hook(lambda *args: calls.update(["forward"]))
    model.nets[3].register_full_backward_hook(lambda *args: calls.update(["backward"]))
    fused = fuse(model, objective="time", tune=True, lowering="bmm")
    assert not calls
    fused(X.clone().requires_grad_()).sum().backward()
    assert calls == {"forward": 1, "backward": 1}


def test_a_hook_registered_after_fusing():
    model = randomized(Nets())
    fused = fuse(model)
    for each in (model, fused):
        each.nets[2][0].register_forward_hook(lambda module, inputs, output: output + 1)
    assert_close(fused(X), model(X), "hook after fusing")
    assert "a hook was registered on a submodule" in fxfuse.report(fused).fallbacks


# -- what forward does --------------------------------------------------------------------------------------------------------------


def test_a_forward_that_needs_its_hooks_comes_back_with_the_reason():
    def forward(self, x):
        outputs = [net(x) for net in self.nets]
        if len(outputs) != len(self.seen):
            raise ValueError("what the layers gave was not noted")
        self.seen.clear()
        return torch.cat(outputs, 1)

    model = checks.model_of(forward, nets=nn.ModuleList(nn.Linear(4, 3) for _ in range(3)), seen=[]).double()
    for net in model.nets:
        net.register_forward_hook(lambda module, args, out: model.seen.append(out))
    fused = fxfuse.optimize(model, randn(5, 4), objective="launches")
    reason = "the forward raises ValueError: what the layers gave was not noted, without its hooks, which do not run while it is recorded"
    assert [str(refusal) for refusal in fxfuse.report(fused).refused] == [reason]


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad * 3


def test_custom_autograd_function():
    class Model(Nets):
        def forward(self, x):
            return torch.cat([net(StraightThrough.apply(net[0](x[:, i : i + 1]))[:, :1]) for i, net in enumerate(self.nets)], 1)

    refused(randomized(Model()), "custom autograd Function")


def test_no_grad_inside():
    class Model(Nets):
        def forward(self, x):
            outs = []
            for i, net in enumerate(self.nets):
                with torch.no_grad():
                    h = net[0](x[:, i : i + 1])
                outs.append(net[1:](h))
            return torch.cat(outs, 1)

    handled(randomized(Model()), 3)


def test_detach_inside():
    class Model(Nets):
        def forward(self, x):
            return torch.cat([net[1:](net[0](x[:, i : i + 1]).detach()) for i, net in enumerate(self.nets)], 1)

    handled(randomized(Model()), 3)


@pytest.mark.parametrize("use", ["zeros", "argmax", "shape", "detach"])
def test_a_lane_that_no_gradient_reaches_has_none(use):
    """Its weight is decayed by no optimizer: zeros for a gradient would train another model."""
    def forward(self, x):
        first, second, third = (net(x) for net in self.nets)
        if use == "zeros":
            extra = third[:, :0].new_zeros(x.shape[0], 2)
        elif use == "argmax":
            extra = third.argmax(1, keepdim=True).to(x.dtype)
        elif use == "shape":
            extra = torch.ones(third.shape[0], third.shape[1], dtype=x.dtype)
        else:
            extra = third.detach()
        return torch.cat([first, second.tanh(), extra], 1)

    model = checks.randomized(checks.model_of(forward, nets=nn.ModuleList(nn.Linear(4, 5) for _ in range(3))))
    expected = checks.run(model, checks.randn(6, 4), {}, checks.own_gradients)
    assert expected.parameters["nets.2.weight"] is None
    checks.assert_fused_equals(model, checks.randn(6, 4), most_heavy=2)


ONLY_COMPARED = {
    "hinge": lambda x, signs: F.hinge_embedding_loss(x, signs),
    "hinge of one tensor": lambda x, signs: F.hinge_embedding_loss(x, x) + (signs < 0).sum(),
    "cosine": lambda x, signs: F.cosine_embedding_loss(x, x * 2 + 1, signs[:, 0]),
    "greater": lambda x, signs: x.exp() * (signs > 0),
    "zeros like it": lambda x, signs: x.exp() + torch.zeros_like(signs.exp()),
    "rounded": lambda x, signs: x.exp() + signs.exp().argmax(1, keepdim=True),
}


@pytest.mark.parametrize("recorded", [True, False], ids=["with gradients", "without"])
@pytest.mark.parametrize("use", ONLY_COMPARED)
def test_an_input_that_no_gradient_reaches_has_none(use, recorded):
    """It would have zeros, if lanes of it lay in a pack with those of an input of the same shape that has one, and results another flag."""
    def forward(self, x, signs):
        return [ONLY_COMPARED[use](x[:, i], signs[:, i]) for i in range(3)]

    def inputs(first, second):
        x, signs = checks.randn(5, 3, 6), checks.randn(5, 3, 6).sign()
        return x.requires_grad_(first), signs.requires_grad_(second)

    model = checks.model_of(forward)
    fused = fxfuse.optimize(model, inputs(recorded, recorded), objective="launches", tune=False)
    assert fxfuse.report(fused).fused
    for given in (inputs(True, True), inputs(True, False)):
        torch.stack([out.sum() for out in fused(*given)]).sum().backward()
        x_grad, signs_grad = given[0].grad, given[1].grad
        expected = torch.autograd.grad(sum(out.sum() for out in model(*given)), given[0])[0]
        torch.testing.assert_close(x_grad, expected, rtol=1e-12, atol=1e-14)
        assert signs_grad is None
    given = inputs(False, True)
    assert [out.requires_grad for out in fused(*given)] == [out.requires_grad for out in model(*given)] == [False] * 3


def test_what_a_module_returns_and_nobody_uses_has_no_gradient():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.nets = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            first, second, third = (net(x) for net in self.nets)
            return first * second.tanh(), third

    def forward(self, x):
        if bool((x > 1e9).any()):
            return x
        for layer in self.layers:
            x, _ = layer(x)
        return x

    model = checks.randomized(checks.model_of(forward, layers=nn.ModuleList(Two() for _ in range(2))))
    x = checks.randn(6, 4)
    expected = checks.run(model, x, {}, checks.own_gradients)
    assert expected.parameters["layers.1.nets.2.weight"] is None
    fused = fxfuse.optimize(model, x, objective="launches", tune=False)
    assert len(fxfuse.report(fused).fused) == 2
    checks.assert_same_results(checks.run(fused, x, {}, fxfuse.weights.packing.original_gradients), expected, "two")


def test_branch_on_data():
    class Model(Nets):
        def forward(self, x):
            outs = []
            for i, net in enumerate(self.nets):
                h = net(x[:, i : i + 1])
                outs.append(h * 2 if h.sum() > 0 else h)
            return torch.cat(outs, 1)

    refused(randomized(Model()), "reads tensor data into Python (bool)")


def test_item():
    class Model(Nets):
        def forward(self, x):
            return super().forward(x) * x.max().item()

    refused(randomized(Model()), "its steps depend on the data")


class Routed(nn.Module):
    """The size of each expert's batch is up to the data."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 2) for _ in range(3))

    def forward(self, x):
        route = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
        out = torch.zeros(x.size(0), 2, dtype=x.dtype)
        for i, expert in enumerate(self.experts):
            mask = route == i
            out[mask] = expert(x[mask])
        return out


def test_boolean_masks():
    x = torch.tensor([[-1, -1, 1, 2], [1, -1, 2, 1], [1, 1, 3, 1], [1, 2, 1, 1]]).double()  # rows for each expert: 1, 1, 2
    fused = refused(randomized(Routed()), "whose size depends on the data", x)
    assert fused(randn(20, 4)).shape == (20, 2)


def test_masked_writes_are_no_masked_reads():
    class Model(Nets):
        def forward(self, x):
            out = torch.zeros_like(x)
            for i, net in enumerate(self.nets):
                h = net(x[:, i : i + 1])
                h[h < 0] = 0
                out[:, [i]] = h
            return out

    handled(randomized(Model()), 3)


def test_a_lane_that_reads_the_lane_before():
    class Model(Nets):
        def forward(self, x):
            outs, before = [], 0
            for i, net in enumerate(self.nets):
                before = net(x[:, i : i + 1] + before)
                outs.append(before)
            return torch.cat(outs, 1)

    refused(randomized(Model()), "no loop over equal networks was found", line=False)


def test_attributes_changed_in_forward():  # those that are only set: tests/test_attributes.py
    class Model(Nets):
        counter = 0

        def forward(self, x):
            out = super().forward(x)
            self.counter = self.counter + 1
            return out

    refused(randomized(Model()), "forward changes self.counter")


def test_buffers_changed_in_forward():
    class Model(Nets):
        def __init__(self):
            super().__init__()
            self.register_buffer("average", torch.zeros(4))

        def forward(self, x):
            out = super().forward(x)
            if self.training:
                self.average.mul_(0.9).add_(out.detach().mean(0), alpha=0.1)
            return out - self.average

    handled(randomized(Model()), 3)


def test_state_from_a_call_before():
    class Model(Nets):
        state = None

        def forward(self, x):
            out = super().forward(x)
            self.state = out if self.state is None else out + self.state.sum()
            return self.state

    model = randomized(Model())
    model(X)  # leaves a tensor with a history, at which copy.deepcopy raises
    fused = fuse(model)
    assert "forward changes self.state" in str(fxfuse.report(fused))


def test_train_override_that_freezes():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.nets = nn.ModuleList(nn.Sequential(nn.Linear(1, 5), nn.Dropout(0.5), nn.Linear(5, 1)) for _ in range(4))

        def train(self, mode=True):
            super().train(mode)
            for net in self.nets:
                net[1].eval()
            return self

        def forward(self, x):
            return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)

    handled(randomized(Model()), 2)


def test_lanes_in_different_modes():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.nets = nn.ModuleList(nn.Sequential(nn.Linear(1, 5), nn.Dropout(1.0), nn.Linear(5, 1)) for _ in range(4))

        def forward(self, x):
            return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)

    model = randomized(Model())
    model.nets[1].eval()
    fused = fuse(model)
    assert [module.training for module in fused.modules() if "Pack" not in type(module).__name__] == [m.training for m in model.modules()]
    assert_close(fused(X), model(X), "one lane in eval mode")  # dropout with p=1 gives zeros: there is nothing random
    for each in (model, fused):
        each.train()
        each.nets[3].eval()
    assert_close(fused(X), model(X), "another lane in eval mode")


def test_another_result_in_eval_mode():
    class Model(Nets):
        def forward(self, x):
            out = super().forward(x)
            return out if self.training else (out, out.softmax(-1))

    handled(randomized(Model()), 3)


# -- aliasing, in place -------------------------------------------------------------------------------------------------------------


def test_writes_after_a_lane_was_collected():
    class Model(Nets):
        def forward(self, x):
            outs = []
            for i, net in enumerate(self.nets):
                h = net[0](x[:, i : i + 1])
                outs.append(h)
                h += 1.0
            return torch.cat(outs, 1)

    handled(randomized(Model()), 1)


def test_writes_through_views_of_views():
    class Model(Nets):
        def forward(self, x):
            outs = []
            for i, net in enumerate(self.nets):
                h = net[0](x[:, i : i + 1]).clone()
                v = h.view(-1, 2, 3)
                v[:, 0] = 0.0
                v.transpose(1, 2)[:, 1, :] += 1
                outs.append(net[4](h))
            return torch.cat(outs, 1)

    handled(randomized(Model()), 2)


class Lanes(Nets):
    def forward(self, x):
        return [net(x[:, i : i + 1]) for i, net in enumerate(self.nets)]


def test_a_caller_writes_into_the_lanes_it_got():
    model = randomized(Lanes())
    fused = fuse(model)
    for each in (model, fused):
        lanes = each(X)
        lanes[0].view(-1).mul_(2)
        lanes[1].zero_()
        sum(lane.sum() for lane in lanes).backward()
    for name, grad in own_gradients(model).items():
        assert_close(fxfuse.weights.packing.original_gradients(fused)[name], grad, name)


def test_returned_lanes_have_the_strides_and_memory_of_their_own():
    model = randomized(Lanes())
    fused = fuse(model)
    with torch.no_grad():
        for got, want in zip(fused(X), model(X), strict=True):
            assert got.stride() == want.stride()
    lanes = fused(X)
    with torch.no_grad():
        lanes[0].fill_(7.0)
    assert_close(lanes[1], model(X)[1], "the lane next to one that was written")


@pytest.mark.parametrize(
    "x", [X.t().contiguous().t(), X[:1].expand(5, 4), X[:, :1].expand(5, 4), randn(10, 8)[::2, ::2], X.flip(0)],
    ids=["transposed", "broadcast rows", "broadcast columns", "strided", "flipped"],
)  # fmt: skip
def test_inputs_in_another_layout(x):
    model = randomized(Nets())
    fused = fuse(model)
    assert_equal_models(model, fused, [(x, {})])
    assert fused(x).stride() == model(x).stride()
    assert_equal_models(model, fuse(model, x), [(X, {}), (x, {})])


def test_channels_last():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(3, 2, 3) for _ in range(3))

        def forward(self, x):
            return torch.cat([conv(x) for conv in self.convs], 1)

    model = randomized(Model()).to(memory_format=torch.channels_last)
    fused = handled(model, 1, randn(2, 3, 6, 6))
    image = randn(2, 3, 6, 6, seed=5).to(memory_format=torch.channels_last)
    assert_close(fused(image), model(image), "channels_last")


# -- sizes, dtypes, modes of torch ----------------------------------------------------------------------------------------------------


def test_empty_batch():
    model = randomized(Nets())
    fused = fuse(model)
    out = fused(X[:0])
    assert out.shape == (0, 4)
    out.sum().backward()
    other = fuse(model, X[:0])  # as an example it tells little, but is no reason to fail
    assert not [refusal for refusal in fxfuse.report(other).refused if "fxfuse failed" in str(refusal)]
    assert_equal_models(model, other, [(X, {})])


def test_batch_of_one():
    model = randomized(Nets())
    assert_equal_models(model, fuse(model, X[:1]), [(X, {}), (X[:1], {})])


def test_squeeze_means_something_else_at_batch_one():
    class Model(Nets):
        def forward(self, x):
            return torch.stack([net(x[:, i : i + 1]).squeeze() for i, net in enumerate(self.nets)])

    model = randomized(Model())
    fused = handled(model, 3)
    assert fused(X[:1]).shape == model(X[:1]).shape == (4,)


def test_branch_on_the_batch_size():
    class Model(Nets):
        def forward(self, x):
            return super().forward(x) * (1 if x.shape[0] > 3 else 2)

    handled(randomized(Model()), 3, fallbacks=True)


@pytest.mark.parametrize("change", ["half", "double", "bfloat16"])
def test_another_dtype_stays_fused(change):
    model = randomized(Nets()).float()
    fused = fuse(model, X.float())
    model, fused = getattr(model, change)(), getattr(fused, change)()
    x = getattr(X, change)()
    assert_close(fused(x), model(x), change, rtol={"half": 2e-2, "double": 1e-10, "bfloat16": 1e-1}[change])
    assert not fxfuse.report(fused).fallbacks


def test_complex_lanes():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.nets = nn.ModuleList(nn.Linear(1, 2) for _ in range(4))

        def forward(self, x):
            return torch.stack([torch.fft.fft(net(x[:, i : i + 1]), dim=-1) for i, net in enumerate(self.nets)], 1).abs()

    handled(randomized(Model()), 1)


def test_a_complex_lane_that_leaves_alone():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.nets = nn.ModuleList(nn.Linear(1, 2) for _ in range(4))

        def forward(self, x):
            first, *rest = [torch.fft.fft(net(x[:, i : i + 1]), dim=-1) for i, net in enumerate(self.nets)]
            return first, torch.stack(rest)

    handled(randomized(Model()), 1)


def test_second_derivatives():
    model = randomized(Nets())
    seconds = []
    for each in (model, fuse(model)):
        x = X.clone().requires_grad_()
        (grad,) = torch.autograd.grad(torch.tanh(each(x)).pow(2).sum(), x, create_graph=True)
        grad.pow(2).sum().backward()
        seconds.append(x.grad)
    assert_close(seconds[1], seconds[0], "second derivative")


def test_functional_transforms():
    model = randomized(Nets())
    fused = fuse(model)
    jacobians = [torch.func.jacrev(lambda x, each=each: each(x).sum(0))(X) for each in (fused, model)]
    assert_close(*jacobians, "jacrev")
    rows = [torch.func.vmap(lambda row, each=each: each(row[None]))(X) for each in (fused, model)]
    assert_close(*rows, "vmap")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_fused_in_another_grad_mode(mode):
    model = randomized(Nets())
    with mode():
        fused = fuse(model, X.clone())
        assert fxfuse.report(fused).fused
        assert_close(fused(X), model(X), "no gradients")
    assert_equal_models(model, fused, [(X, {})])


def test_random_inputs_of_lanes_are_drawn_per_lane():
    class Model(Nets):
        def forward(self, x):
            return torch.stack([net[0](F.dropout(torch.ones_like(x[:, :1]), 0.5, self.training)) for net in self.nets])

    model = randomized(Model())
    with torch.no_grad():
        for net in model.nets:
            net[0].weight.fill_(1.0)
            net[0].bias.zero_()
    fused = fuse(model)
    assert fxfuse.report(fused).fused
    drawn = fused(randn(200, 4))[:, :, 0]
    assert set(drawn.unique().tolist()) == {0.0, 2.0}
    assert all((drawn[i] != drawn[j]).any() for i in range(4) for j in range(i))
    assert torch.equal(fused.eval()(X), model.eval()(X))


# -- wrong numbers that were once there -------------------------------------------------------------------------------------------------


def test_dims_that_do_not_count_those_of_the_first_argument():
    class Model(Nets):
        def forward(self, x):
            z = torch.empty(0, dtype=x.dtype)
            for i, net in enumerate(self.nets):
                h = net[0](x[:, i : i + 1])
                h = torch.diag_embed(h).sum(1).tile(1, 2) + torch.tensordot(h, torch.ones(6, 12, dtype=x.dtype), dims=1)
                z = torch.cat([z, h], dim=-1)
            return z

    model = randomized(Model())
    assert_equal_models(model, fuse(model), [(randn(n, 4, seed=n), {}) for n in (5, 2, 7)])


def test_a_loop_over_channels_keeps_their_number():
    """The forward also runs with more channels than it has lanes; to leave their number open would cost the join."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linears = nn.ModuleList(nn.Linear(6, 3) for _ in range(5))

        def forward(self, x):
            out = torch.zeros(x.size(0), 3, x.size(2), dtype=x.dtype)
            for i, linear in enumerate(self.linears):
                out[:, :, i] = linear(x[:, :, i])
            return out

    model, x = randomized(Model()), randn(3, 6, 5)
    fused = handled(model, 1, x)
    assert count(lambda: fused(x)).total <= 4
    wider = randn(3, 6, 8)
    assert_close(fused(wider), model(wider), "more channels than lanes")
