"""How the backend is named and told what to do: the entry point, options, modes, the pass for Inductor, logs, and wrong arguments."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tomllib
import torch
import torch.nn.functional as F
from compiling import Counting, assert_same_step, compiled
from test_backend import COMPILER, nam
from torch import nn

import fxfuse
from checks import model_of, randn, randomized
from fxfuse.backend import fxfuse as by_name
from fxfuse.dynamo import rewrite

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
X = randn(5, 10)
ROOT = Path(__file__).resolve().parents[1]


def entry_points(where: Path) -> None:
    """What pip writes for the entry points of pyproject.toml."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    info = where / "fxfuse_by_name-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fxfuse-by-name\nVersion: 1\n")
    lines = [line for group, names in groups.items() for line in (f"[{group}]", *(f"{n} = {v}" for n, v in names.items()))]
    (info / "entry_points.txt").write_text("\n".join(lines))


def run_python(code: str, where: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(where), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path, **variables}, cwd=where, capture_output=True, text=True
    )


MODEL = """
import torch
from torch import nn
class Nets(nn.Module):
    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(nn.Linear(1, 4) for _ in range(9))
    def forward(self, x):
        return torch.cat([net(x[:, i:i + 1]) for i, net in enumerate(self.nets)], 1)
model, x = Nets(), torch.randn(5, 9)
call = torch.compile(model, backend="fxfuse", options={"inner": "eager"})
torch.testing.assert_close(call(x), model(x))
print("right", len({net.weight.untyped_storage().data_ptr() for net in model.nets}))
"""


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib comes with Python 3.11")
def test_the_name_needs_no_import_and_logs_tell_all(tmp_path):
    entry_points(tmp_path)
    done = run_python(MODEL, tmp_path, TORCH_LOGS="+fxfuse")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "right 1\n"  # fused: all weights in one piece of memory
    assert "9 lanes of linear as one" in done.stderr
    assert "def forward(self" in done.stderr


def test_unknown_options_are_named():
    call = torch.compile(nam(), backend=by_name, options={"min_lane": 3})
    with pytest.raises(Exception, match="no option 'min_lane', and Inductor has none; its own: freeze, inner, lowering, min_lanes"):
        call(X)
    call = torch.compile(nam(), backend=by_name, options={"inner": Counting(), "max_autotune": True})
    with pytest.raises(Exception, match="backend fxfuse has no option 'max_autotune'; its own"):
        call(X)


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"inner": 3}, "inner must be the name of a backend or a backend, 3 came"),
        ({"inner": "fxfuse"}, "would call itself"),
        ({"inner": "nope"}, "inner='nope' names no backend of torch.compile; there are .*aot_eager.*inductor"),
        ({"min_lanes": 1}, "min_lanes must be a whole number of at least 2, 1 came"),
        ({"lowering": "conv"}, "lowering must be one of 'auto', 'grouped_conv', 'bmm'; 'conv' came"),
        ({"tune": 1}, "tune must be True or False, 1 came"),
        ({"validate": None}, "validate must be True or False, None came"),
        ({"freeze": "yes"}, "freeze must be True or False, 'yes' came"),
    ],
)
def test_wrong_arguments_raise_at_once(keywords, said):
    with pytest.raises(fxfuse.ArgumentError, match=said):
        fxfuse.backend(**keywords)


def test_a_backend_without_its_parentheses():
    with pytest.raises(Exception, match=r"backend=fxfuse.backend\(\)\), with parentheses"):
        torch.compile(nam(), backend=fxfuse.backend)(X)


def test_options_reach_fxfuse_and_others_inductor(monkeypatch):
    given = []
    monkeypatch.setattr("fxfuse.dynamo.settings.inductor", lambda settings: given.append(settings) or (lambda graph, inputs: graph.forward))
    model = nam()
    call = torch.compile(model, backend=by_name, options={"min_lanes": 11, "epilogue_fusion": False})
    torch.testing.assert_close(call(X), model(X), rtol=1e-10, atol=1e-12)
    assert given == [{"epilogue_fusion": False}]


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", "default"])
def test_modes_are_passed_on(mode, monkeypatch):
    given = []
    monkeypatch.setattr("fxfuse.dynamo.settings.inductor", lambda settings: given.append(settings) or (lambda graph, inputs: graph.forward))
    model = nam()
    for call in (torch.compile(model, backend=by_name, mode=mode), torch.compile(model, backend=fxfuse.backend(mode=mode))):
        torch._dynamo.reset()
        torch.testing.assert_close(call(X), model(X), rtol=1e-10, atol=1e-12)
    expected = {} if mode == "default" else torch._inductor.list_mode_options(mode)
    assert given == [expected, expected]


def test_min_lanes():
    model = nam(4)
    call, counting = compiled(model, min_lanes=5)
    assert_same_step(model, call, X[:, :4])
    assert counting.heavy() == 8


@pytest.mark.parametrize("lowering", ["grouped_conv", "bmm"])
def test_a_lowering_that_is_asked_for(lowering):
    model = nam()
    call, counting = compiled(model, lowering=lowering)
    assert_same_step(model, call, X)
    names = [getattr(node.target, "__name__", "") for node in counting.graphs[0].graph.nodes]
    assert names.count("conv1d" if lowering == "grouped_conv" else "baddbmm") == 2


def test_tuning():
    model = nam()
    call, _ = compiled(model, tune=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on a busy machine the loop may win
        assert_same_step(model, call, X)


def test_without_validation_nothing_is_compared(monkeypatch):
    monkeypatch.setattr("fxfuse.dynamo.checked.check", lambda *args: pytest.fail("compared"))
    model = nam()
    call, _ = compiled(model, validate=False)
    assert_same_step(model, call, X)


def test_a_loop_that_is_clearly_faster_stays(monkeypatch, caplog):
    monkeypatch.setattr("fxfuse.dynamo.worth.SLOWER", 0.0)
    model = nam()
    call, counting = compiled(model)
    with caplog.at_level("INFO", "fxfuse"), warnings.catch_warnings():
        warnings.simplefilter("error")  # it is no failure
        call(X)
    assert "left as a loop: packed runs" in caplog.text
    assert counting.heavy() == 20


def test_equal_backends_are_one_to_dynamo():
    assert fxfuse.backend(min_lanes=3) == fxfuse.backend(min_lanes=3) != fxfuse.backend()


def test_the_pass_rewrites_a_graph_in_place():
    model = nam()
    done = []

    def backend(graph, inputs):
        fxfuse.inductor_pass()(graph.graph)
        graph.graph.lint()
        graph.recompile()
        done.append(graph)
        return graph.forward

    call = torch.compile(model, backend=backend)
    assert_same_step(model, call, X)
    assert_same_step(model, call, X)
    assert len(done[0].graph.find_nodes(op="call_function", target=torch.addcmul)) == 1
    assert not done[0].graph.find_nodes(op="call_function", target=F.relu)


def test_the_pass_leaves_what_it_cannot_fuse(monkeypatch):
    model = randomized(nn.Sequential(nn.Linear(3, 4), nn.Tanh()))
    call = torch.compile(model, backend=lambda graph, inputs: fxfuse.inductor_pass()(graph.graph) or graph.forward)
    torch.testing.assert_close(call(randn(5, 3)), model(randn(5, 3)), rtol=1e-10, atol=1e-12)
    monkeypatch.setattr("fxfuse.dynamo.checked.rewrite", lambda *args: 1 / 0)
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match="fxfuse failed"):
        torch.testing.assert_close(call(randn(5, 3)), model(randn(5, 3)), rtol=1e-10, atol=1e-12)


def test_the_pass_where_the_examples_are_gone():
    def forward(self, words, x):
        return torch.cat([table(words[:, i]) + net(x) for i, (table, net) in enumerate(zip(self.tables, self.nets))], 1)

    model = randomized(
        model_of(forward, tables=nn.ModuleList(nn.Embedding(5, 3) for _ in range(9)), nets=nn.ModuleList(nn.Linear(4, 3) for _ in range(9)))
    )

    def backend(graph, inputs):
        placeholders = graph.graph.find_nodes(op="placeholder")
        kept = [node.meta.pop("grapharg") for node in placeholders]
        fxfuse.inductor_pass()(graph.graph)
        graph.recompile()
        for node, argument in zip(placeholders, kept):
            node.meta["grapharg"] = argument
        assert len(list(graph.graph.nodes)) < 90
        return graph.forward

    call = torch.compile(model, backend=backend)
    assert_same_step(model, call, (torch.randint(5, (4, 9)), randn(4, 4)))


@COMPILER
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_pass_inside_inductor():
    model = nam()
    call = torch.compile(model, options={"pre_grad_custom_pass": fxfuse.inductor_pass()})
    with torch.no_grad():
        torch.testing.assert_close(call(X), model(X), rtol=1e-10, atol=1e-12)


@COMPILER
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_pass_costs_views_of_stand_ins(caplog):
    """Lanes that are joined by columns: a stand-in that cannot be viewed raises another error than a tensor."""

    def columns(self, x):
        return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)

    model = randomized(model_of(columns, nets=nn.ModuleList(nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(9))))
    with caplog.at_level("INFO", logger="fxfuse"):
        call = torch.compile(model, options={"pre_grad_custom_pass": fxfuse.inductor_pass()})
        torch.testing.assert_close(call(randn(5, 9)), model(randn(5, 9)), rtol=1e-10, atol=1e-12)
    assert "looked at" in caplog.text
    assert "fxfuse failed" not in caplog.text


def test_the_pass_has_an_identity_of_its_settings_and_its_source(monkeypatch, tmp_path):
    assert fxfuse.inductor_pass().uuid() == fxfuse.inductor_pass().uuid()
    assert fxfuse.inductor_pass().uuid() != fxfuse.inductor_pass(lowering="bmm").uuid()
    before = fxfuse.inductor_pass().uuid()
    copy = tmp_path / "fxfuse"
    shutil.copytree(ROOT / "fxfuse", copy)
    monkeypatch.setattr(fxfuse, "__file__", str(copy / "__init__.py"))
    assert fxfuse.inductor_pass().uuid() == before
    (copy / "passes" / "bundle.py").write_text("# another version")
    assert fxfuse.inductor_pass().uuid() != before


def test_guards_are_filtered_as_with_any_backend():
    model = nam()
    seen = []

    def without_modules(guards):
        seen.extend(guards)
        return torch.compiler.skip_guard_on_inbuilt_nn_modules_unsafe(guards)

    call = torch.compile(model, backend=by_name, options={"inner": Counting(), "guard_filter_fn": without_modules})
    for _ in range(2):
        assert_same_step(model, call, X)
    assert seen
    model.nets[3][0].weight.data = randn(6, 1, seed=9)  # where the weights are is looked at without dynamo's guards
    assert_same_step(model, call, X)


@pytest.mark.parametrize(("context", "mode"), [(torch.enable_grad, "train"), (torch.no_grad, "infer"), (torch.inference_mode, "infer")])
def test_what_a_graph_is_planned_for(monkeypatch, context, mode):
    modes = []

    class Seen(rewrite.Planner):
        def __init__(self, prepared, region, packs, options, **more):
            modes.append(options.mode)
            super().__init__(prepared, region, packs, options, **more)

    monkeypatch.setattr(rewrite, "Planner", Seen)
    call = torch.compile(nam(), backend="fxfuse", options={"inner": "eager"})
    with context():
        call(X)
    assert modes == [mode]
