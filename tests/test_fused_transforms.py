"""Regions planned by hand, in the hands of torch: their graphs, torch.compile, torch.export, torch.func; threads and gradient modes."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from hand_built import FeatureNets, feature_plan, randomize
from hand_installed import CLOSE, data, pair
from torch import Tensor, nn

from fxfuse import fused
from fxfuse.running import install
from fxfuse.weights import packing


def test_graphs_print_and_share_the_tensors() -> None:
    _, model = pair()
    graph = fused.graphs(model)["core"]
    assert isinstance(graph, torch.fx.GraphModule)
    assert "torch.baddbmm" in graph.print_readable(print_output=False)
    y = data()
    assert torch.equal(graph(y)[0], model.core(y))
    packed = model.core.packed.nets.get_submodule("0").weight
    assert any(p is packed for p in graph.parameters())
    model.core.nets[0].train(False)
    assert fused.graphs(model) == {}


@pytest.mark.parametrize("how", ["packed", "alias"])
def test_torch_compile_takes_the_whole_model(how: str) -> None:
    torch._dynamo.reset()
    original, model = pair(packing=how)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for n in (6, 3):
        x = data(n)
        torch.testing.assert_close(compiled(x), original(x), **CLOSE)
    x = data()
    for m in (compiled, original):
        (m(x) - 1).pow(3).sum().backward()
    for name, grad in packing.original_gradients(model).items():
        torch.testing.assert_close(grad, original.get_parameter(name).grad, **CLOSE)
    for mode in (False, True):  # the flags choose another program
        for m in (model, original):
            m.train(mode)
        torch.testing.assert_close(compiled(x), original(x), **CLOSE)


def test_torch_compile_takes_what_falls_back() -> None:
    torch._dynamo.reset()
    original, model = pair(strict=False)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x = data()
    for m in (original, model):
        m.core.nets[1][1] = nn.Tanh()
    torch.testing.assert_close(compiled(x), original(x), **CLOSE)


def test_torch_export_exports_the_packed_program() -> None:
    original, model = pair()
    original.eval(), model.eval()
    exported = torch.export.export(model, (data(),), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    x = data(9)
    torch.testing.assert_close(exported.module()(x), original(x), **CLOSE)
    assert sum(str(node.target) == "aten.bmm.default" for node in exported.graph.nodes) == 2


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own, at its first jvp
def test_function_transforms_work() -> None:
    original, model = pair()
    for m in (original, model):
        m.eval()
    x, v = data(), data()
    torch.testing.assert_close(torch.func.vmap(model)(x[:, None]), original(x)[:, None], **CLOSE)
    got, expected = (torch.func.jvp(m, (x,), (v,)) for m in (model, original))
    torch.testing.assert_close(got, expected, **CLOSE)
    params = {name: p.detach() * 2 for name, p in model.named_parameters()}
    doubled = copy.deepcopy(original)
    with torch.no_grad():
        for p in doubled.parameters():
            p.mul_(2)
    torch.testing.assert_close(torch.func.functional_call(model, params, (x,)), doubled(x), **CLOSE)


def test_threads_do_not_share_views() -> None:
    original, model = pair(strict=False)
    model.core.nets[0].register_forward_hook(lambda *_: None)
    for m in (original, model):
        m.eval()
    x = data()
    expected, results = original(x), []

    def work() -> None:
        for _ in range(20):
            out = model(x)
            out.sum().backward()
            results.append(torch.allclose(out, expected, **CLOSE))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 60


def test_views_made_without_grad_are_not_reused_with_grad() -> None:
    class Target(FeatureNets):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                frozen = super().forward(x)
            return super().forward(x) + frozen

    original = randomize(Target().double())
    model = install.install(copy.deepcopy(original), [feature_plan(path="")])
    model.nets[0].register_forward_hook(lambda *_: None)
    x = data()
    for m in (original, model):
        m(x).sum().backward()
    for name, grad in packing.original_gradients(model).items():
        torch.testing.assert_close(grad, original.get_parameter(name).grad, **CLOSE)
