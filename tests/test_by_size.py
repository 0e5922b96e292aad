"""Several plans for several sizes: each serves its range, all are the original, over one pack that trains, saves, copies and compiles."""

from __future__ import annotations

import copy
import io
import operator
import pickle
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from checks import assert_equal_models, assert_trained_alike, randn, randomized
from fxfuse.fused import regions
from fxfuse.planning import timing
from fxfuse.planning.choice import Choice
from fxfuse.planning.plan_by_size import PlannerBySize
from fxfuse.running.runtime import MISS

SIZES = [1, 2, 3, 5, 6, 9, 17, 18, 33, 70]  # in, between and outside of what the plans are made for
Made = tuple[dict[Any, str] | None, int]


class Nets(nn.Module):
    """``extra``: what stands between the layers of each lane."""

    def __init__(self, lanes: int = 6, hidden: int = 8, extra: Callable[[int], nn.Module] = lambda _: nn.Tanh()) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(1, hidden), extra(hidden), nn.Linear(hidden, 1)) for _ in range(lanes))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)


class Rows(nn.Module):
    """The free size is that of dim 1; dim 0 is fixed by the number of lanes."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Linear(3, 4) for _ in range(5))

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return torch.stack([torch.relu(net(x[i])) * scale for i, net in enumerate(self.nets)])


def the_loop(common: Choice) -> Made:
    return None, 1


def as_common(common: Choice) -> Made:
    return dict(common.lowering), common.chunks


def in_chunks(common: Choice) -> Made:
    return dict(common.lowering), 2


def otherwise(common: Choice) -> Made:
    """Every product by another lowering, which wants its weights stored otherwise."""
    assert common.vectorized is not None
    offered = common.vectorized.choices.items()
    wanted = ("bmm_transposed", "baddbmm", "grouped_conv", "bmm")
    return {key: next((w for w in wanted if w in options and w != common.lowering[key]), options[0]) for key, options in offered}, 1


@pytest.fixture(autouse=True)
def _hardly_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = timing._samples
    monkeypatch.setattr(timing, "_samples", lambda functions, *_: samples(functions, 0.0, 3, 3))


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, Callable[[Choice], Made]]], None]:
    """Plans by size, whatever is faster here."""
    def given(plans: dict[int, Callable[[Choice], Made]]) -> None:
        def settle(self: PlannerBySize, point: Any, common: Choice, loop: Any, search: bool) -> None:
            assert loop is not None
            point.written, point.packed, point.seconds = 2.0, 1.0, 1.0
            point.lowering, point.chunks = plans[point.size](common)

        monkeypatch.setattr(PlannerBySize, "_settle", settle)

    return given


PLANS: dict[str, dict[int, Callable[[Choice], Made]]] = {
    "loop above": {3: as_common, 17: the_loop},
    "loop below": {3: the_loop, 17: as_common},
    "others": {3: otherwise, 9: as_common, 33: in_chunks},
    "all": {2: in_chunks, 5: the_loop, 9: as_common, 33: otherwise},
}


@pytest.fixture(params=list(PLANS))
def plans(request: pytest.FixtureRequest, settled: Any) -> list[int]:
    settled(PLANS[request.param])
    return list(PLANS[request.param])


def fused_for(model: nn.Module, x: Any, sizes: list[Any], **options: Any) -> nn.Module:
    fused = fxfuse.optimize(model, x, tune_for=sizes, **{"cache": False, "progress": False, "strict": True, **options})
    assert fxfuse.report(fused).fused, fxfuse.report(fused)
    return fused


def answering(fused: nn.Module, *args: Any) -> list[int]:
    """Which programs of the current mode answer this call."""
    (state,) = regions(fused).values()
    state.prepare()
    assert state.current is not None
    programs = [state.current, *state.methods.get("forward", ())]
    return [number for number, program in enumerate(programs) if program.run(args, {}) is not MISS]


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_every_size_is_the_original_and_served_by_one_program(plans: list[int], mode: str) -> None:
    model, x = randomized(Nets()), randn(4, 6)
    fused = fused_for(model, x, plans, mode=mode)
    report = fxfuse.report(fused)
    assert_equal_models(model, fused, [((randn(size, 6, seed=size),), {}) for size in SIZES])
    served = {}
    for training in (True, False):
        fused.train(training)
        served[training] = [answering(fused, randn(size, 6)) for size in SIZES]
        assert all(len(each) == 1 for each in served[training])
        assert {each[0] for each in served[training]} == set(range(len(plans)))
    assert served[True] == served[False]
    assert not report.fallbacks
    assert [n for n in report.to_dict()["fused"][0]["by_size"]] == [
        {"first": s.first, "last": s.last, "how": s.how, "measured": [list(m) for m in s.measured]} for s in report.fused[0].by_size
    ]
    assert len(report.fused[0].by_size) == len(plans)
    assert "sizes 1 to " in str(report)
    assert "sizes from " in str(report)


def test_the_bound_lies_between_the_sizes(settled: Any) -> None:
    settled({4: as_common, 64: the_loop})
    fused = fused_for(randomized(Nets()), randn(4, 6), [64, 4])
    assert [(s.first, s.last, s.how == "the loop") for s in fxfuse.report(fused).fused[0].by_size] == [(1, 16, False), (17, None, True)]
    assert answering(fused, randn(16, 6)) != answering(fused, randn(17, 6))
    assert answering(fused, randn(0, 6)) == answering(fused, randn(1, 6))


def test_neighbours_with_one_plan_are_one_range(settled: Any) -> None:
    settled({2: as_common, 4: as_common, 8: the_loop, 16: the_loop})
    fused = fused_for(randomized(Nets()), randn(4, 6), [2, 4, 8, 16])
    assert [(s.first, s.last, [m[0] for m in s.measured]) for s in fxfuse.report(fused).fused[0].by_size] == [
        (1, 5, [2, 4]), (6, None, [8, 16]),
    ]  # fmt: skip


@pytest.mark.parametrize("model", [
    lambda: Nets(extra=nn.BatchNorm1d), lambda: Nets(extra=nn.LayerNorm), lambda: Nets(extra=lambda _: nn.ReLU()),
], ids=["batch_norm", "layer_norm", "relu"])  # fmt: skip
def test_training_goes_through_all_of_them(plans: list[int], model: Callable[[], nn.Module]) -> None:
    plain = randomized(model())
    fused = fused_for(plain, randn(4, 6), plans)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9) for m in (plain, fused)]
    for size in (*SIZES[1:], *SIZES[1:]):
        x = randn(size, 6, seed=size)
        for each, optimizer in zip((plain, fused), optimizers, strict=True):
            optimizer.zero_grad()
            each(x).square().sum().backward()
            optimizer.step()
    assert_trained_alike(fused, plain)
    assert not fxfuse.report(fused).fallbacks
    state = fxfuse.original_state_dict(fused)
    assert state.keys() == plain.state_dict().keys()
    other = fused_for(randomized(model(), seed=5), randn(4, 6), plans)
    fxfuse.load_original_state_dict(other, state)
    restored = fxfuse.unfuse(other).eval()
    for size in SIZES:
        x = randn(size, 6, seed=size)
        with torch.no_grad():  # views of weights are held between such calls
            expected = restored(x)
            torch.testing.assert_close(other.eval()(x), expected, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(fused.eval()(x), expected, rtol=1e-12, atol=1e-12)


def test_copies_and_pickles_keep_the_plans(plans: list[int]) -> None:
    model = randomized(Nets())
    fused = fused_for(model, randn(4, 6), plans)
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), torch.load(file, weights_only=False)):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(0.5)
        plain = fxfuse.unfuse(other)
        for size in SIZES:
            x = randn(size, 6, seed=size)
            torch.testing.assert_close(other(x), plain(x), rtol=1e-12, atol=1e-12)
            assert answering(other, x) == answering(fused, x)
        assert not fxfuse.report(other).fallbacks


@pytest.mark.parametrize("dynamic", [True, False])
def test_compiled_it_is_the_original_at_every_size(plans: list[int], dynamic: bool) -> None:
    model = randomized(Nets())
    fused = fused_for(model, randn(4, 6), plans, strict=False)
    torch.compiler.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for size in SIZES[1:7]:
        x, y = (randn(size, 6, seed=size).requires_grad_() for _ in range(2))
        compiled(x).square().sum().backward()
        model(y).square().sum().backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-10, atol=1e-12)
    for name, gradient in fxfuse.weights.packing.original_gradients(fused).items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-10, atol=1e-12)


def test_sizes_of_another_dim_and_inputs_by_name(settled: Any) -> None:
    settled({2: the_loop, 9: as_common})
    model, scale = randomized(Rows()), randn(4)
    inputs = [(randn(5, size, 3), scale) for size in (2, 9)]
    fused = fused_for(model, (randn(5, 4, 3), scale), inputs)
    assert len(fxfuse.report(fused).fused[0].by_size) == 2
    for size in SIZES:
        x = randn(5, size, 3, seed=size)
        assert_equal_models(model, fused, [((x, scale), {})])
        assert torch.equal(fused(x=x, scale=scale), fused(x, scale))
    assert answering(fused, randn(5, 2, 3), scale) != answering(fused, randn(5, 9, 3), scale)


def test_frozen_lanes_and_other_methods(settled: Any) -> None:
    class Two(Nets):
        def halved(self, x: Tensor) -> Tensor:
            return self(x) / 2

    settled({3: as_common, 17: the_loop})
    model = randomized(Two())
    fused = fxfuse.optimize(model, randn(4, 6), methods=["halved"], tune_for=[3, 17], cache=False)
    fxfuse.freeze(fused, "nets.2.*")
    plain = copy.deepcopy(model)
    for parameter in plain.nets[2].parameters():
        parameter.requires_grad_(False)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-2) for m in (plain, fused)]
    for size in SIZES:
        x = randn(size, 6, seed=size)
        for each, optimizer in zip((plain, fused), optimizers, strict=True):
            optimizer.zero_grad()
            each(x).square().sum().backward()
            optimizer.step()
        torch.testing.assert_close(fused.halved(x), plain.halved(x), rtol=1e-10, atol=1e-12)
    assert_trained_alike(fused, plain)
    assert not fxfuse.report(fused).fallbacks


def test_a_call_under_autocast_is_answered(settled: Any) -> None:
    settled({3: as_common, 17: the_loop})
    model = Nets()
    fused = fused_for(model, torch.randn(4, 6), [3, 17], strict=False)
    for size in (3, 17):
        x = torch.randn(size, 6)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(fused(x).float(), model(x).float(), rtol=0.05, atol=0.05)
    assert not fxfuse.report(fused).fallbacks


def test_the_cache_keeps_them(settled: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXFUSE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("FXFUSE_CACHE", "1")
    settled({3: as_common, 9: otherwise, 17: the_loop})
    first = fused_for(randomized(Nets()), randn(4, 6), [3, 9, 17], cache=True)
    monkeypatch.setattr(timing, "_samples", lambda *_: pytest.fail("something was timed"))
    model = randomized(Nets(), seed=3)
    again = fused_for(model, randn(4, 6), [3, 9, 17], cache=True)
    (one,), (two,) = fxfuse.report(first).fused, fxfuse.report(again).fused
    assert two.cached
    assert two.by_size == one.by_size
    assert len(two.by_size) == 3
    for size in SIZES:
        x = randn(size, 6, seed=size)
        torch.testing.assert_close(again(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_plan_that_is_wrong_is_found_at_its_own_sizes(settled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    by_size = import_module("fxfuse.building.by_size")
    right = by_size.the_loop

    def wrong(*given: Any) -> Any:
        made = right(*given)
        (output,) = (node for node in made.graph.nodes if node.op == "output")
        with made.graph.inserting_before(output):
            output.args = ([made.graph.call_function(torch.mul, (output.args[0][0], 1.001))],)
        return made

    monkeypatch.setattr(by_size, "the_loop", wrong)
    settled({3: as_common, 400: the_loop})
    fused = fxfuse.optimize(randomized(Nets()), randn(4, 6), tune_for=[3, 400], cache=False)
    assert not fxfuse.report(fused).fused
    assert "the rewritten form differs" in str(fxfuse.report(fused).refused[0])


def test_views_of_weights_are_no_part_of_what_is_timed_in_inference() -> None:
    from fxfuse.running.weight_views import evaluate

    graph = torch.fx.Graph()
    x, packed, bias = graph.placeholder("x"), graph.create_node("get_attr", "weight"), graph.create_node("get_attr", "bias")
    lanes = graph.call_function(torch.unbind, (graph.call_function(torch.permute, (packed, (0, 2, 1))), 0))
    second = graph.call_function(operator.getitem, (lanes, 1))
    scaled = graph.call_function(torch.mul, (graph.call_method("reshape", (bias, (2, 2))), 2.0))  # no view
    copied = graph.call_method("reshape", (graph.call_function(torch.transpose, (packed, 1, 2)), (-1,)))  # has to be copied
    product = graph.call_function(torch.matmul, (x, second))
    graph.output((product, scaled, copied))
    tensors: dict[str, Any] = {"weight": randn(3, 4, 5), "bias": randn(4)}
    expected = torch.fx.GraphModule(dict(tensors), graph)(randn(2, 5))
    made = evaluate(graph, tensors)
    left = [node.target for node in made.nodes if node.op in ("call_function", "call_method")]
    assert left == [torch.mul, "reshape", torch.matmul]
    for got, want in zip(torch.fx.GraphModule(tensors, made)(randn(2, 5)), expected, strict=True):
        assert torch.equal(got, want)


def test_the_loop_reads_all_lanes_of_a_pack_at_once(settled: Any) -> None:
    """One ``unbind``, not a ``select`` for each lane, whose backward fills a tensor of the size of the pack."""
    settled({3: as_common, 9: the_loop})
    fused = fused_for(randomized(Nets()), randn(4, 6), [3, 9])
    (state,) = regions(fused).values()
    (loop,) = state.plan.methods["forward"][state.flags()]
    targets = [node.target for node in loop.graph.nodes]
    assert targets.count(torch.unbind) == len(state.plan.recipes)
    assert torch.select not in targets
    assert sum(node.op == "get_attr" for node in loop.graph.nodes) == len(state.plan.recipes)


def measured(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int, str], float]) -> None:
    """Times by size and by what is timed: "written", "common", "own", "loop"."""
    from fxfuse.planning.workbench import Workbench

    monkeypatch.setattr(Workbench, "trains", lambda self: True)
    monkeypatch.setattr("fxfuse.planning.plan.as_usual", lambda planner, choice: choice)
    monkeypatch.setattr(Workbench, "loop", lambda self: (self.batch, "written"))
    monkeypatch.setattr(Workbench, "step", lambda self, made: (self.batch, "loop" if not made.ops else "packed"))
    plan = import_module("fxfuse.planning.plan")
    monkeypatch.setattr(plan, "ratio", lambda one, other, budget: (1.0, 1.0))
    monkeypatch.setattr(plan, "quickest", lambda calls: [seconds(*call) for call in calls])
    for module in (plan, import_module("fxfuse.planning.plan_by_size")):
        monkeypatch.setattr(module, "medians", lambda calls, budget: [seconds(*call) for call in calls])


def test_the_loop_where_it_is_faster_and_nothing_where_all_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"validate": False, "cache": False, "tune_for": [4, 64]}
    with monkeypatch.context() as patch:
        measured(patch, lambda size, what: {"written": 3.0, "loop": 3.01, "packed": 1.0 if size == 4 else 4.0}[what])
        report = fxfuse.report(fxfuse.optimize(randomized(Nets()), randn(4, 6), **options))
    assert [s.how == "the loop" for s in report.fused[0].by_size] == [False, True]
    with monkeypatch.context() as patch:
        measured(patch, lambda size, what: {"written": 3.0, "loop": 3.6, "packed": 1.0 if size == 4 else 4.0}[what])
        report = fxfuse.report(fxfuse.optimize(randomized(Nets()), randn(4, 6), **options))
    assert not report.fused
    assert "left as a loop: packed runs 0.75x at size 64 on cpu (forward and backward)" in str(report.refused[0])
    with monkeypatch.context() as patch:
        measured(patch, lambda size, what: {"written": 3.0, "loop": 3.0, "packed": 4.0}[what])
        report = fxfuse.report(fxfuse.optimize(randomized(Nets()), randn(4, 6), **options))
    assert not report.fused
    with monkeypatch.context() as patch:
        measured(patch, lambda size, what: {"written": 3.0, "loop": 3.0, "packed": 2.0}[what])
        report = fxfuse.report(fxfuse.optimize(randomized(Nets()), randn(4, 6), **options))
    assert report.fused
    assert not report.fused[0].by_size


def test_divided_among_processes_one_program_is_left(settled: Any) -> None:
    from fxfuse.lane_parallel.one_size import for_any_size

    settled({3: the_loop, 9: as_common, 33: in_chunks})
    fused = fused_for(randomized(Nets()), randn(4, 6), [3, 9, 33])
    (state,) = regions(fused).values()
    assert len(state.plan.all_programs()) == 6
    one = for_any_size(state.plan)
    assert [len(one.programs), *(len(programs) for programs in one.methods["forward"].values())] == [2, 0, 0]
    assert not any(check.chosen for program in one.all_programs() for check in program.guard.sizes)
    unbound = [node for program in one.all_programs() for node in program.graph.nodes if node.target is torch.unbind]
    assert not unbound, "the loop is no program for lanes that are divided"
    assert for_any_size(one) is one
