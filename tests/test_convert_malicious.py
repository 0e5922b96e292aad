"""Files that would run code, fill the memory, or are no files of ours: one sentence each, and nothing runs.

Every place in a ``.pt2`` that torch unpickles, evaluates or compiles has a crafted file here; the positive control shows that torch alone
would have run the code.
"""

import contextlib
import io
import json
import os
import pickle
import zipfile

import pytest
import torch
from torch import nn

from fxfuse import convert
from fxfuse.errors import ConvertError


class Bomb:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.table = torch.arange(4.0)  # a constant

    def forward(self, x):
        return self.layer(x) + self.table


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "net.pt2"
    rows = torch.export.Dim("rows", min=2)
    torch.export.save(torch.export.export(Net(), (torch.randn(5, 3),), dynamic_shapes=({0: rows},)), path)
    return path


def rewritten(good, out, changes, compress=zipfile.ZIP_STORED, extra=()):
    """A copy of the file whose records ``changes`` (name without the root -> new bytes, or a function of the old ones)."""
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(out, "w", compress) as target:
        names = {name.partition("/")[2] for name in source.namelist()}
        root = source.namelist()[0].partition("/")[0]
        for name in source.namelist():
            change = changes.get(name.partition("/")[2])
            data = source.read(name)
            target.writestr(name, change(data) if callable(change) else data if change is None else change)
        for name, data in changes.items():
            if name not in names and not callable(data):
                target.writestr(f"{root}/{name}", data)
        for name, data in extra:
            target.writestr(name, data)
    return out


def edited(path_of):
    """A change of JSON: ``path_of`` edits the parsed data in place."""

    def change(data):
        parsed = json.loads(data)
        path_of(parsed)
        return json.dumps(parsed).encode()

    return change


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def marked_pickles(config, record, use_pickle=True):
    """The config with one payload as a pickle in ``record``."""

    def edit(parsed):
        first = next(iter(parsed["config"]))
        parsed["config"][first].update(use_pickle=use_pickle, path_name=record)

    return {config: edited(edit)}


WEIGHTS, CONSTANTS = "data/weights/model_weights_config.json", "data/constants/model_constants_config.json"


def pickles(mark):
    bomb, bare = saved((Bomb(mark),)), pickle.dumps(Bomb(mark))
    return {
        "sample inputs": {"data/sample_inputs/model.pt": bomb},
        "sample inputs, no zip": {"data/sample_inputs/model.pt": bare},
        "weights, older": {"data/weights/model.pt": bomb},
        "constants, older": {"data/constants/model.pt": bomb},
        "a pickled weight": {**marked_pickles(WEIGHTS, "weight_99"), "data/weights/weight_99": bomb},
        "a pickled weight, no zip": {**marked_pickles(WEIGHTS, "weight_99"), "data/weights/weight_99": bare},
        "a pickled constant": {**marked_pickles(CONSTANTS, "tensor_99"), "data/constants/tensor_99": bomb},
        "a custom object": {**marked_pickles(CONSTANTS, "custom_obj_99"), "data/constants/custom_obj_99": bare},
        "an opaque object": {**marked_pickles(CONSTANTS, "opaque_obj_99"), "data/constants/opaque_obj_99": bare},
    }


PICKLES = list(pickles("x"))


@pytest.mark.parametrize("which", PICKLES)
def test_a_payload_that_is_unpickled_is_refused(which, good, tmp_path):
    mark = tmp_path / "ran"
    path = rewritten(good, tmp_path / "net.pt2", pickles(mark)[which])
    with pytest.raises(ConvertError, match="allow_pickle") as caught:
        convert.load(path)
    assert "\n" not in str(caught.value)
    assert not mark.exists()


@pytest.mark.parametrize("which", [which for which in PICKLES if which != "a custom object"])  # needs a class registered with torch
def test_torch_alone_runs_these(which, good, tmp_path):
    """Else the tests above would show nothing: the refused payload is one that really runs."""
    mark = tmp_path / "ran"
    path = rewritten(good, tmp_path / "net.pt2", pickles(mark)[which])
    with contextlib.suppress(ConvertError):  # what came out of the pickle is no tensor
        convert.load(path, allow_pickle=True)
    assert mark.exists()


def test_a_pickled_payload_of_tensors_only_is_loaded(good, tmp_path):
    changes = {"data/sample_inputs/model.pt": saved(((torch.zeros(5, 3),), {}))}
    x = torch.randn(4, 3)
    assert torch.equal(convert.load(rewritten(good, tmp_path / "net.pt2", changes))(x), convert.load(good)(x))


def old_format(good, mark, which):
    with zipfile.ZipFile(good) as source:
        model = next(source.read(name) for name in source.namelist() if name.endswith("models/model.json"))
    records = {
        "version": b"8.15", "serialized_exported_program.json": model, "serialized_state_dict.pt": saved({}),
        "serialized_constants.pt": saved({}), "serialized_example_inputs.pt": saved(((), {})),
    }  # fmt: skip
    records[which] = saved((Bomb(mark),))
    return records


OLD = ["serialized_state_dict.pt", "serialized_constants.pt", "serialized_example_inputs.pt", "serialized_state_dict.json"]


@pytest.mark.parametrize("which", OLD)
def test_the_older_format_is_inspected_too(which, good, tmp_path):
    mark, path = tmp_path / "ran", tmp_path / "net.pt2"
    with zipfile.ZipFile(path, "w") as target:
        for name, data in old_format(good, mark, which).items():
            target.writestr(name, data)
    with pytest.raises(ConvertError, match="allow_pickle"):
        convert.load(path)
    assert not mark.exists()
    if which in OLD[:3]:
        with pytest.raises(ConvertError):  # what came out of the pickle does not fit
            convert.load(path, allow_pickle=True)
        assert mark.exists()


def test_an_older_file_inside_a_newer_one_is_refused(good, tmp_path):
    mark = tmp_path / "ran"
    path = rewritten(good, tmp_path / "net.pt2", {}, extra=[*old_format(good, mark, OLD[0]).items()])
    with pytest.raises(ConvertError, match="allow_pickle"):
        convert.load(path)
    assert not mark.exists()


def test_machine_code_is_refused(good, tmp_path):
    path = rewritten(good, tmp_path / "net.pt2", {"data/aotinductor/model/model.so": b"\x7fELF"})
    with pytest.raises(ConvertError, match="machine code"):
        convert.load(path)


def set_target(target):
    def edit(program):
        program["graph_module"]["graph"]["nodes"][0]["target"] = target

    return edit


def set_expression(text):
    def edit(program):
        sizes = [value["sizes"][0] for value in program["graph_module"]["graph"]["tensor_values"].values()]
        next(size for size in sizes if "as_expr" in size)["as_expr"]["expr_str"] = text

    return edit


def set_guard(text):
    return lambda program: program.update(guards_code=[text])


def set_spec(spec):
    def edit(program):
        for entry in program["graph_module"]["module_call_graph"]:
            if entry["signature"]:
                entry["signature"]["in_spec"] = json.dumps([1, spec])

    return edit


def set_name(name):
    def edit(program):
        text = json.dumps(program).replace('"name": "x"', '"name": ' + json.dumps(name))
        program.clear()
        program.update(json.loads(text))

    return edit


def set_attribute(name):
    def edit(program):
        text = json.dumps(program).replace('"layer.weight"', json.dumps(name))
        program.clear()
        program.update(json.loads(text))

    return edit


_FACTORY = json.dumps({"default_factory_module": "antigravity", "default_factory_name": "fly", "dict_context": []})
PROGRAMS = {
    "a function of the operating system": set_target("torch.os.system"),
    "torch.load": set_target("torch.load"),
    "a library": set_target("torch.ops.load_library"),
    "a hidden attribute": set_target("torch.ops.load_library.__func__.__globals__"),
    "an operator that maps a file": set_target("torch.ops.aten.from_file.default"),
    "a caller of methods": set_target("_operator.methodcaller"),
    "a class of operator": set_target("_operator.attrgetter"),
    "an extension": set_target("#triton:x"),
    "an expression": set_expression("__import__('os').system('true')"),
    "an expression in an expression": set_expression("Add('__import__(chr(111)+chr(115))', 1)"),
    "an attribute in an expression": set_expression("Symbol('s0').__class__"),
    "a power without end": set_expression("9**(9**9)"),
    "a lambda": set_expression("(lambda: 1)()"),
    "a comprehension": set_expression("[s0 for s0 in (1,)]"),
    "a guard": set_guard("__import__('os').system('true')"),
    "a guard that ends its text": set_guard("L['x'] == '\"+str(1)+\"'"),
    "a guard with a second line": set_guard("True)\n  import os"),
    "a guard of globals": set_guard("L['x'].__class__.__base__"),
    "a container that imports": set_spec({"type": "collections.defaultdict", "context": _FACTORY, "children_spec": []}),
    "a key that imports": set_spec(
        {"type": "builtins.dict", "context": json.dumps([{"__enum__": True, "fqn": "antigravity:Fly", "name": "x"}]), "children_spec": []}
    ),
    "a name that is code": set_name("x=print(1)"),
    "an attribute that is code": set_attribute('layer.w"+print(1)+"'),
}  # fmt: skip


@pytest.mark.parametrize("which", PROGRAMS)
def test_a_program_that_says_more_than_a_program_is_refused(which, good, tmp_path):
    path = rewritten(good, tmp_path / "net.pt2", {"models/model.json": edited(PROGRAMS[which])})
    with pytest.raises(ConvertError, match=r"could run code.*allow_pickle") as caught:
        convert.load(path)
    assert "\n" not in str(caught.value)


def test_the_edits_change_the_program(good):
    """An edit that finds nothing would be a test that cannot fail."""
    with zipfile.ZipFile(good) as source:
        data = next(source.read(name) for name in source.namelist() if name.endswith("models/model.json"))
    for which, edit in PROGRAMS.items():
        assert json.loads(edited(edit)(data)) != json.loads(data), which


def test_files_that_are_cut_off_compressed_or_foreign(good, tmp_path):
    whole = good.read_bytes()
    made = {
        "cut": whole[: len(whole) // 2], "empty": b"", "text": b"hello", "end": whole[:-30], "start": whole[100:],
        "foreign zip": _zip({"a.txt": b"a"}), "no entries": _zip({}),
    }  # fmt: skip
    for name, data in made.items():
        path = tmp_path / f"{name}.pt2"
        path.write_bytes(data)
        with pytest.raises(ConvertError) as caught:
            convert.load(path)
        assert "\n" not in str(caught.value), name
        with pytest.raises(ConvertError):
            convert.load(path, allow_pickle=True)


def _zip(entries):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as target:
        for name, data in entries.items():
            target.writestr(name, data)
    return buffer.getvalue()


@pytest.mark.parametrize("allow", [False, True])
def test_zip_bombs(allow, good, tmp_path):
    changes = {"data/weights/weight_0": bytes(10_000_000)}
    path = rewritten(good, tmp_path / "net.pt2", changes, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    with pytest.raises(ConvertError, match="compressed"):
        convert.load(path, allow_pickle=allow)


def test_a_zip_bomb_inside(good, tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("archive/data.pkl", bytes(10_000_000))
    path = rewritten(good, tmp_path / "net.pt2", {"data/sample_inputs/model.pt": buffer.getvalue()})
    with pytest.raises(ConvertError, match=r"sample_inputs.*compressed"):
        convert.load(path)


def test_a_tensor_of_no_bytes_that_claims_to_be_large(good, tmp_path):
    def edit(parsed):
        payload = next(iter(parsed["config"].values()))
        payload["tensor_meta"]["sizes"] = [{"as_int": 1 << 40}]
        payload["path_name"] = "weight_99"

    path = rewritten(good, tmp_path / "net.pt2", {WEIGHTS: edited(edit), "data/weights/weight_99": b""})
    with pytest.raises(ConvertError, match="fill the memory"):
        convert.load(path)


def test_a_record_in_another_folder(good, tmp_path):
    path = rewritten(good, tmp_path / "net.pt2", marked_pickles(WEIGHTS, "../sample_inputs/model.pt"))
    with pytest.raises(ConvertError, match="another folder"):
        convert.load(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_twice(good, tmp_path):
    path = rewritten(good, tmp_path / "net.pt2", {})
    with zipfile.ZipFile(path, "a") as target:
        target.writestr(target.namelist()[0], b"other")
    with pytest.raises(ConvertError, match="twice"):
        convert.load(path)


def test_checkpoints_with_code_are_refused(tmp_path):
    mark = tmp_path / "ran"
    path = tmp_path / "net.pt"
    torch.save({"weight": Bomb(mark)}, path)
    with pytest.raises(ConvertError, match="allow_pickle"):
        convert.read_weights(path)
    path.write_bytes(pickle.dumps({"weight": Bomb(mark)}))
    with pytest.raises(ConvertError):
        convert.read_weights(path)
    assert not mark.exists()
    with pytest.raises(ConvertError):  # it is run, and is no tensor
        convert.read_weights(path, allow_pickle=True)


def test_an_exported_program_of_ours_and_of_torch_passes(good):
    assert convert.load(good)(torch.randn(4, 3)).shape == (4, 4)
