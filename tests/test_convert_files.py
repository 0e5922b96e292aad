"""``.safetensors``, folders, ``restore``, ``read_weights``, ``.onnx``: what was written is what was there."""

import json
import os
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
from fxfuse.errors import ConvertError, MissingPackageError
from fxfuse.private.pytree import tree_leaves


def assert_same_checkpoint(found, expected, ordered=True):
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        assert torch.equal(found[name].cpu(), value), name
    if ordered:
        assert list(found) == list(expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_restore_gives_the_originals_checkpoint_bit_for_bit(kind, ending, tmp_path):
    pytest.importorskip("safetensors")
    model, made, _ = fused(kind)
    written = convert.write(made, model, ((), {}), tmp_path / "net.safetensors")
    assert written.kind == "safetensors"
    convert.restore(tmp_path / "net.safetensors", tmp_path / f"back.{ending}")
    found = convert.read_weights(tmp_path / f"back.{ending}")
    assert_same_checkpoint(found, model.state_dict(), ordered=ending == "pt")
    fresh, _ = KINDS[kind]()
    fresh.load_state_dict(found)




def test_a_folder_holds_all_of_it_and_runs(tmp_path):
    pytest.importorskip("safetensors")
    model, made, inputs = fused("conv_norm")
    written = convert.write(made, model, (inputs(1, 5), {}), tmp_path / "net")
    names = {path.name for path in (tmp_path / "net").iterdir()}
    assert names == {"model.pt2", "weights.safetensors", "recipes.json", "report.json", "report.txt"}
    assert written.bytes == sum(path.stat().st_size for path in (tmp_path / "net").iterdir())
    assert json.loads((tmp_path / "net" / "report.json").read_text())["fused"]
    assert str(fxfuse.report(made)) in (tmp_path / "net" / "report.txt").read_text()
    recipes = json.loads((tmp_path / "net" / "recipes.json").read_text())
    assert set(recipes["original"]) == set(model.state_dict())
    args = inputs(3, 8)
    assert_close(convert.load(tmp_path / "net")(*args), model(*args), "out")


@pytest.mark.parametrize("metadata", [True, False])
def test_weights_that_were_trained_further_come_back_and_run(metadata, tmp_path):
    """``recipes.json`` stays when the weights beside it are saved by a program that keeps no metadata."""
    pytest.importorskip("safetensors")
    from safetensors.torch import load_file, save_file

    model, inputs = KINDS["columns"]()
    made = fxfuse.optimize(model.eval(), inputs(1, 5), objective="launches", tune=False, validate=False)
    convert.write(made, model, (inputs(1, 5), {}), tmp_path / "net")
    if metadata:
        with torch.no_grad():
            for number, parameter in enumerate(made.parameters()):
                parameter.add_(torch.randn(parameter.shape, dtype=parameter.dtype), alpha=0.1 + number)
        convert.write(made, model, ((), {}), tmp_path / "net" / "weights.safetensors")
    else:
        tensors = {name: value + torch.randn_like(value) for name, value in load_file(tmp_path / "net" / "weights.safetensors").items()}
        save_file(tensors, tmp_path / "net" / "weights.safetensors")
        made.load_state_dict(tensors)
    convert.restore(tmp_path / "net", tmp_path / "back.pt")
    found = convert.read_weights(tmp_path / "back.pt")
    assert_same_checkpoint(found, fxfuse.original_state_dict(made))
    assert not torch.equal(found["head.weight"], model.state_dict()["head.weight"])
    args = inputs(3, 8)
    model.load_state_dict(found)
    assert_close(convert.load(tmp_path / "net")(*args), model(*args), "out")


def test_tied_and_shared_tensors_are_written_once_and_restored(tmp_path):
    pytest.importorskip("safetensors")

    def forward(self, x):
        out = torch.stack([net(x[:, i]) for i, net in enumerate(self.nets)], 1)
        return self.head(out) + self.again(out)

    head = nn.Linear(4, 4)
    model = randomized(model_of(forward, nets=nn.ModuleList(nn.Linear(3, 4) for _ in range(4)), head=head, again=head)).eval()
    model.view = nn.Parameter(model.head.weight.detach()[:2])  # a part of another tensor's memory
    made = fxfuse.optimize(model, randn(5, 4, 3), objective="launches", tune=False)
    assert fxfuse.report(made).fused
    convert.write(made, model, ((randn(5, 4, 3),), {}), tmp_path / "net")
    convert.restore(tmp_path / "net", tmp_path / "back.pt")
    assert_same_checkpoint(convert.read_weights(tmp_path / "back.pt"), model.state_dict())
    x = randn(2, 4, 3, seed=4)
    assert_close(convert.load(tmp_path / "net")(x), model(x), "out")


def test_restore_says_what_is_wrong(tmp_path):
    pytest.importorskip("safetensors")
    from safetensors.torch import save_file

    model, made, inputs = fused("columns")
    convert.write(made, model, (inputs(1, 5), {}), tmp_path / "net")
    with pytest.raises(ConvertError, match="must end in"):
        convert.restore(tmp_path / "net", tmp_path / "back.onnx")
    with pytest.raises(ConvertError, match="is not there"):
        convert.restore(tmp_path / "nowhere", tmp_path / "back.pt")
    with pytest.raises(ConvertError, match="has no weights"):
        convert.restore(tmp_path, tmp_path / "back.pt")
    save_file({"a": torch.zeros(3)}, tmp_path / "plain.safetensors")
    with pytest.raises(ConvertError, match="no recipes"):
        convert.restore(tmp_path / "plain.safetensors", tmp_path / "back.pt")
    tensors = convert.read_weights(tmp_path / "net" / "weights.safetensors")
    name = next(name for name in tensors if name.startswith("packed"))
    save_file({**tensors, name: torch.zeros(2)}, tmp_path / "net" / "weights.safetensors")
    with pytest.raises(ConvertError, match=f"{name} has shape"):
        convert.restore(tmp_path / "net", tmp_path / "back.pt")
    save_file({"a": torch.zeros(2)}, tmp_path / "net" / "weights.safetensors")
    with pytest.raises(ConvertError, match="the weights lack"):
        convert.restore(tmp_path / "net", tmp_path / "back.pt")
    with pytest.raises(ConvertError, match="does not fit"):
        convert.load(tmp_path / "net")
    whole = json.loads((tmp_path / "net" / "recipes.json").read_text())
    empty, odd = ({**whole, **other} for other in ({"original": {}}, {"versions": 3}))
    save_file(tensors, tmp_path / "net" / "weights.safetensors")
    for text in ("{", "[]", '{"fxfuse": 1}', '{"fxfuse": 1, "recipes": {"a": 3}, "original": {}}', json.dumps(empty), json.dumps(odd)):
        (tmp_path / "net" / "recipes.json").write_text(text)
        with pytest.raises(ConvertError):
            convert.restore(tmp_path / "net", tmp_path / "back.pt")
    assert not (tmp_path / "back.pt").exists()


class Old(nn.Linear):
    """Its first version kept the weight with the other sign."""

    _version = 2

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        if metadata.get("version", 1) < 2:
            state[f"{prefix}weight"] = -state[f"{prefix}weight"]
        super()._load_from_state_dict(state, prefix, metadata, *rest)


class Olds(nn.Module):
    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(Old(3, 4), nn.BatchNorm1d(4)) for _ in range(3))

    def forward(self, x):
        return torch.stack([net(x) for net in self.nets], 1)


@pytest.mark.parametrize("source", ["net", "net.safetensors", "net.pt"])
def test_restore_writes_the_versions_of_modules(tmp_path, source):
    """Without them ``load_state_dict`` takes a checkpoint for one of the first version."""
    pytest.importorskip("safetensors")
    model, x = randomized(Olds()).eval(), randn(4, 3)
    made = fxfuse.optimize(model, x, objective="launches", tune=False)
    assert fxfuse.report(made).fused, fxfuse.report(made)
    if source == "net.pt":
        torch.save(made.state_dict(), tmp_path / source)
    else:
        convert.write(made, None, ((x,), {}), tmp_path / source)
    convert.restore(tmp_path / source, tmp_path / "back.pt")
    found = torch.load(tmp_path / "back.pt", weights_only=True)
    assert dict(found._metadata) == dict(model.state_dict()._metadata)
    again = Olds().to(next(model.parameters()).dtype)
    again.load_state_dict(found)
    assert_same_checkpoint(again.state_dict(), model.state_dict())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        self.table, self.out = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.out.weight = self.table.weight

    def forward(self, index):
        x = self.table(index)
        return self.out(sum(net(x) for net in self.nets))


@pytest.mark.parametrize("kept", ["table.weight", "out.weight"])
def test_tied_weights_may_be_saved_under_any_of_their_names(tmp_path, kept):
    pytest.importorskip("safetensors")
    from safetensors.torch import load_file, save_file, save_model

    model, index = randomized(Tied()).eval(), torch.arange(5)
    made = fxfuse.optimize(model, index, objective="launches", tune=False)
    convert.write(made, None, ((index,), {}), tmp_path / "net")
    net, weights = convert.load(tmp_path / "net"), tmp_path / "net" / "weights.safetensors"
    with torch.no_grad():
        for parameter in (*net.parameters(), *model.parameters()):
            parameter.mul_(1.5)
    save_model(net, str(weights))
    saved = load_file(weights)
    value = next(saved.pop(name) for name in ("table.weight", "out.weight") if name in saved)
    save_file({**saved, kept: value}, weights)
    assert_close(convert.load(tmp_path / "net")(index), model(index), "out")
    convert.restore(tmp_path / "net", tmp_path / "back.pt")
    found = torch.load(tmp_path / "back.pt", weights_only=True)
    assert_same_checkpoint(found, model.state_dict())
    assert found["out.weight"].data_ptr() == found["table.weight"].data_ptr()


def test_a_folder_without_its_weights_is_not_loaded_with_older_ones(tmp_path):
    pytest.importorskip("safetensors")
    model, made, inputs = fused("columns")
    convert.write(made, model, (inputs(1, 5), {}), tmp_path / "net")
    (tmp_path / "net" / "weights.safetensors").unlink()
    with pytest.raises(ConvertError, match=r"net has no weights\.safetensors: put it there again, or load .*model\.pt2"):
        convert.load(tmp_path / "net")


def test_checkpoints_in_the_forms_that_people_have(tmp_path):
    state = randomized(nn.Linear(3, 4)).state_dict()
    for name, value in {"plain": state, "wrapped": {"state_dict": state, "epoch": 3}, "model": {"model": state}}.items():
        torch.save(value, tmp_path / f"{name}.pt")
        assert_same_checkpoint(convert.read_weights(tmp_path / f"{name}.pt"), state)
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_same_checkpoint(convert.read_weights(tmp_path / "old.pt"), state)
    torch.save({"a": 3}, tmp_path / "odd.pt")
    torch.save([1], tmp_path / "list.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "plain.pt").read_bytes()[:-200])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("odd", "list", "cut", "text", "empty", "missing"):
        with pytest.raises(ConvertError) as caught:
            convert.read_weights(tmp_path / f"{name}.pt")
        assert "\n" not in str(caught.value)
    with pytest.raises(ConvertError, match="is a folder"):
        convert.read_weights(tmp_path)


def test_safetensors_that_are_cut_off(tmp_path):
    pytest.importorskip("safetensors")
    model, made, _ = fused("columns")
    convert.write(made, model, ((), {}), tmp_path / "net.safetensors")
    data = (tmp_path / "net.safetensors").read_bytes()
    for name, part in {"cut": data[:-10], "head": data[:50], "empty": b"", "text": b"hello world"}.items():
        (tmp_path / f"{name}.safetensors").write_bytes(part)
        with pytest.raises(ConvertError) as caught:
            convert.read_weights(tmp_path / f"{name}.safetensors")
        assert "\n" not in str(caught.value)
    with pytest.raises(ConvertError, match="no program"):
        convert.load(tmp_path / "net.safetensors")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    import sys

    model, made, inputs = fused("columns")
    for package in ("safetensors", "safetensors.torch", "onnx"):
        monkeypatch.setitem(sys.modules, package, None)
    for name, package in {"net.safetensors": "safetensors", "net.onnx": "onnx"}.items():
        with pytest.raises(MissingPackageError, match=rf"{package}, which is not installed: pip install 'fxfuse\[convert\]'"):
            convert.write(made, model, (inputs(1, 5), {}), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["columns", "conv_norm", "embeddings", "lstms"])
def test_onnx_answers_as_the_original_for_any_batch_size(kind, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    single = kind == "conv_norm"  # onnxruntime has no convolution in float64
    model, made, inputs = fused(kind, single)
    written = convert.write(made, model, (inputs(1, 5), {}), tmp_path / "net.onnx")
    assert written.kind == "onnx"
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
    loaded = convert.load(tmp_path / "net.onnx")
    for batch in (1, 5, 8):
        args = inputs(30 + batch, batch)
        for a, b in zip(tree_leaves(plain(loaded(*args))), tree_leaves(plain(model(*args))), strict=True):
            assert_close(a, b, f"{kind}, {batch} rows", rtol=1e-5 if single else 1e-12)


def test_onnx_shows_one_convolution_for_all_lanes_and_batched_products(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model, made, inputs = fused("conv_norm", True)
    convert.write(made, model, (inputs(1, 5), {}), tmp_path / "net.onnx")
    nodes = [node for node in onnx.load(tmp_path / "net.onnx").graph.node if node.op_type == "Conv"]
    groups = [attribute.i for node in nodes for attribute in node.attribute if attribute.name == "group"]
    assert groups == [3]
    model, made, inputs = fused("columns")
    convert.write(made, model, (inputs(1, 5), {}), tmp_path / "net.onnx")
    assert "MatMul" in {node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node}


def test_onnx_keeps_the_containers_of_the_call(tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")

    def forward(self, x, *, extra, scale=1.0):
        out = torch.stack([net(x[:, i]) for i, net in enumerate(self.nets)], 1) * scale
        return {"out": out + extra["shift"], "both": (out, [out.sum(1)])}

    model = randomized(model_of(forward, nets=nn.ModuleList(nn.Linear(3, 4) for _ in range(4)))).eval()
    kwargs = {"extra": {"shift": randn(5, 4, 4, seed=4)}, "scale": 2.0}
    made = fxfuse.optimize(model, (randn(5, 4, 3),), example_kwargs=kwargs, objective="launches", tune=False, validate=False)
    convert.write(made, model, ((randn(5, 4, 3),), kwargs), tmp_path / "net.onnx")
    x, kwargs = randn(7, 4, 3, seed=8), {"extra": {"shift": randn(7, 4, 4, seed=9)}, "scale": 2.0}
    found, expected = convert.load(tmp_path / "net.onnx")(x, **kwargs), model(x, **kwargs)
    assert_close(found["out"], expected["out"], "out")
    assert type(found["both"]) is tuple
    assert_close(found["both"][1][0], expected["both"][1][0], "sum")
    with pytest.raises(ConvertError, match="does not fit"):
        convert.load(tmp_path / "net.onnx")(x)
    with pytest.raises(ConvertError, match="scale"):
        convert.load(tmp_path / "net.onnx")(x, **{**kwargs, "scale": 3.0})


def test_an_onnx_that_onnxruntime_lacks_operators_for_is_a_sentence(tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model, made, inputs = fused("conv_norm")
    with pytest.raises(ConvertError, match="in float32"):
        convert.write(made, model, (inputs(1, 5), {}), tmp_path / "net.onnx")


def test_a_foreign_onnx_is_a_sentence(tmp_path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "net.onnx").write_bytes(b"hello")
    with pytest.raises(ConvertError, match="no ONNX model") as caught:
        convert.load(tmp_path / "net.onnx")
    assert "\n" not in str(caught.value)


def test_load_says_what_it_reads(tmp_path):
    with pytest.raises(ConvertError, match="is not there"):
        convert.load(tmp_path / "net.pt2")
    with pytest.raises(ConvertError, match="has no model"):
        convert.load(tmp_path)
    (tmp_path / "net.txt").write_text("x")
    with pytest.raises(ConvertError, match="is a file"):
        convert.load(tmp_path / "net.txt")
    (tmp_path / "dir.pt2").mkdir()
    with pytest.raises(ConvertError, match="is a folder"):
        convert.load(tmp_path / "dir.pt2")


@pytest.mark.slow
def test_aotinductor_compiles_and_is_refused_from_elsewhere(tmp_path, monkeypatch):
    import shutil

    from fxfuse.convert import aoti

    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    model, made, inputs = fused("columns")
    convert.write(made, model, (inputs(1, 5), {}), tmp_path / "net.aoti.pt2")
    loaded = convert.load(tmp_path / "net.aoti.pt2")
    args = inputs(3, 8)
    assert_close(loaded(*args), model(*args), "out")
    monkeypatch.setattr(aoti, "_written", set())  # as in another process
    with pytest.raises(ConvertError, match="machine code"):
        convert.load(tmp_path / "net.aoti.pt2")
    assert_close(convert.load(tmp_path / "net.aoti.pt2", allow_pickle=True)(*args), model(*args), "out")


def test_without_a_compiler_aotinductor_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    model, made, inputs = fused("columns")
    with pytest.raises(ConvertError, match="needs a C\\+\\+ compiler"):
        convert.write(made, model, (inputs(1, 5), {}), tmp_path / "net.aoti.pt2")


def test_a_file_that_may_not_be_opened_is_named_with_the_reason(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    model, made, inputs = fused("columns")
    convert.write(made, model, (inputs(1, 5), {}), tmp_path / "net")
    true_open = Path.open
    for hidden in (tmp_path / "net" / "weights.safetensors", tmp_path / "net" / "recipes.json"):

        def refusing(path, *args, hidden=hidden, **kwargs):  # root, as which tests may run, opens whatever it likes
            if path == hidden:
                raise PermissionError(13, "Permission denied", str(path))
            return true_open(path, *args, **kwargs)

        monkeypatch.setattr(Path, "open", refusing)

        def read_text(path, encoding):
            with path.open(encoding=encoding) as file:
                return file.read()

        monkeypatch.setattr(Path, "read_text", read_text)
        with pytest.raises(ConvertError, match=rf"{hidden.name} cannot be read: Permission denied"):
            convert.restore(tmp_path / "net", tmp_path / "back.safetensors")
        monkeypatch.undo()
    assert not (tmp_path / "back.safetensors").exists()


def test_a_torch_without_the_writer_of_aotinductor_is_a_sentence(tmp_path):
    """In a process of its own: fxfuse.convert is imported there, and all else works."""
    code = """
import sys
import types
name = "torch.export.pt2_archive._package"
import torch.export.pt2_archive._package as real
stub = types.ModuleType(name)  # as of a torch that keeps it elsewhere
stub.__dict__.update({k: v for k, v in vars(real).items() if k != "PT2ArchiveWriter"})
sys.modules[name] = stub
import torch, fxfuse
from fxfuse import convert
from fxfuse.errors import ConvertError
model, x = torch.nn.Linear(2, 3).eval(), torch.ones(4, 2)
convert.write(model, None, ((x,), {}), "folder")
try:
    convert.write(model, None, ((x,), {}), "net.aoti.pt2")
except ConvertError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(fxfuse.__file__).parents[1]), "CXX": sys.executable}
    words = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True)
    assert "has no writer for packages of AOTInductor" in done.stdout, done
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
