"""What a converted model returns: named tuples, dataclasses, dicts of a class; files that name such classes."""

import json
import zipfile
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import fxfuse
from checks import assert_close, randomized
from fxfuse import convert
from fxfuse.errors import ConvertError

Pair = namedtuple("Pair", "mean scale")
Known = namedtuple("Known", "mean scale")


@dataclass
class Registered:
    mean: torch.Tensor
    scale: torch.Tensor | None = None


@dataclass
class Nameless:
    mean: torch.Tensor


@dataclass
class Unknown:
    mean: torch.Tensor


class Names(dict):
    """Nobody has registered it."""


class Other:
    def __init__(self, mean):
        self.mean = mean


class Labelled(Other):
    """torch knows how to take it apart, files have no name for it."""


class Output(OrderedDict):
    """As the outputs of transformers are."""


pytree._register_namedtuple(Known, serialized_type_name="test_containers.Known")
torch.export.register_dataclass(Registered, serialized_type_name="test_containers.Registered")
torch.export.register_dataclass(Nameless)
pytree.register_pytree_node(Labelled, lambda value: ([value.mean], None), lambda values, context: Labelled(*values))
pytree.register_pytree_node(
    Output,
    lambda output: (list(output.values()), list(output.keys())),
    lambda values, keys: Output(zip(keys, values)),
    serialized_type_name="test_containers.Output",
)


class Returning(nn.Module):
    """Loops over small networks; the result is put into a container by ``made``."""

    def __init__(self, made):
        super().__init__()
        self.nets = nn.ModuleList(nn.Linear(1, 3) for _ in range(4))
        self.made = made

    def forward(self, x):
        return self.made(torch.cat([net(x[:, i:i + 1]) for i, net in enumerate(self.nets)], 1), x.exp())


def assert_same(found, expected):
    leaves, spec = pytree.tree_flatten(found)
    wanted, _ = pytree.tree_flatten(expected)
    assert len(leaves) == len(wanted) == spec.num_leaves
    for leaf, want in zip(leaves, wanted):
        assert_close(leaf, want, "out")


def written(made, out):
    model = randomized(Returning(made)).eval()
    x = torch.randn(5, 4, dtype=torch.float64)
    fused = fxfuse.optimize(model, x, objective="launches", tune=False)
    assert fxfuse.report(fused).fused
    return model, convert.write(fused, None, ((x,), {}), out)


@pytest.mark.parametrize("ending", [".pt2", ""])
def test_named_tuples_are_written_as_tuples(ending, tmp_path):
    out = tmp_path / f"net{ending}"
    model, said = written(lambda y, z: {"both": Pair(y, [z, Pair(y, z)])}, out)
    assert "Pair is returned as a plain tuple" in said.notes
    x = torch.randn(7, 4, dtype=torch.float64)
    found, expected = convert.load(out)(x), model(x)
    assert type(found["both"]) is tuple
    assert type(found["both"][1][1]) is tuple
    assert_same(found, expected)


@pytest.mark.parametrize("made", [
    Known,
    Registered,
    lambda y, z: Registered(y),
    lambda y, z: Output(mean=y, scale=z),
    lambda y, z: (Registered(y, z), [Known(y, z)]),
], ids=["namedtuple", "dataclass", "dataclass with None", "dict of a class", "nested"])  # fmt: skip
def test_classes_that_are_registered_come_back(made, tmp_path):
    model, said = written(made, tmp_path / "net.pt2")
    assert not [note for note in said.notes if "tuple" in note]
    x = torch.randn(7, 4, dtype=torch.float64)
    found, expected = convert.load(tmp_path / "net.pt2")(x), model(x)
    assert type(found) is type(expected)
    assert_same(found, expected)


@pytest.mark.parametrize(("made", "plain", "name"), [
    (lambda y, z: Unknown(y), lambda y, z: {"mean": y}, "Unknown"),
    (lambda y, z: Nameless(y), lambda y, z: {"mean": y}, "Nameless"),
    (lambda y, z: [Unknown(Unknown((y, z))), y], lambda y, z: [{"mean": {"mean": (y, z)}}, y], "Unknown"),
    (lambda y, z: Names(b=y, a=z), lambda y, z: {"b": y, "a": z}, "Names"),
], ids=["dataclass", "dataclass without a name", "nested", "dict of a class"])  # fmt: skip
@pytest.mark.parametrize("ending", [".pt2", ".onnx"])
def test_dataclasses_are_written_as_dicts(made, plain, name, ending, tmp_path):
    if ending == ".onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    model, said = written(made, tmp_path / f"net{ending}")
    assert f"{name} is returned as a plain dict" in said.notes
    x = torch.randn(7, 4, dtype=torch.float64)
    found = convert.load(tmp_path / f"net{ending}")(x)
    model.made = plain
    expected = model(x)
    assert type(found) is type(expected)
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    assert_same(found, expected)


@pytest.mark.parametrize(("made", "name"), [(lambda y, z: Other(y), "Other"), (lambda y, z: [Labelled(y)], "Labelled")])
def test_other_classes_are_one_line_that_says_what_to_do(made, name, tmp_path):
    with pytest.raises(ConvertError, match=rf"{name}.*serialized_type_name") as caught:
        convert.write(Returning(made).eval(), None, ((torch.ones(5, 4),), {}), tmp_path / "net.pt2")
    assert "\n" not in str(caught.value)


def renamed(source, target, change):
    """A ``.pt2`` whose result's spec is changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        for entry in old.infolist():
            data = old.read(entry)
            if "/models/" in entry.filename and entry.filename.endswith(".json"):
                program = json.loads(data)
                call = program["graph_module"]["module_call_graph"][0]["signature"]
                call["out_spec"] = change(call["out_spec"])
                data = json.dumps(program).encode()
            new.writestr(entry, data)


NAMES = {
    "unknown": lambda spec: spec.replace("test_containers.Output", "test_containers.Nobody"),
    "without a name": lambda spec: spec.replace("test_containers.Output", pytree.NO_SERIALIZED_TYPE_NAME_FOUND),
    "reads its keys by code": lambda spec: spec.replace("test_containers.Output", "collections.defaultdict"),
    "no named tuple": lambda spec: spec.replace('"test_containers.Output"', '"collections.namedtuple"').replace(
        '"[\\"mean\\", \\"scale\\"]"', '"test_containers.Registered"'),
    "an enum of a module": lambda spec: spec.replace(
        '\\"mean\\"', '{\\"__enum__\\": true, \\"fqn\\": \\"antigravity:x\\", \\"name\\": \\"y\\"}'),
}  # fmt: skip


@pytest.mark.parametrize("change", NAMES.values(), ids=NAMES)
def test_specs_that_name_other_classes_are_refused(change, tmp_path):
    written(lambda y, z: Output(mean=y, scale=z), tmp_path / "good.pt2")
    renamed(tmp_path / "good.pt2", tmp_path / "same.pt2", lambda spec: spec)
    convert.load(tmp_path / "same.pt2")
    changed = []
    renamed(tmp_path / "good.pt2", tmp_path / "bad.pt2", lambda spec: changed.append((spec, change(spec))) or change(spec))
    assert changed[0][0] != changed[0][1]
    with pytest.raises(ConvertError, match=r"container|class"):
        convert.load(tmp_path / "bad.pt2")
