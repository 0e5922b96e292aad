"""``.pt2``: programs of torch.export that compute what the original does, without fxfuse."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from converting import fused
from small_loops import KINDS
from torch import nn

import fxfuse
from checks import assert_close, model_of, plain, randn, randomized
from fxfuse import convert
from fxfuse.convert.program import export
from fxfuse.convert.pt2 import save
from fxfuse.errors import ConvertError
from fxfuse.private.pytree import tree_leaves


def assert_answers(loaded, model, inputs, batches=(1, 2, 5, 8)):
    for seed, batch in enumerate(batches):
        args = inputs(10 + seed, batch)
        with torch.no_grad():
            expected, found = tree_leaves(plain(model(*args))), tree_leaves(plain(loaded(*args)))
        assert len(found) == len(expected)
        for number, (a, b) in enumerate(zip(found, expected)):
            assert_close(a, b, f"output {number} of {batch} rows")


@pytest.mark.parametrize("kind", KINDS)
def test_a_program_answers_as_the_original_for_any_batch_size(kind, tmp_path):
    model, made, inputs = fused(kind)
    written = convert.write(made, model, (inputs(1, 5), {}), tmp_path / "net.pt2", static=False, progress=None)
    assert written.kind == "pt2"
    assert written.bytes == (tmp_path / "net.pt2").stat().st_size
    loaded = convert.load(tmp_path / "net.pt2")
    assert not hasattr(loaded, "_fxfuse_region")
    assert_answers(loaded, model, inputs)
    calls = [str(node.target) for node in torch.export.load(tmp_path / "net.pt2").graph.nodes if node.op == "call_function"]
    assert calls
    assert not any("fxfuse" in call for call in calls)


def test_the_program_reads_packs_and_no_lanes(tmp_path):
    _, made, inputs = fused("columns")
    program = export(made, (inputs(1, 5), {}), static=False)
    assert set(program.state_dict) == set(made.state_dict())
    calls = [str(node.target) for node in program.graph.nodes]
    heavy = [call for call in calls if any(name in call for name in ("addmm", "bmm", "linear"))]
    assert len(heavy) <= 3, program.graph  # two layers of all lanes, and the head


def test_a_full_disk_is_an_error_and_not_the_end_of_the_process():
    _, made, inputs = fused("columns")
    program = export(made, (inputs(1, 5), {}), static=False)
    with pytest.raises(OSError, match="No space left"):
        save(program, Path("/dev/full"))


def test_exporting_changes_nothing_of_the_model(tmp_path):
    model, inputs = KINDS["conv_norm"]()
    made = fxfuse.optimize(model.train(), inputs(1, 5), objective="launches", tune=False, validate=False)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    random = torch.get_rng_state()
    convert.write(made, model, (inputs(1, 5), {}), tmp_path / "net.pt2")
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in made.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not fxfuse.report(made).fallbacks
    assert made.training
    made.eval(), model.eval()
    args = inputs(3, 4)
    assert_close(made(*args), model(*args), "after exporting")


def test_the_train_mode_updates_the_statistics_in_the_program(tmp_path):
    model, inputs = KINDS["conv_norm"]()
    made = fxfuse.optimize(model.train(), inputs(1, 5), objective="launches", tune=False, validate=False)
    written = convert.write(made, model, (inputs(1, 5), {}), tmp_path / "net.pt2")
    assert "of the train mode" in written.notes
    loaded = convert.load(tmp_path / "net.pt2")
    args = inputs(3, 6)
    assert_close(loaded(*args), model(*args), "in train mode")
    reference = fxfuse.optimize(model, inputs(1, 5), objective="launches", tune=False, validate=False).state_dict()
    for name, value in loaded.state_dict().items():
        assert_close(value.double(), reference[name].double(), name)


def test_static_holds_for_one_batch_size_only(tmp_path):
    model, made, inputs = fused("columns")
    written = convert.write(made, model, (inputs(1, 5), {}), tmp_path / "net.pt2", static=True)
    assert "for this batch size only" in written.notes
    loaded = convert.load(tmp_path / "net.pt2")
    assert_answers(loaded, model, inputs, batches=(5, 5))
    with pytest.raises(Exception, match=r"[Gg]uard|size|shape"):
        loaded(*inputs(2, 6))


def test_an_example_of_one_row_gives_a_program_for_any(tmp_path):
    model, made, inputs = fused("columns")
    convert.write(made, model, (inputs(1, 1), {}), tmp_path / "net.pt2")
    assert_answers(convert.load(tmp_path / "net.pt2"), model, inputs)


def test_keywords_dicts_and_constants_of_the_call_stay(tmp_path):
    def forward(self, x, *, scale=1.0, extra=None):
        out = torch.stack([net(x[:, i]) for i, net in enumerate(self.nets)], 1) * scale
        return {"out": out if extra is None else out + extra["shift"], "both": (out, x)}

    model = randomized(model_of(forward, nets=nn.ModuleList(nn.Linear(3, 4) for _ in range(4)))).eval()
    x, kwargs = randn(5, 4, 3), {"scale": 2.0, "extra": {"shift": randn(5, 4, 4, seed=4)}}
    made = fxfuse.optimize(model, (x,), example_kwargs=kwargs, objective="launches", tune=False, validate=False)
    convert.write(made, model, ((x,), kwargs), tmp_path / "net.pt2")
    loaded = convert.load(tmp_path / "net.pt2")
    for batch in (2, 7):
        x, kwargs = randn(batch, 4, 3, seed=8), {"scale": 2.0, "extra": {"shift": randn(batch, 4, 4, seed=9)}}
        found, expected = loaded(x, **kwargs), model(x, **kwargs)
        assert_close(found["out"], expected["out"], "out")
        assert_close(found["both"][0], expected["both"][0], "both")
        assert torch.equal(found["both"][1], x)


def test_a_region_that_changed_since_is_exported_as_the_loop_that_it_runs(tmp_path):
    model, inputs = KINDS["columns"]()
    made = fxfuse.optimize(model.eval(), inputs(1, 5), objective="launches", tune=False, validate=False)
    made.nets[1][0].register_forward_hook(lambda module, args, out: out * 3)
    args = inputs(4, 6)
    expected = made(*args)
    convert.write(made, None, (inputs(1, 5), {}), tmp_path / "net.pt2")
    assert_close(convert.load(tmp_path / "net.pt2")(*args), expected, "with a hook")
    assert (expected - model(*args)).abs().max() > 1e-3


def test_a_model_without_loops_is_exported_too(tmp_path):
    model = randomized(nn.Sequential(nn.Linear(3, 4), nn.Tanh())).eval()
    convert.write(fxfuse.optimize(model, randn(4, 3)), model, ((randn(4, 3),), {}), tmp_path / "net.pt2")
    x = randn(7, 3, seed=3)
    assert_close(convert.load(tmp_path / "net.pt2")(x), model(x), "out")


def test_attributes_that_forward_sets_are_not_left_behind(tmp_path):
    def forward(self, x):
        self.scores = torch.stack([net(x[:, i]) for i, net in enumerate(self.nets)], 1)
        return self.scores.sum(1)

    model = randomized(model_of(forward, nets=nn.ModuleList(nn.Linear(3, 4) for _ in range(4)))).eval()
    made = fxfuse.optimize(model, randn(5, 4, 3), objective="launches", tune=False, validate=False)
    before = made(randn(5, 4, 3)).clone(), made.scores
    convert.write(made, model, ((randn(5, 4, 3),), {}), tmp_path / "net.pt2")
    assert made.scores is before[1]
    x = randn(3, 4, 3, seed=5)
    assert_close(convert.load(tmp_path / "net.pt2")(x), model(x), "out")


def test_control_flow_that_depends_on_data_is_a_sentence(tmp_path):
    def forward(self, x):
        out = torch.stack([net(x[:, i]) for i, net in enumerate(self.inner.nets)], 1)
        return out * 2 if out.sum() > 0 else out - 1

    model = randomized(model_of(forward, inner=nn.Module())).eval()
    model.inner.nets = randomized(nn.ModuleList(nn.Linear(3, 4) for _ in range(4)))
    made = fxfuse.optimize(model, randn(5, 4, 3), objective="launches", tune=False)
    with pytest.raises(ConvertError, match=r"torch.export cannot export the model .*data-dependent") as caught:
        convert.write(made, model, ((randn(5, 4, 3),), {}), tmp_path / "net.pt2")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "net.pt2").exists()


def test_a_model_of_one_batch_size_says_static(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.nets = nn.ModuleList(nn.Linear(3, 4) for _ in range(4))
            self.shift = nn.Parameter(torch.randn(5, 4, 4))

        def forward(self, x):
            return torch.stack([net(x[:, i]) for i, net in enumerate(self.nets)], 1) + self.shift

    model = randomized(Net()).eval()
    made = fxfuse.optimize(model, randn(5, 4, 3), objective="launches", tune=False)
    with pytest.raises(ConvertError, match="--static") as caught:
        convert.write(made, model, ((randn(5, 4, 3),), {}), tmp_path / "net.pt2")
    assert "\n" not in str(caught.value)
    convert.write(made, model, ((randn(5, 4, 3),), {}), tmp_path / "net.pt2", static=True)
    assert_close(convert.load(tmp_path / "net.pt2")(randn(5, 4, 3, seed=6)), model(randn(5, 4, 3, seed=6)), "out")


_WITHOUT = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("fxfuse", "passes", "small_loops", "checks"):
            raise ImportError(name + " is not installed here")
sys.meta_path.insert(0, Blocked())
import torch
for kind in sys.argv[2:]:
    module = torch.export.load(f"{sys.argv[1]}/{kind}.pt2").module()
    for args, expected in torch.load(f"{sys.argv[1]}/{kind}.calls"):
        found = module(*args)
        assert type(found) is type(expected)
        error = (found - expected).abs().max() / expected.abs().max()
        assert error < 1e-12, (kind, float(error))
assert not [name for name in sys.modules if name.partition(".")[0] == "fxfuse"]
print("fine")
"""


def test_a_process_without_fxfuse_runs_the_programs(tmp_path):
    kinds = ["columns", "conv_norm", "embeddings", "lstms"]
    for kind in kinds:
        model, made, inputs = fused(kind)
        convert.write(made, model, (inputs(1, 5), {}), tmp_path / f"{kind}.pt2")
        calls = [inputs(20 + batch, batch) for batch in (1, 4, 7)]
        torch.save([(args, model(*args).detach()) for args in calls], tmp_path / f"{kind}.calls")
    done = subprocess.run([sys.executable, "-I", "-c", _WITHOUT, str(tmp_path), *kinds], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "fine"
