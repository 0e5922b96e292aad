"""What ``test_shard_lanes.py`` runs on several processes: ``lanes_worker.py PHASE FOLDER``. Raises where anything differs.

Every process makes the same models; the reference trains in one process, as a loop.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
import re
import sys
from types import SimpleNamespace
from typing import Any

import distributed_worker as worker
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fxfuse
from fxfuse.distributed.traffic import traffic
from fxfuse.fused import regions
from fxfuse.lane_parallel import dividing, placing, rehearsal
from fxfuse.lane_parallel import shard_lanes as shard_module
from fxfuse.models.determinism import preserved_state
from fxfuse.passes.shard import PartWriter
from fxfuse.weights.packing import original_gradients

ROWS = 8


class Additive(nn.Module):
    """Networks per column; ``join`` is how they come together."""

    def __init__(self, lanes: int, join: str) -> None:
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(lanes)
        )
        self.head = nn.Linear(2 * lanes if join == "cat" else 2, 2)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        outs = [net(x[:, i : i + 1]) for i, net in enumerate(self.nets)]
        if self.join == "cat":
            return self.head(torch.cat(outs, 1))
        return self.head(torch.stack(outs, 1).sum(1) if self.join == "stack" else sum(outs))


class Images(nn.Module):
    """Convolutions of one image with BatchNorm, embeddings of columns, then a second stage of lanes on both. (Before BatchNorm the gradient
    of a bias is rounding alone: there are none.)"""

    def __init__(self, lanes: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Sequential(nn.Conv1d(2, 4, 3, bias=False), nn.BatchNorm1d(4), nn.ReLU()) for _ in range(lanes))
        self.tables = nn.ModuleList(nn.Embedding(7, 3) for _ in range(lanes))
        self.experts = nn.ModuleList(nn.Sequential(nn.LayerNorm(lanes * 7), nn.Linear(lanes * 7, 5), nn.GELU()) for _ in range(lanes))
        self.gate = nn.Linear(2, lanes)
        self.out = nn.Linear(5, 2)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        image = x[:, :6].unflatten(1, (2, 3))
        h = torch.cat([conv(image).mean(2) for conv in self.convs] + [table(ids[:, i]) for i, table in enumerate(self.tables)], 1)
        gates = self.gate(x[:, :2]).softmax(1)
        return self.out(torch.stack([expert(h) * gates[:, i : i + 1] for i, expert in enumerate(self.experts)], 1).sum(1))


class Attention(nn.Module):
    """Lanes of attention, which lie in one dim with the rows while they attend. (The gradient of a bias of keys is rounding alone.)"""

    def __init__(self, lanes: int) -> None:
        super().__init__()
        self.attend = nn.ModuleList(nn.MultiheadAttention(2, 2, bias=False, batch_first=True) for _ in range(lanes))
        self.out = nn.ModuleList(nn.Linear(2, 2) for _ in range(lanes))

    def forward(self, x: Tensor) -> Tensor:
        h = x[:, :6].unflatten(1, (3, 2))
        return sum(out(attend(h, h, h, need_weights=False)[0].mean(1)) for attend, out in zip(self.attend, self.out, strict=True))


def build(kind: str, lanes: int) -> nn.Module:
    torch.manual_seed(0)
    made = {"images": Images, "ragged": Ragged, "attention": Attention}.get(kind)
    return (Additive(lanes, kind) if made is None else made(lanes)).double()


def batch(lanes: int, kind: str, rows: int = ROWS) -> tuple[tuple[Tensor, ...], Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, max(lanes, 6), generator=generator, dtype=torch.float64)
    y = torch.randn(rows, 2, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, 7, (rows, lanes), generator=generator)
    return ((x, ids) if kind in ("images", "ragged") else (x,)), y


def fused(kind: str, lanes: int) -> nn.Module:
    made = fxfuse.optimize(build(kind, lanes), batch(lanes, kind)[0], objective="launches", tune=False, validate=False)
    assert fxfuse.report(made).fused
    return made


def trained(model: nn.Module, optimizer: str, inputs: tuple[Tensor, ...], y: Tensor, steps: int = 4) -> nn.Module:
    stepping = worker.OPTIMIZERS[optimizer](model.parameters())
    for _ in range(steps):
        stepping.zero_grad()
        (model(*inputs) - y).square().mean().backward()
        stepping.step()
    return model


def input_gradient(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    x = inputs[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x, *inputs[1:]).square().sum(), x)
    return gradient


def compared(kind: str, lanes: int, expect_sharded: bool = True) -> None:
    """Training, inference, input gradients, gradients by name."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    inputs, y = batch(lanes, kind)
    for optimizer in worker.OPTIMIZERS:
        what = f"{kind}, {lanes} lanes, {optimizer}"
        plain, model = build(kind, lanes), fxfuse.shard_lanes(fused(kind, lanes), mesh)
        (state,) = regions(model).values()
        assert bool(state.sharding.sharded) is expect_sharded, what
        assert "over processes" in str(fxfuse.report(model)) or not expect_sharded
        trained(plain, optimizer, inputs, y)
        trained(model, optimizer, inputs, y)
        assert not fxfuse.report(model).fallbacks, fxfuse.report(model).fallbacks
        worker.assert_same(dict(fxfuse.original_state_dict(model)), dict(plain.state_dict()), what)
        gradients = {name: grad for name, grad in original_gradients(model).items() if grad is not None}
        worker.assert_same(gradients, {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}, what)
        worker.assert_same({"x": input_gradient(model, inputs)}, {"x": input_gradient(plain, inputs)}, what)
        plain.eval(), model.eval()
        with torch.no_grad():
            for rows in (ROWS, 3):
                some = batch(lanes, kind, rows)[0]
                worker.assert_same({"y": model(*some)}, {"y": plain(*some)}, f"{what}, eval")
        assert not fxfuse.report(model).fallbacks, fxfuse.report(model).fallbacks


def train(folder: str) -> None:
    world = dist.get_world_size()
    for kind in ("cat", "stack", "sum", "images", "attention"):
        if kind == "attention" and world > 2:
            compared(kind, 2 * world)
            continue
        for lanes in (2 * world, 2 * world + 1) if world == 2 else (world, world + 1):
            compared(kind, lanes)
    for kind in ("cat", "stack", "sum", "images"):
        compared(kind, 3)  # on four processes one has no lanes


def state(folder: str) -> None:
    """State dicts by either naming, checkpoints, copies, what falls back, what is refused, bytes held and moved."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    for kind, lanes in (("images", 2 * world), ("images", 2 * world + 1), ("cat", 2 * world)):
        inputs, y = batch(lanes, kind)
        plain, model = build(kind, lanes), fxfuse.shard_lanes(fused(kind, lanes), mesh)
        expected = dict(trained(plain, "sgd", inputs, y).state_dict())
        fxfuse.load_original_state_dict(model, expected)
        worker.assert_same(dict(fxfuse.original_state_dict(model)), expected, "loaded by original names")
        again = fxfuse.shard_lanes(fused(kind, lanes), mesh)
        again.load_state_dict(model.state_dict())
        worker.assert_same(dict(fxfuse.original_state_dict(again)), expected, "loaded by packed names")
        again = fxfuse.shard_lanes(fused(kind, lanes), mesh)
        whole = fused(kind, lanes)
        fxfuse.load_original_state_dict(whole, expected)
        again.load_state_dict(whole.state_dict())
        worker.assert_same(dict(fxfuse.original_state_dict(again)), expected, "loaded from whole packs")
        incomplete = {name: value for name, value in expected.items() if ".1." not in name}
        with pytest.raises(RuntimeError, match=r"(?s)Missing key.*\.1\.0\.weight"):
            again.load_state_dict(incomplete)
        worker.assert_same(dict(fxfuse.original_state_dict(again)), expected, "what does not fit changes nothing")
        with fxfuse.checkpoint_format(model, "original"):
            worker.assert_same(dict(model.state_dict()), expected, "checkpoint_format")
        back = fxfuse.unfuse(model)
        assert type(back) is type(plain)
        worker.assert_same(dict(back.state_dict()), expected, "unfused")
        dcp.save({"model": model.state_dict()}, checkpoint_id=os.path.join(folder, f"{kind}{lanes}"))
        copied = copy.deepcopy(model)
        worker.assert_same({"y": copied(*inputs)}, {"y": plain(*inputs)}, "a copy")
        # A hook makes it run the loop, of weights that are gathered.
        plain, model = build(kind, lanes), fxfuse.shard_lanes(fused(kind, lanes), mesh)
        for each in (plain, model):
            lane = (each.experts if kind == "images" else each.nets)[1]
            lane.register_forward_hook(lambda module, args, out: out * 2)
            trained(each, "sgd", inputs, y)
        assert fxfuse.report(model).fallbacks
        worker.assert_same(dict(fxfuse.original_state_dict(model)), dict(plain.state_dict()), "fallback")
    refused(mesh)
    held(mesh)


def refused(mesh: Any) -> None:
    """What cannot be done says so, on every process, and changes nothing."""
    model = fxfuse.shard_lanes(fused("cat", 4), mesh)
    optimizer = torch.optim.Adam(model.parameters())
    plain = build("cat", 4)
    for action, said in (
        (lambda: fxfuse.shard_lanes(model, mesh), "divided already"),
        (lambda: fxfuse.shard_lanes(plain, mesh), "no fused region"),
        (lambda: fxfuse.shard_lanes(fused("cat", 4), "cpu"), "DeviceMesh"),
        (lambda: fxfuse.shard_lanes(fused("cat", 4), mesh, dim="rows"), "none of them rows"),
        (lambda: fxfuse.freeze(model, "nets.1.*"), "divided among processes"),
        (lambda: fxfuse.migrate_optimizer(optimizer, model, plain), "divided among processes"),
        (lambda: torch.save(model, os.devnull), "cannot be pickled"),
        (lambda: fxfuse.shard_lanes(fused("cat", 4 + dist.get_rank()), mesh), "hold different models"),
    ):
        before = fxfuse.original_state_dict(model)
        with pytest.raises(fxfuse.FxfuseError, match=said):
            action()
        worker.assert_same(dict(fxfuse.original_state_dict(model)), dict(before), said)


def held(mesh: Any) -> None:
    """Each process holds its share of weights and moments; what a step moves is what the shapes say."""
    world = dist.get_world_size()
    lanes = 4 * world
    inputs, y = batch(lanes, "sum")
    model = fxfuse.shard_lanes(fused("sum", lanes), mesh)
    optimizer = torch.optim.Adam(model.parameters())
    with traffic() as moved:
        (model(*inputs) - y).square().mean().backward()
    optimizer.step()
    assert dict(moved.bytes) == {"sum": ROWS * 2 * 8}, moved  # of the output alone
    with traffic() as moved:
        input_gradient(model, inputs)
    assert dict(moved.bytes) == {"sum": ROWS * 2 * 8, "gradients": inputs[0].numel() * 8}, moved
    packs = [p for name, p in model.named_parameters() if "packed" in name]
    here = sum(held_bytes(p) + sum(map(held_bytes, optimizer.state[p].values())) for p in packs)
    all_lanes = [p for name, p in build("sum", lanes).named_parameters() if "nets" in name]
    everything = sum(p.numel() * 8 * 3 for p in all_lanes)
    assert everything / world <= here <= everything / world + 1024, (here, everything)


def held_bytes(tensor: Tensor) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.untyped_storage().nbytes()


def as_whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def grid(folder: str) -> None:
    """Lanes along one dim of a mesh, rows of the batch along the other: by ``shard_lanes`` alone, and with FSDP2."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "lanes"))
    row = mesh.get_local_rank("data")
    for kind, lanes in (("cat", 4), ("sum", 5)):
        inputs, y = batch(lanes, kind)
        mine = slice(row * ROWS // 2, (row + 1) * ROWS // 2)
        for optimizer in worker.OPTIMIZERS:
            expected = dict(trained(build(kind, lanes), optimizer, inputs, y).state_dict())
            model = trained(fxfuse.shard_lanes(fused(kind, lanes), mesh), optimizer, (inputs[0][mine],), y[mine])
            assert not fxfuse.report(model).fallbacks
            worker.assert_same(dict(fxfuse.original_state_dict(model)), expected, f"mesh, {kind}, {optimizer}")
            model = fxfuse.shard_lanes(fused(kind, lanes), mesh["lanes"])
            fully_shard(model, mesh=mesh["data"])
            trained(model, optimizer, (inputs[0][mine],), y[mine])
            assert not fxfuse.report(model).fallbacks, fxfuse.report(model).fallbacks
            found = {name: as_whole(each) for name, each in fxfuse.original_state_dict(model).items()}
            worker.assert_same(found, expected, f"FSDP2, {kind}, {optimizer}")


def raises(*_: Any, **keywords: Any) -> Any:
    raise ValueError("this process cannot")


class RaisesBackward(torch.autograd.Function):
    """Its input; its gradient raises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise ValueError("this process cannot")


def raises_backward(x: Tensor) -> Tensor:
    return RaisesBackward.apply(x)


def with_step(step: Any) -> Any:
    """A ``PartWriter`` that puts a step in front of the first matrix product of its graph."""

    class Writer(PartWriter):
        def written(self) -> torch.fx.Graph:
            graph = super().written()
            at = next(n for n in graph.nodes if n.op == "call_function" and n.target in (torch.baddbmm, torch.bmm, torch.addmm))
            operand = at.args[1]
            with graph.inserting_before(at):
                made = graph.call_function(step, (operand,))
            at.replace_input_with(operand, made)
            return graph

    return Writer


class AsFirst(PartWriter):
    """Writes the first process's part, whichever process this is."""

    def __init__(self, trial: Any, rank: int, *rest: Any) -> None:
        super().__init__(trial, 0, *rest)


def failing(folder: str) -> None:
    """What goes wrong on one process raises on all of them, soon; the model is what it was on each, and can be sharded afterwards."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    last = dist.get_rank() == dist.get_world_size() - 1
    lanes, calls = 2 * dist.get_world_size(), itertools.count()
    faults: dict[str, tuple[Any, str, Any, str]] = {
        "wrong numbers": (dividing, "PartWriter", AsFirst, "differs from the unsharded one: .*differs by .* of its norm"),
        "raises forward": (dividing, "PartWriter", with_step(raises), "ValueError: this process cannot"),
        "raises backward": (dividing, "PartWriter", with_step(raises_backward), "ValueError: this process cannot"),
        "raises where it is decided": (shard_module, "divided", raises, "this process cannot"),
        "raises at the end": (shard_module, "place", lambda *given: placing.place(*given) if next(calls) < 1 else raises(), "this process"),
        "cannot be copied": (rehearsal, "copy", SimpleNamespace(deepcopy=raises), "this process cannot"),
    }
    inputs, y = batch(lanes, "sum")
    for what, (module, name, fault, said) in faults.items():
        model = fused("sum", lanes)
        if last:  # and has other weights, which come back
            with torch.no_grad():
                model.head.weight.mul_(2)
        before, parameters, types = dict(fxfuse.original_state_dict(model)), list(model.parameters()), [type(m) for m in model.modules()]
        good = getattr(module, name)
        setattr(module, name, fault if last else good)
        try:
            if what == "cannot be copied":  # no comparison then, and the report says so
                fxfuse.shard_lanes(model, mesh)
                assert "not compared" in str(fxfuse.report(model)), fxfuse.report(model)
                continue
            with pytest.raises((fxfuse.FxfuseError, ValueError), match=said):
                fxfuse.shard_lanes(model, mesh, example_inputs=inputs if what == "wrong numbers" else None)
        finally:
            setattr(module, name, good)
        assert [type(m) for m in model.modules()] == types, what
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True)), what
        assert all(p.grad is None for p in parameters), what
        assert all(torch.equal(before[n], v) for n, v in fxfuse.original_state_dict(model).items()), what
        assert all(state.sharding is None for state in regions(model).values())
        model(*inputs)
        assert not fxfuse.report(model).fallbacks
        plain = build("sum", lanes)
        trained(plain, "sgd", inputs, y)
        trained(fxfuse.shard_lanes(model, mesh), "sgd", inputs, y)
        worker.assert_same(dict(fxfuse.original_state_dict(model)), dict(plain.state_dict()), what)


class FailsOnce:
    """In place of ``rehearsal._difference``: says that the first call differs."""

    def __init__(self, good: Any) -> None:
        self.good, self.called = good, False

    def __call__(self, *given: Any) -> str:
        said, self.called = "" if self.called else "it has no lanes", True
        return said or self.good(*given)


def idle(folder: str) -> None:
    """A process without lanes; and where some op does not take that, all is whole."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    good = rehearsal._difference
    for fails in (False, True):
        model = fused("sum", 3)
        if fails and dist.get_rank() == 3:
            rehearsal._difference = FailsOnce(good)
        fxfuse.shard_lanes(model, mesh)
        rehearsal._difference = good
        assert ("too few for 4 processes" in str(fxfuse.report(model))) is fails
        plain = build("sum", 3)
        inputs, y = batch(3, "sum")
        for each in (plain, model):
            trained(each, "sgd", inputs, y)
        assert_alike(plain, model, "3 lanes")


def adopting(folder: str) -> None:
    """Processes that chose other plans, or none, run the first one's."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for kind, lanes in (("cat", 6), ("images", 5)):
        inputs, y = batch(lanes, kind)
        first = fused(kind, lanes)
        chosen: list[dict[str, Any]] = [
            {"objective": "launches", "tune": False},
            {"objective": "launches", "tune": False, "lowering": "grouped_conv"},
            {"tune": False, "min_lanes": 100},  # nothing fuses
            {"tune": True, "cache": False},
        ]
        model = fxfuse.optimize(build(kind, lanes), inputs, **chosen[dist.get_rank()])
        assert dist.get_rank() != 2 or not regions(model)
        assert fxfuse.shard_lanes(model, mesh) is model
        assert "all run the first one's" in str(fxfuse.report(model))
        plain = build(kind, lanes)
        trained(plain, "adamw", inputs, y)
        trained(model, "adamw", inputs, y)
        assert fxfuse.report(model).fused
        assert not fxfuse.report(model).fallbacks, fxfuse.report(model).fallbacks
        assert [name for name, _ in model.named_parameters()] == [name for name, _ in first.named_parameters()]
        worker.assert_same(dict(fxfuse.original_state_dict(model)), dict(plain.state_dict()), kind)
        back = fxfuse.unfuse(model)
        worker.assert_same(dict(back.state_dict()), dict(plain.state_dict()), kind)
    # Where the first one has no lanes, or the models are not one: refused on all, and nothing has changed.
    plans = [{"min_lanes": 100}, {}, {}, {}][dist.get_rank()]
    model = fxfuse.optimize(build("cat", 6), batch(6, "cat")[0], objective="launches", tune=False, **plans)
    with pytest.raises(fxfuse.FxfuseError, match="no fused region"):
        fxfuse.shard_lanes(model, mesh)
    other = nn.Sequential(build("cat", 6), nn.Linear(2, 2 + dist.get_rank()).double())
    model = fxfuse.optimize(other, batch(6, "cat")[0], objective="launches", tune=False)
    before, kept = dict(fxfuse.original_state_dict(model)), regions(model)
    with pytest.raises(fxfuse.FxfuseError, match="other names or shapes"):
        fxfuse.shard_lanes(model, mesh)
    assert all(torch.equal(before[n], v) for n, v in fxfuse.original_state_dict(model).items())
    assert all(state is kept[path] for path, state in regions(model).items())


def both(kind: str, lanes: int) -> tuple[nn.Module, nn.Module]:
    """The loop on one process, and the sharded model, of equal weights."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return build(kind, lanes), fxfuse.shard_lanes(fused(kind, lanes), mesh, validate=False)


def assert_alike(plain: nn.Module, model: nn.Module, what: str, tolerance: float = 1e-9, fast: bool = True) -> None:
    """Gradients and state by the original's names; without a call that ran the loop, where ``fast``."""
    pairs = [(dict(fxfuse.original_state_dict(model)), dict(plain.state_dict()))]
    gradients = {name: grad for name, grad in original_gradients(model).items() if grad is not None}
    pairs.append((gradients, {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}))
    for found, expected in pairs:
        assert list(found) == list(expected), what
        for name, tensor in expected.items():
            assert found[name].dtype is tensor.dtype, (what, name)
            assert torch.allclose(found[name], tensor, rtol=tolerance, atol=tolerance), (what, name)
    assert not (fast and fxfuse.report(model).fallbacks), (what, fxfuse.report(model).fallbacks)


def backward(model: Any, inputs: tuple[Tensor, ...], y: Tensor, rows: slice = slice(None)) -> None:
    out = model(*(x[rows] for x in inputs))
    (out - y[rows].to(out.dtype)).square().mean().backward()


def afterwards(folder: str) -> None:
    """What users do with a model whose lanes are divided."""
    world = dist.get_world_size()
    clips(world)
    for kind, lanes in (("images", 2 * world + 1), ("sum", 2 * world), ("cat", 2 * world)):
        inputs, y = batch(lanes, kind)
        casts(kind, lanes, inputs, y)
        plain, model = both(kind, lanes)
        for rows in (slice(0, 4), slice(2, 8), slice(5, 8)):  # gradients accumulate, over other batch sizes
            for each in (plain, model):
                backward(each, inputs, y, rows)
        assert_alike(plain, model, "accumulated")
        copied = copy.deepcopy(model)  # a copy is sharded too, and trains apart
        trained(copied, "sgd", inputs, y)
        assert_alike(plain, model, "the model that was copied")
        trained(plain, "sgd", inputs, y)
        assert_alike(plain, copied, "the copy")
        plain, model = both(kind, lanes)
        for each in (plain, model):
            each.eval()
            with torch.inference_mode():
                each(*inputs)
            with torch.no_grad():
                each(*inputs)
            trained(each.train(), "adamw", inputs, y)
        assert_alike(plain, model, "trained after inference")
        back = fxfuse.unfuse(model)
        assert type(back) is type(plain)
        for each in (plain, back):
            trained(each, "sgd", inputs, y)
        worker.assert_same(dict(back.state_dict()), dict(plain.state_dict()), "unfused, and trained on")
        plain, model = both(kind, lanes)
        assert fxfuse.verify(plain, model, inputs).ok
        torch.compiler.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=kind != "images")
        backward(plain, inputs, y)
        backward(compiled, inputs, y)
        assert_alike(plain, model, "compiled")
        averages = [torch.optim.swa_utils.AveragedModel(each) for each in both(kind, lanes)]
        for average in averages:
            for _ in range(2):
                trained(average.module, "sgd", inputs, y, 1)
                average.update_parameters(average.module)
        worker.assert_same(dict(fxfuse.original_state_dict(averages[1].module)), dict(averages[0].module.state_dict()), "AveragedModel")


def casts(kind: str, lanes: int, inputs: tuple[Tensor, ...], y: Tensor) -> None:
    """Other dtypes, saved and loaded in them."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.003)):
        plain, model = both(kind, lanes)
        plain.to(dtype), model.to(dtype)
        if dtype is torch.float16:
            plain.half(), model.half()
        given = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
        for each in (plain, model):
            backward(each, given, y)
        assert_alike(plain, model, f"{kind}, {dtype}", tolerance)
        again = both(kind, lanes)[1].to(dtype)
        again.load_state_dict(model.state_dict())
        worker.assert_same(dict(fxfuse.original_state_dict(again)), dict(fxfuse.original_state_dict(model)), "loaded")
        plain.double(), again.double()
        fxfuse.load_original_state_dict(again, plain.state_dict())
        plain.zero_grad(), again.zero_grad()
        for each in (plain, again):
            backward(each, inputs, y)
        assert_alike(plain, again, f"{kind}, {dtype}, and back")
    # Under autocast the region runs its loop, on gathered weights; its lanes, where it was called so before.
    given = tuple(x.float() if x.is_floating_point() else x for x in inputs)
    for before in (False, True):
        plain, model = build(kind, lanes).float(), fused(kind, lanes).float()
        if before:
            with preserved_state(model), torch.autocast("cpu", dtype=torch.bfloat16):
                model(*given)
            assert not fxfuse.report(model).fallbacks
        fxfuse.shard_lanes(model, init_device_mesh("cpu", (dist.get_world_size(),)))
        assert ("under autocast" in " ".join(fxfuse.report(model).notes)) is before, fxfuse.report(model).notes
        with torch.autocast("cpu", dtype=torch.bfloat16), traffic() as moved:
            outs = [each(*given) for each in (plain, model)]
        assert outs[0].dtype is outs[1].dtype
        assert bool(moved.bytes["weights"]) is not before
        for out in outs:
            out.float().square().mean().backward()
        assert_alike(plain, model, f"{kind}, autocast", 0.02, fast=before)
        if before:
            plain.zero_grad(), model.zero_grad()
            for each in (plain, model):
                backward(each, given, y)
            assert_alike(plain, model, f"{kind}, without autocast again", 1e-5)


def clips(world: int) -> None:
    """The total norm is that of one process; also with FSDP2 over the other dim of a mesh."""
    inputs, y = batch(2 * world + 1, "cat")
    for norm_type in (2.0, 1.0, math.inf):
        for most in (0.01, 1e6):
            plain, model = both("cat", 2 * world + 1)
            for each in (plain, model):
                backward(each, inputs, y)
            expected = nn.utils.clip_grad_norm_(plain.parameters(), most, norm_type)
            found = fxfuse.clip_grad_norm_(model.parameters(), most, norm_type)
            worker.assert_same({"norm": found}, {"norm": expected}, "norm")
            assert_alike(plain, model, "clipped")
    if world == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "lanes"))
        rows = slice(mesh.get_local_rank("data") * ROWS // 2, (mesh.get_local_rank("data") + 1) * ROWS // 2)
        plain, model = build("cat", 5), fxfuse.shard_lanes(fused("cat", 5), mesh["lanes"])
        fully_shard(model, mesh=mesh["data"])
        inputs, y = batch(5, "cat")
        backward(plain, inputs, y)
        backward(model, inputs, y, rows)
        expected = nn.utils.clip_grad_norm_(plain.parameters(), 0.01)
        worker.assert_same({"norm": fxfuse.clip_grad_norm_(model.parameters(), 0.01)}, {"norm": expected}, "FSDP2")
    plain, model = both("cat", 2 * world + 1)
    model.head.bias.grad = torch.full((2,), math.inf, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="the total norm"):
        fxfuse.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)


class Ragged(nn.Module):
    """Tables of unequal heights and experts of one input, wide enough to be worth dividing: their lanes have no equal shares."""

    def __init__(self, lanes: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(70 + 3 * i, 64, _weight=torch.randn(70 + 3 * i, 64) / 8) for i in range(lanes))
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 96), nn.Tanh(), nn.Linear(96, 64)) for _ in range(lanes))
        self.mix = nn.ParameterList(nn.Parameter(torch.randn(64, 64) / 64) for _ in range(lanes))
        self.out = nn.Linear(64, 2)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        found = torch.stack([table(ids[:, i]) for i, table in enumerate(self.tables)], 1)
        h = torch.stack([expert(x[:, :6]) for expert in self.experts], 1)
        return self.out((h * found).sum(1) + sum(h[:, i] @ w for i, w in enumerate(self.mix)))


def uneven(folder: str) -> None:
    """Packs whose lanes have no edges where equal shares do are held in shares, and gathered at each call; all else is as ever."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    lanes = 2 * world + 1
    model = fxfuse.optimize(build("ragged", lanes), batch(lanes, "ragged")[0], objective="launches", tune=False)
    fxfuse.shard_lanes(model, mesh)
    said = " ".join(str(fxfuse.report(model)).split())
    assert re.search(r"note: packed\S+ is held in shares, and gathered at each call: its", said), said
    assert "forward gathers weights" in said
    optimizer = torch.optim.Adam(model.parameters())
    inputs, y = batch(lanes, "ragged")
    backward(model, inputs, y)
    optimizer.step()
    large = [p for p in build("ragged", lanes).parameters() if p.ndim == 2]
    here = sum(held_bytes(p) + sum(map(held_bytes, optimizer.state[p].values())) for p in model.parameters() if p.ndim > 1)
    everything = sum(p.numel() * 8 * 3 for p in large)
    assert here < 1.15 * everything * -(-lanes // world) / lanes, (here, everything)  # shares are rounded up
    for kind in ("ragged", "images", "cat", "sum"):
        dividing.WORTH_DIVIDING = 0
        compared(kind, lanes)
        if world > 2:
            compared(kind, 3)  # fewer lanes than processes
        plain, model = both(kind, lanes)
        inputs, y = batch(lanes, kind)
        expected = dict(trained(plain, "sgd", inputs, y).state_dict())
        fxfuse.load_original_state_dict(model, expected)
        again = both(kind, lanes)[1]
        again.load_state_dict(model.state_dict())
        worker.assert_same(dict(fxfuse.original_state_dict(again)), expected, "loaded by packed names")
        worker.assert_same(dict(fxfuse.unfuse(again).state_dict()), expected, "unfused")
        dcp.save({"model": model.state_dict()}, checkpoint_id=os.path.join(folder, f"uneven {kind}{world}"))
        empty = {"model": {name: torch.zeros_like(value) for name, value in again.state_dict().items()}}
        dcp.load(empty, checkpoint_id=os.path.join(folder, f"uneven {kind}{world}"))
        again.load_state_dict(empty["model"])
        worker.assert_same(dict(fxfuse.original_state_dict(again)), expected, "checkpoint")


class Dropping(nn.Module):
    """Dropout in the lanes, and behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.5)) for _ in range(4))
        self.last = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.stack([net(x) for net in self.nets], 1)
        return h, self.last(h)


def dropout(folder: str) -> None:
    """Lanes draw masks of their own; what is no lane's draws the same on every process."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    x = torch.randn(16, 3)
    model = fxfuse.shard_lanes(fxfuse.optimize(Dropping(), x, objective="launches", tune=False), mesh)
    assert next(iter(regions(model).values())).sharding.sharded
    torch.manual_seed(5)
    h, last = model(x)
    masks = (h != 0).transpose(0, 1).flatten(1).float()
    assert all(0.4 < mask.mean() < 0.6 for mask in masks)
    agreement = [(masks[i] == masks[j]).float().mean() for i in range(4) for j in range(i)]
    assert all(0.4 < each < 0.6 for each in agreement), agreement
    for value in (h, last, torch.rand(3)):
        everyone = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, value.detach().contiguous())
        assert all(torch.equal(each, everyone[0]) for each in everyone)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    globals()[sys.argv[1]](sys.argv[2])
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)
