"""Lanes in chunks: the same numbers, less memory, the same checkpoints, in train and eval mode."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import checks
import fxfuse
from fxfuse.passes.bundle import find_bundles
from fxfuse.passes.chunk import fitting_chunks, in_chunks
from fxfuse.planning.choice import Choice
from fxfuse.planning.memory import peak_bytes
from fxfuse.planning.plan import Planner


class FeatureNets(nn.Module):
    def __init__(self, lanes: int, hidden: int = 16) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 1))
                                  for _ in range(lanes))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)


class LayerMajor(nn.Module):
    """All lanes layer by layer: in chunks the order of the program is another."""

    def __init__(self, lanes: int) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Linear(3, 16) for _ in range(lanes))
        self.second = nn.ModuleList(nn.Linear(16, 2) for _ in range(lanes))

    def forward(self, x: Tensor) -> Tensor:
        hidden = [torch.relu(layer(x)) for layer in self.first]
        return torch.stack([layer(h) for layer, h in zip(self.second, hidden, strict=True)]).sum(0)


class GrowingCat(nn.Module):
    """Seed 004: one convolution over every channel, results concatenated one by one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.conv = nn.Conv1d(1, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.conv(x[:, 0].view(x.shape[0], 1, -1)))
        for i in range(1, self.channels):
            z = torch.cat([z, torch.tanh(self.conv(x[:, i].view(x.shape[0], 1, -1)))], 1)
        return z


class SharedNetwork(nn.Module):
    """One network of two convolutions over every channel: wide inside, narrow at the join."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(1, 16, 3, padding=1), nn.Tanh(), nn.Conv1d(16, 1, 3))
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.net(x[:, i : i + 1]) for i in range(self.channels)], 1)


class Dropping(FeatureNets):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.dropout(super().forward(x), 0.5, self.training)


class Attentions(nn.Module):
    """Three products of a lane, alike in all lanes, are one bundle."""

    def __init__(self, lanes: int, width: int = 32) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.ModuleList(nn.Linear(1, width) for _ in range(3)) for _ in range(lanes))

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for i, (q, k, v) in enumerate(self.nets):
            lane = x[..., i : i + 1]
            outputs.append(torch.nn.functional.scaled_dot_product_attention(q(lane), k(lane), v(lane)).mean(1))
        return sum(outputs)


class Gated(nn.Module):
    """Two layers of a lane are in one bundle."""

    def __init__(self, lanes: int, width: int = 32) -> None:
        super().__init__()
        self.values, self.gates = (nn.ModuleList(nn.Linear(2, width) for _ in range(lanes)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        pairs = zip(self.values, self.gates, strict=True)
        return sum((value(x[:, i]) * torch.sigmoid(gate(x[:, i]))).mean(-1) for i, (value, gate) in enumerate(pairs))


class Neighbours(nn.Module):
    """Every lane reads its neighbour's first layer, too: no cut keeps lanes to themselves."""

    def __init__(self, lanes: int, width: int = 16) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Linear(1, width) for _ in range(lanes))
        self.second = nn.ModuleList(nn.Linear(width, 2) for _ in range(lanes))

    def forward(self, x: Tensor) -> Tensor:
        hidden = [torch.tanh(layer(x[:, i : i + 1])) for i, layer in enumerate(self.first)]
        return torch.cat([layer(hidden[i] + hidden[i - 1]) for i, layer in enumerate(self.second)], 1)


def chunks_of(fused: nn.Module) -> set[str]:
    return {op.lowering.rpartition(", ")[2] for plan in fxfuse.report(fused).fused for op in plan.ops}


def forward_peak(model: nn.Module, x: Tensor) -> int:
    def run() -> Tensor:
        with torch.no_grad():
            return model(x)

    run()
    return peak_bytes(run)


@pytest.mark.parametrize(("model", "shape"), [
    (FeatureNets(12), (64, 12)), (FeatureNets(13), (64, 13)), (LayerMajor(12), (64, 3)), (SharedNetwork(12), (8, 12, 40)),
], ids=["networks", "uneven", "layer-major", "shared"])  # fmt: skip
def test_max_memory_is_kept_by_chunks(model: nn.Module, shape: tuple[int, ...]) -> None:
    model, x = model.double(), torch.randn(shape, dtype=torch.float64)
    whole = fxfuse.optimize(model, x, mode="infer", tune=False, validate=False, objective="launches")
    assert chunks_of(whole).isdisjoint({"2 chunks", "3 chunks", "4 chunks"})
    limit = int(0.75 * forward_peak(whole, x))
    fused = checks.assert_fused_equals(model, x, mode="infer", tune=False, max_memory=limit)
    assert any(name.endswith("chunks") for name in chunks_of(fused))
    assert forward_peak(fused, x) <= limit


@pytest.mark.parametrize(("model", "shape"), [(Attentions(12), (16, 5, 12)), (Gated(12), (64, 12, 2))], ids=["attention", "gates"])
def test_all_products_of_a_lane_are_in_its_chunk(model: nn.Module, shape: tuple[int, ...]) -> None:
    model, x = model.double(), torch.randn(shape, dtype=torch.float64)
    whole = fxfuse.optimize(model, x, mode="infer", tune=False, validate=False, objective="launches")
    loop = forward_peak(model, x)
    assert forward_peak(whole, x) > 3 * loop
    fused = checks.assert_fused_equals(model, x, mode="infer", tune=False, max_memory=2 * loop)
    assert forward_peak(fused, x) <= 2 * loop


@pytest.mark.parametrize("count", [2, 3, 5, 12])
@pytest.mark.parametrize(("model", "shape"), [(Attentions(12), (16, 5, 12)), (Gated(12), (64, 12, 2)), (Neighbours(12), (16, 12))],
                         ids=["attention", "gates", "neighbours"])  # fmt: skip
def test_any_number_of_chunks_computes_the_same(
    count: int, model: nn.Module, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Planner, "_searched", lambda self: Choice(self.emit({}, count), {}, count))
    fused = checks.assert_fused_equals(model.double(), torch.randn(shape, dtype=torch.float64), cache=False)
    assert f"{count} chunks" in chunks_of(fused), chunks_of(fused)


def test_growing_cat_needs_no_more_memory_than_the_loop() -> None:
    model, x = GrowingCat(24).eval(), torch.randn(8, 24, 64)
    loop = forward_peak(model, x)
    fused = fxfuse.optimize(model, x, mode="infer", tune=False, max_memory=loop)
    assert fxfuse.report(fused).fused, fxfuse.report(fused)
    assert forward_peak(fused, x) <= loop


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_chunks_train_and_save_as_the_original(mode: str) -> None:
    model, x = FeatureNets(11).double(), torch.randn(32, 11, dtype=torch.float64)
    whole = fxfuse.optimize(model, x, mode=mode, tune=False, validate=False)
    used = peak_bytes(lambda: whole(x).sum().backward())
    fused = fxfuse.optimize(model, x, mode=mode, tune=False, max_memory=int(0.9 * used))
    assert fxfuse.report(fused).fused, fxfuse.report(fused)
    assert fxfuse.original_state_dict(fused).keys() == model.state_dict().keys()
    for name, tensor in fxfuse.original_state_dict(fused).items():
        assert torch.equal(tensor, model.state_dict()[name])
    steps = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, fused)]
    for _ in range(3):
        for each, optimizer in zip((model, fused), steps, strict=True):
            optimizer.zero_grad()
            each(x).pow(2).sum().backward()
            optimizer.step()
    torch.testing.assert_close(fused(x), model(x), rtol=1e-10, atol=1e-12)
    fused.load_state_dict(model.state_dict())
    torch.testing.assert_close(fused(x), model(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(fxfuse.unfuse(fused)(x), model(x))


def test_both_modes_are_cut_alike() -> None:
    model, x = Dropping(12), torch.randn(64, 12)
    whole = forward_peak(fxfuse.optimize(model, x, mode="infer", tune=False, validate=False).eval(), x)
    fused = fxfuse.optimize(model, x, mode="infer", tune=False, max_memory=int(0.75 * whole))
    assert fxfuse.report(fused).fused, fxfuse.report(fused)
    fused.train()(x)
    fused.eval()(x)
    assert not fxfuse.report(fused).fallbacks


def test_memory_that_no_number_of_chunks_keeps_leaves_the_loop() -> None:
    model, x = FeatureNets(12), torch.randn(64, 12)
    fused = fxfuse.optimize(model, x, mode="infer", tune=False, max_memory=100)
    (refusal,) = fxfuse.report(fused).refused
    assert "in any number of chunks; max_memory allows 100" in str(refusal)
    assert torch.equal(fused(x), model(x))


def test_chunks_keep_members_and_order() -> None:
    from fxfuse.functional import sum_of
    from fxfuse.ops import canonical
    from fxfuse.passes.joins import SUM_OF

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    meta = {"dyn": frozenset(), "dtype": torch.float32, "device": torch.device("cpu")}
    x.meta.update(meta, shape=(7, 4))
    select, tanh = canonical(torch.select, (torch.empty(7, 4), 0, 0), {})[0], canonical(torch.tanh, (torch.empty(4),), {})[0]
    lanes = []
    for i in range(7):
        lane = graph.call_function(select, (x, 0, i))
        lanes.append(graph.call_function(tanh, (lane,)))
        lane.meta.update(meta, shape=(4,))
        lanes[-1].meta.update(meta, shape=(4,))
    total = graph.call_function(SUM_OF, (lanes,))
    total.meta.update(meta, shape=(4,))
    graph.output([total])
    assert sum_of is SUM_OF.func
    whole = find_bundles(graph, lambda b: b.name in ("tanh", "select"), lambda b: b.name == "select", 2)
    cut = in_chunks(whole, 3)
    parts = [[n for n in bundle.members] for bundle in cut.classes if bundle.name == "tanh"]
    assert [len(part) for part in parts] == [2, 2, 3]
    assert [n for part in parts for n in part] == lanes
    assert all(cut.position[n] == part.index(n) for part in parts for n in part)
    assert fitting_chunks(whole, limit=7 * 16 // 2) == 2
    assert in_chunks(whole, 1) is whole
