"""Where the weights are: packs that share memory with the Parameters, and everything that may happen to these afterwards."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import pytest
import torch
from compiling import assert_same_step, compiled, lie_together
from test_backend import nam, norms
from torch import nn

import fxfuse
from checks import model_of, randn, randomized
from fxfuse.dynamo.frozen_pack import FrozenPack
from fxfuse.graph import Recipe
from fxfuse.weights.shared import SharedPack

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
X = randn(5, 10)


def first_weights(model):
    return [net[0].weight for net in model.nets]


def same(call, model, x=X):
    with torch.no_grad():
        torch.testing.assert_close(call(x), model(x), rtol=1e-10, atol=1e-12)


def bound_model():
    model = nam()
    call, _ = compiled(model)
    assert_same_step(model, call, X)
    assert lie_together(*first_weights(model))
    return model, call


def test_parameters_stay_the_same_objects_with_the_same_strides():
    model = nam()
    before = {name: (id(p), p.shape, p.stride(), p.detach().clone()) for name, p in model.named_parameters()}
    call, _ = compiled(model)
    call(X)
    for name, p in model.named_parameters():
        identity, shape, stride, values = before[name]
        assert (id(p), p.shape, p.stride()) == (identity, shape, stride)
        assert torch.equal(p, values)
    assert lie_together(*first_weights(model))


def test_what_is_compiled_after_a_reset_shares_the_memory_again():
    model, _ = bound_model()
    torch._dynamo.reset()
    gc.collect()
    call, counting = compiled(model)
    assert_same_step(model, call, X)
    inputs = [node for node in counting.graphs[-1].graph.nodes if node.op == "placeholder"]
    assert len(inputs) < len(model.nets)  # packs, and not the weights of every lane


def test_a_model_that_nobody_holds_is_freed():
    model, call = bound_model()
    gone = weakref.ref(first_weights(model)[0])
    torch._dynamo.reset()
    del model, call
    gc.collect()
    assert gone() is None


def test_gradients_are_views_of_one():
    model, call = bound_model()
    call(X).sum().backward()
    assert lie_together(*(p.grad for p in first_weights(model)))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_training_with_an_optimizer_made_before(kind):
    model, twin = nam(), nam()
    optimizers = [kind(m.parameters(), lr=0.05) for m in (model, twin)]
    call, counting = compiled(model)
    for seed in range(5):
        x = randn(5, 10, seed=seed)
        for optimizer, forward in zip(optimizers, (call, twin)):
            optimizer.zero_grad()
            forward(x).square().sum().backward()
            optimizer.step()
    for (name, a), (_, b) in zip(model.named_parameters(), twin.named_parameters()):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=name)
    assert len(counting.graphs) == 1


def test_data_that_is_assigned():
    model, call = bound_model()
    model.nets[3][0].weight.data = randn(6, 1, seed=9)
    same(call, model)
    assert_same_step(model, call, X)
    model.nets[4][2].bias.data = model.nets[5][2].bias.data  # two Parameters in one memory
    assert_same_step(model, call, X)
    with torch.no_grad():
        model.nets[5][2].bias.add_(1)
    same(call, model)
    assert_same_step(model, call, X)


def test_data_that_is_transposed():
    """A square weight, transposed, begins at its old address."""
    model = randomized(model_of(_listed, heads=nn.ModuleList(nn.Linear(4, 4) for _ in range(9))))
    call, _ = compiled(model)
    x = randn(5, 4)
    assert_same_step(model, call, x)
    model.heads[2].weight.data = model.heads[2].weight.data.t()
    assert_same_step(model, call, x)


def _listed(self, x):
    return [head(x) for head in self.heads]


@pytest.mark.parametrize("freeze", [False, True])
def test_a_parameter_that_is_swapped(freeze):
    """torch swaps no tensor to which somebody refers, be it weakly."""
    model = nam()
    call, _ = compiled(model, freeze=freeze)
    assert_same_step(model, call, X)
    same(call, model)
    for p in model.parameters():
        p.grad = None
    gc.collect()
    torch.utils.swap_tensors(model.nets[0][0].weight, nn.Parameter(randn(*model.nets[0][0].weight.shape)))
    same(call, model)
    assert_same_step(model, call, X)


def test_a_model_that_is_cast_by_swapping():
    model, call = bound_model()
    for p in model.parameters():
        p.grad = None
    gc.collect()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to(torch.float32)
        out = call(X.float())
        torch.testing.assert_close(out, model(X.float()), rtol=1e-5, atol=1e-5)
        model.to(torch.float64)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert_same_step(model, call, X)


def test_frozen_packs_of_models_that_share_their_first_lane():
    one, two, three = nam(), randomized(nam(), seed=5), randomized(nam(), seed=6)
    for mine, theirs in zip(two.nets[0].parameters(), one.nets[0].parameters(), strict=True):
        mine.data = theirs.data  # the same memory
    three.nets[0] = one.nets[0]
    call, _ = compiled(lambda model, x: model(x), freeze=True)
    for model in (one, two, three, two, one):
        same(lambda x, model=model: call(model, x), model)
    two.nets[1], two.nets[2] = two.nets[2], two.nets[1]
    same(lambda x: call(two, x), two)


@pytest.mark.parametrize("kind", [FrozenPack, SharedPack])
def test_packs_of_models_that_are_gone_are_given_back(kind):
    """Once another model is called through the same graph; the frozen ones of a model that lives stay."""
    held = kind(Recipe("packed.w", ("a", "b"), (3, 2), (0, 1), "stack"))
    models = [[nn.Parameter(randn(3, 2)) for _ in range(2)] for _ in range(4)]
    memory = []
    with torch.no_grad():
        first = held.packed(models[0])
        for members in models[1:]:
            packed = held.packed(members)
            torch.testing.assert_close(packed, torch.stack(members), rtol=0, atol=0)
            memory.append(weakref.ref(packed.untyped_storage()))
            del packed
        del members, models[1:]
        gc.collect()
        assert all(each() is not None for each in memory)
        another = [nn.Parameter(randn(3, 2)) for _ in range(2)]
        torch.testing.assert_close(held.packed(another), torch.stack(another), rtol=0, atol=0)
        assert all(each() is None for each in memory)
        assert held.packed(models[0]) is first


def test_lanes_that_another_graph_packs_in_another_way():
    """What one graph packs, another does not take from it: else both would copy at every call."""
    model = nam()
    whole, _ = compiled(model)
    assert_same_step(model, whole, X)
    where = [p.data_ptr() for p in model.parameters()]
    half, _ = compiled(lambda x: torch.stack([net(x[:, i : i + 1]) for i, net in enumerate(model.nets[:4])]))
    with torch.no_grad():
        expected = torch.stack([net(X[:, i : i + 1]) for i, net in enumerate(model.nets[:4])])
        torch.testing.assert_close(half(X), expected, rtol=1e-10, atol=1e-12)
    assert_same_step(model, whole, X)
    assert [p.data_ptr() for p in model.parameters()] == where


def test_a_parameter_that_is_replaced():
    model, call = bound_model()
    model.nets[3][0].weight = nn.Parameter(randn(6, 1, seed=9))
    same(call, model)
    assert_same_step(model, call, X)


@pytest.mark.parametrize("assign", [False, True])
def test_state_that_is_loaded(assign):
    model, call = bound_model()
    other = randomized(nam(), seed=4)
    model.load_state_dict(other.state_dict(), assign=assign)
    same(call, model)
    model.requires_grad_()
    assert_same_step(model, call, X)


def test_a_model_that_is_cast_and_back():
    model, call = bound_model()
    model.float()
    torch.testing.assert_close(call(X.float()), model(X.float()), rtol=1e-5, atol=1e-5)
    model.double()
    assert_same_step(model, call, X)


def test_lanes_that_are_frozen_afterwards():
    model, call = bound_model()
    for p in model.nets[0].parameters():
        p.requires_grad_(False)
    assert_same_step(model, call, X)


def test_weights_that_somebody_holds_stay_where_they_are():
    model = nam()
    held = model.state_dict()
    call, _ = compiled(model)
    assert_same_step(model, call, X)
    assert not lie_together(*first_weights(model))
    with torch.no_grad():
        model.nets[0][0].weight.add_(1)
    assert torch.equal(held["nets.0.0.weight"], model.nets[0][0].weight)
    assert_same_step(model, call, X)


def test_weights_that_somebody_holds_at_the_first_call_only():
    model = nam()
    call, _ = compiled(model)
    held = []
    torch.compile(model, backend=fxfuse.backend("eager"))  # no call, no graph
    call(X)
    held.append(model.state_dict())
    model.nets[3][0].weight.data = randn(6, 1, seed=9)
    kept = model.nets[3][0].weight.detach()
    same(call, model)
    with torch.no_grad():
        kept.mul_(2)
    same(call, model)


def test_a_write_between_forward_and_backward_is_found():
    for fused in (False, True):
        model = nam()
        call = compiled(model)[0] if fused else model
        x = X.clone().requires_grad_()
        out = call(x)
        with torch.no_grad():
            model.nets[2][2].weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_a_write_after_forward_and_backward_of_another_call_is_fine():
    model = nam()
    call, _ = compiled(model)
    x = X.clone().requires_grad_()
    first = call(x)
    first.sum().backward()
    with torch.no_grad():
        model.nets[2][2].weight.mul_(2)
    assert_same_step(model, call, X)


def test_two_models_of_one_class():
    models = [nam(), randomized(nam(), seed=5)]
    calls = [compiled(model)[0] for model in models]
    for _ in range(2):
        for model, call in zip(models, calls):
            assert_same_step(model, call, X)


def test_one_compiled_function_of_two_models():
    models = [nam(), randomized(nam(), seed=5)]
    call, _ = compiled(lambda model, x: model(x))
    for _ in range(3):
        for model in models:
            assert_same_step(model, lambda x, model=model: call(model, x), X)
    assert all(lie_together(*first_weights(model)) for model in models)
    copied = copy.deepcopy(models[0])
    assert_same_step(copied, lambda x: call(copied, x), X)


def test_train_and_eval_share_one_buffer():
    model = norms(9)
    call, counting = compiled(model)
    x = randn(5, 4)
    assert_same_step(model, call, x)
    where = [p.data_ptr() for p in model.parameters()]
    for training in (False, True, False):
        model.train(training)
        assert_same_step(model, call, x)
    assert [p.data_ptr() for p in model.parameters()] == where
    assert len(counting.graphs) == 2
    for graph in counting.graphs:  # neither stacks the weights
        assert not graph.graph.find_nodes(op="call_function", target=torch.stack)


def test_frozen_packs_are_made_once_and_only_without_gradients():
    model = nam()
    call, _ = compiled(model, freeze=True)
    assert_same_step(model, call, X)
    with torch.no_grad():
        expected = model(X)
        torch.testing.assert_close(call(X), expected, rtol=1e-10, atol=1e-12)
        model.nets[0][0].weight.add_(1)
        torch.testing.assert_close(call(X), expected, rtol=1e-10, atol=1e-12)  # as asked
    assert_same_step(model, call, X)


def test_frozen_packs_of_two_models_through_one_graph():
    models = [nam(), randomized(nam(), seed=5)]
    call, _ = compiled(lambda model, x: model(x), freeze=True)
    with torch.no_grad():
        for model in (*models, *models):
            torch.testing.assert_close(call(model, X), model(X), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tune", [False, True])
def test_gradient_hooks_of_parameters_run(tune):
    """Theirs, in the user's backward alone: not in what is timed."""
    model = nam()
    seen = []
    model.nets[1][0].weight.register_hook(lambda grad: seen.append("hook") or grad * 2)
    model.nets[1][0].weight.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    call, _ = compiled(model, tune=tune)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on a busy machine the loop may win
        call(X).sum().backward()
    doubled = model.nets[1][0].weight.grad.clone()
    assert seen == ["hook", "accumulated"]
    twin = copy.deepcopy(nam())
    twin(X).sum().backward()
    torch.testing.assert_close(doubled, twin.nets[1][0].weight.grad * 2, rtol=1e-10, atol=1e-12)


def test_frozen_weights_that_were_written_before_a_forward():
    """With a gradient for the input alone: what was written before is no write between forward and backward."""
    model, call = bound_model()
    model.requires_grad_(False)
    for seed in range(3):
        with torch.no_grad():
            model.nets[2][2].weight.copy_(randn(1, 6, seed=seed))
        x, twin = X.clone().requires_grad_(), X.clone().requires_grad_()
        call(x).square().sum().backward()
        model(twin).square().sum().backward()
        torch.testing.assert_close(x.grad, twin.grad, rtol=1e-10, atol=1e-12)
    x = X.clone().requires_grad_()
    out = call(x)
    with torch.no_grad():
        model.nets[2][2].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.square().sum().backward()


def shared_inputs(counting):
    """Does the last graph take packs, and stack nothing?"""
    graph = counting.graphs[-1].graph
    return not graph.find_nodes(op="call_function", target=torch.stack) and len(graph.find_nodes(op="placeholder")) < 10


def test_packs_stay_shared_while_requires_grad_and_modes_change(monkeypatch):
    model = nam()
    call, counting = compiled(model)
    assert_same_step(model, call, X)
    monkeypatch.setattr("fxfuse.weights.shared.pack", lambda *args: pytest.fail("stacked"))
    for requires_grad in (False, True, False):
        model.requires_grad_(requires_grad)
        assert_same_step(model, call, X)
        for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
            with context:
                torch.testing.assert_close(call(X), model(X), rtol=1e-10, atol=1e-12)
        assert shared_inputs(counting)


def _tables(self, words):
    return torch.cat([table(words[:, i]) for i, table in enumerate(self.tables)], 1)


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (nam(), X),
        (model_of(_tables, tables=nn.ModuleList(nn.Embedding(5 + i, 3) for i in range(9))), torch.arange(18).view(2, 9) % 5),
    ],
    ids=["stacked", "rows"],
)
def test_the_packed_tensor_is_the_members_memory_and_reaches_them(model, inputs, monkeypatch):
    """Forward copies nothing, and every member gets its own slice of the gradient."""
    model = randomized(model)
    seen = []
    aliased = fxfuse.weights.shared._aliased

    def watching(buffer, recipe, members):
        seen.append((buffer, aliased(buffer, recipe, members)))
        return seen[-1][1]

    monkeypatch.setattr("fxfuse.weights.shared._aliased", watching)
    call, _ = compiled(model)
    for _ in range(2):
        assert_same_step(model, call, inputs)
    for buffer, packed in seen:
        assert packed.data_ptr() == buffer.data_ptr()
        assert packed.requires_grad
    assert len(seen) >= 2


def test_gradients_of_gradients():
    model, call = bound_model()
    twin = copy.deepcopy(model)
    second = []
    for m, forward in ((model, call), (twin, twin)):
        x = X.clone().requires_grad_()
        (first,) = torch.autograd.grad(forward(x).square().sum(), x, create_graph=True)
        second.append([first, *torch.autograd.grad(first.square().sum(), list(m.parameters()), allow_unused=True, materialize_grads=True)])
    for a, b in zip(*second):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_a_lane_that_is_replaced_keeps_its_statistics(monkeypatch):
    """Where the pack is made anew, and where somebody holds the old memory so that it is a copy at every call."""
    for hold in (False, True):
        torch._dynamo.reset()
        model = norms(9)
        x = randn(5, 4)
        call, counting = compiled(model)
        assert_same_step(model, call, x)
        held = [b.detach() for b in model.buffers()] if hold else []
        model.nets[1] = randomized(norms(1), seed=7).nets[0]
        for _ in range(3):
            assert_same_step(model, call, x)
        together = lie_together(*(net[1].running_mean for net in model.nets))
        assert together is not hold
        assert shared_inputs(counting)
        assert len(held) in (0, 27)


def test_packs_are_made_anew_as_often_as_the_weights_go_elsewhere(monkeypatch):
    model, call = bound_model()
    for seed in range(20):
        model.nets[3][0].weight = nn.Parameter(randn(6, 1, seed=seed))
        same(call, model)
    monkeypatch.setattr("fxfuse.weights.shared.pack", lambda *args: pytest.fail("stacked"))
    assert_same_step(model, call, X)
