"""Files: what is saved, what may be read, and that what does not fit changes nothing."""

from __future__ import annotations

import ast
import copy
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from everything import assert_unchanged, everything
from small_loops import KINDS, columns, conv_norm
from torch import Tensor, nn

import fxfuse
from checks import QUICK, assert_close, assert_same_state, model_of, randn, randomized
from fxfuse.errors import FxfuseError, StateDictError
from fxfuse.running.known_functions import known_function
from fxfuse.running.serialize import NodeRef, Target, program_from_data, program_to_data

ROOT = Path(__file__).resolve().parents[1]


def pair(inner: bool, way: str = "packed", seed: int = 0) -> tuple[nn.Module, nn.Module, Any]:
    """A model and its fused form; ``inner``: the region is a submodule, and the model keeps its class."""
    core, inputs = conv_norm()
    model = core
    if inner:
        parts = {"core": core, "before": nn.Linear(2, 2), "after": nn.Linear(5, 3)}
        model = randomized(model_of(lambda self, x: self.after(self.core(x)), **parts), seed)
    x = inputs(1, 6)
    if way == "packed":
        return model, fxfuse.optimize(model, x, objective="launches", **QUICK), x
    fused = fxfuse.optimize(copy.deepcopy(model), objective="launches", tune=False, inplace=True)
    with torch.no_grad():
        fused.eval()(*x)
    return model, fused.train(), x


# -- checkpoints that do not fit --------------------------------------------------------------------------------------------------

State = dict[str, Any]


def _first(state: State, ending: str = "weight") -> str:
    return next(name for name in state if name.endswith(ending))


def _last(state: State) -> str:
    return [name for name in state if name.endswith("weight")][-1]


def missing(state: State) -> str:
    name = _last(state)
    del state[name]
    return name


def extra(state: State) -> str:
    state["somebody.elses.weight"] = torch.zeros(3)
    return "somebody.elses.weight"


def wrong_shape(state: State) -> str:
    state[_last(state)] = torch.zeros(5, 5, 5)
    return _last(state)


def transposed(state: State) -> str:
    name = next(name for name, tensor in reversed(state.items()) if tensor.dim() > 1 and tensor.shape[0] != tensor.shape[1])
    state[name] = state[name].transpose(0, 1).contiguous()
    return name


def a_list(state: State) -> str:
    state[_last(state)] = [1.0, 2.0]
    return _last(state)


def a_string(state: State) -> str:
    state[_first(state)] = "weights"
    return _first(state)


def none(state: State) -> str:
    state[_last(state)] = None
    return _last(state)


def sparse(state: State) -> str:
    """Of the right shape, but it cannot be copied."""
    state[_last(state)] = Unreadable(state[_last(state)])
    return _last(state)


class Unreadable(Tensor):
    """A tensor that cannot be read: of a file that is cut short and mapped."""

    @staticmethod
    def __new__(cls, tensor: Tensor) -> Any:
        return Tensor._make_subclass(cls, tensor.clone())

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in ("copy_", "clone", "stack", "cat", "detach", "to", "permute"):
            raise RuntimeError("unreadable")
        return super().__torch_function__(func, types, args, kwargs)


def of_another_model(state: State) -> str:
    other = columns()[0].state_dict()
    state.clear()
    state.update(other)
    return "nets.0.0.weight"


BROKEN = [missing, extra, wrong_shape, transposed, a_list, a_string, none, of_another_model]


@pytest.mark.parametrize("load", ["load_state_dict", "load_original_state_dict", "assign"])
@pytest.mark.parametrize("way", ["packed", "shared"])
@pytest.mark.parametrize("inner", [False, True])
def test_a_checkpoint_that_does_not_fit_changes_nothing(inner: bool, way: str, load: str) -> None:
    model, fused, x = pair(inner, way)
    before, parameters = everything(fused), [p.detach().clone() for p in fused.parameters()]
    for breaking in BROKEN:
        given = OrderedDict((name, torch.full_like(t, 0.37 if t.is_floating_point() else 3)) for name, t in model.state_dict().items())
        with torch.random.fork_rng():
            name = breaking(given)
        with pytest.raises((RuntimeError, StateDictError)) as caught:
            if load == "load_original_state_dict":
                fxfuse.load_original_state_dict(fused, given)
            else:
                fused.load_state_dict(given, assign=load == "assign")
        assert name in str(caught.value), breaking.__name__
        assert "packed" not in str(caught.value), breaking.__name__
        del caught
        assert all(torch.equal(a, b) for a, b in zip(parameters, fused.parameters(), strict=True)), breaking.__name__
        assert_unchanged(_without_caches(before), _without_caches(everything(fused)), f"{breaking.__name__}, {name}")
    assert_close(fused.eval()(*x), model.eval()(*x), "afterwards")
    assert not fxfuse.report(fused).fallbacks


def _without_caches(found: dict[str, Any]) -> dict[str, Any]:
    return {path: {key: value for key, value in own.items() if not key.startswith("_fxfuse")} for path, own in found.items()}


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("load", [fxfuse.load_original_state_dict, lambda model, state: model.load_state_dict(state)])
def test_a_load_that_breaks_off_changes_nothing(load: Callable[..., Any], inner: bool) -> None:
    """The names and shapes fit, and one tensor in the middle cannot be read."""
    model, fused, _ = pair(inner)
    given = OrderedDict((name, torch.randn_like(t.double()).to(t.dtype)) for name, t in model.state_dict().items())
    sparse(given)
    before = fxfuse.original_state_dict(fused)
    with pytest.raises((RuntimeError, StateDictError), match="unreadable"):
        load(fused, given)
    assert_same_state(fxfuse.original_state_dict(fused), before, "afterwards")


@pytest.mark.parametrize("inner", [False, True])
def test_packed_names_that_do_not_fit_change_nothing(inner: bool) -> None:
    model, fused, _ = pair(inner)
    packed = OrderedDict((name, tensor.clone() + 1) for name, tensor in fused.state_dict().items())
    before = fxfuse.original_state_dict(fused)
    with pytest.raises(StateDictError, match=r"names of a fused model's packs: fused\.load_state_dict takes these"):
        fxfuse.load_original_state_dict(fused, packed)
    name = next(name for name in packed if "packed" in name and packed[name].dim() > 1)
    packed[name] = packed[name][..., :-1]
    with pytest.raises(RuntimeError, match="size mismatch for"):
        fused.load_state_dict(packed)
    with pytest.raises(RuntimeError):
        model.load_state_dict(packed)
    assert_same_state(fxfuse.original_state_dict(fused), before, "afterwards")


def test_what_is_no_state_dict_at_all() -> None:
    _, fused, _ = pair(True)
    before = fxfuse.original_state_dict(fused)
    for given in ([1, 2], None, "file.pt", torch.zeros(3)):
        with pytest.raises(StateDictError, match=r"a state dict is a mapping of names to tensors, a \w+ came"):
            fxfuse.load_original_state_dict(fused, given)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            fused.load_state_dict(given)  # type: ignore[arg-type]
    assert_same_state(fxfuse.original_state_dict(fused), before, "afterwards")


@pytest.mark.parametrize("inner", [False, True])
def test_not_strict_is_torch_s_not_strict(inner: bool) -> None:
    """The same keys reported, the same values written, and a wrong shape an error all the same."""
    model, fused, _ = pair(inner)
    given = OrderedDict((name, torch.randn_like(t.double()).to(t.dtype)) for name, t in model.state_dict().items())
    gone, came = missing(given), extra(given)
    wrong = _first(given)
    plain = copy.deepcopy(model)
    expected = plain.load_state_dict(given, strict=False)
    for load in (lambda: fused.load_state_dict(given, strict=False), lambda: fxfuse.load_original_state_dict(fused, given, strict=False)):
        result = load()
        assert result.missing_keys == expected.missing_keys == [gone]
        assert result.unexpected_keys == expected.unexpected_keys == [came]
        assert_same_state(fxfuse.original_state_dict(fused), plain.state_dict(), "not strict")
    given[wrong] = torch.zeros(5, 5, 5)
    before = fxfuse.original_state_dict(fused)
    with pytest.raises(RuntimeError, match="size mismatch"):
        fused.load_state_dict(given, strict=False)
    assert_same_state(fxfuse.original_state_dict(fused), before, "afterwards")


def test_dtypes_are_the_model_s_and_nan_is_a_number_like_any() -> None:
    model, fused, _ = pair(True)
    given = OrderedDict((name, t.to(torch.float16) if t.is_floating_point() else t) for name, t in model.state_dict().items())
    given[_first(given)].view(-1)[0] = torch.nan
    plain = copy.deepcopy(model)
    for each in (plain, fused):
        each.load_state_dict(given)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(fxfuse.original_state_dict(fused)[name], tensor) or tensor.isnan().any()
        assert fxfuse.original_state_dict(fused)[name].dtype is tensor.dtype


def test_the_loader_goes_with_copies_and_leaves_with_fusing() -> None:
    model, fused, _ = pair(True)
    given = OrderedDict(model.state_dict())
    wrong_shape(given)
    other = fxfuse.optimize(Plain(), randn(4, 3).float(), objective="launches", **QUICK)
    for each in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(other))):
        before = fxfuse.original_state_dict(each)
        with pytest.raises(RuntimeError):
            each.load_state_dict(given)
        assert_same_state(fxfuse.original_state_dict(each), before, "a copy")
    assert "load_state_dict" not in vars(fxfuse.unfuse(fused))
    assert set(vars(fxfuse.unfuse(fused))) - {"_fxfuse_report"} == set(vars(model))


class Lanes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Linear(1, 2) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([net(x[:, i : i + 1]).relu() for i, net in enumerate(self.nets)], 1)


class Plain(nn.Module):
    """The region is a submodule. (Of this file, so that it can be pickled.)"""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.lanes, self.last = nn.Linear(3, 3), Lanes(), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.lanes(self.first(x)))


# -- files ------------------------------------------------------------------------------------------------------------------------


def saved(value: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("kind", ["conv_norm", "embeddings", "tied", "unequal"])
def test_checkpoints_are_read_without_running_code(kind: str, tmp_path: Path) -> None:
    """Both namings by ``torch.save`` with weights_only=True, its default."""
    model, inputs = KINDS[kind]()
    fused = fxfuse.optimize(model, inputs(1, 6), objective="launches", **QUICK)
    for state in (fused.state_dict(), fxfuse.original_state_dict(fused)):
        read = torch.load(saved(state), weights_only=True)
        other = copy.deepcopy(fused)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        other.load_state_dict(read)
        assert_same_state(fxfuse.original_state_dict(other), model.state_dict(), kind)
        assert torch.load(saved(state), mmap=None, weights_only=True).keys() == state.keys()


def test_a_saved_module_is_code_and_torch_says_so() -> None:
    model = Plain()
    fused = fxfuse.optimize(model, randn(4, 3).float(), objective="launches", **QUICK)
    assert fxfuse.report(fused).fused
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(saved(fused))
    again = torch.load(saved(fused), weights_only=False)  # asked for by name
    assert_same_state(fxfuse.original_state_dict(again), fxfuse.original_state_dict(fused), "the module")
    assert torch.equal(again(randn(2, 3).float()), fused(randn(2, 3).float()))
    assert not fxfuse.report(again).fallbacks


@pytest.mark.parametrize("cut", [10, 200, -200, -20])
def test_a_file_that_is_cut_short(cut: int) -> None:
    _, fused, _ = pair(True)
    before = fxfuse.original_state_dict(fused)
    data = saved(before).getvalue()
    with pytest.raises((RuntimeError, pickle.UnpicklingError, EOFError, ValueError)):
        fxfuse.load_original_state_dict(fused, torch.load(io.BytesIO(data[:cut])))
    assert_same_state(fxfuse.original_state_dict(fused), before, "afterwards")


# Who may: files are the business of the command and of conversion (tests/test_convert_malicious.py has what these refuse).
FILES = ("cli", "convert")


def test_nothing_in_fxfuse_opens_files_or_unpickles() -> None:
    """``pickle`` is the caller's choice; sources are generated by ``exec`` from what was checked; the cache of plans is JSON."""
    found = set()
    for file in [*(ROOT / "fxfuse").glob("**/*.py"), *(ROOT / "passes").glob("**/*.py")]:
        if file.name == "table.py" or file.parent.name in FILES:  # table.py writes the README
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Name) and called.id in ("eval", "exec", "open", "compile", "__import__"):
                found.add((file.name, called.id))
            if isinstance(called, ast.Attribute) and called.attr in ("load", "loads", "save", "import_module", "system"):
                found.add((file.name, ast.unparse(called)))
    assert found == {
        *((name, "exec") for name in ("guards.py", "runtime.py", "surroundings.py", "steps.py")), ("steps.py", "compile"),
        ("fingerprint.py", "open"),  # reads its own sources
        ("__init__.py", "importlib.import_module"),  # of its own modules, by their names
        ("figures.py", "plan_cache.load"), ("plan.py", "plan_cache.load"), ("plan_cache.py", "json.loads"),
        ("adoption.py", "pickle.loads"),  # of a plan that came from another process of this job, never from a file
    }  # fmt: skip


def test_torch_files_are_read_weights_only() -> None:
    """Every ``torch.load`` but the one that is for who asked for pickles by name."""
    calls = [
        (file.name, {k.arg: ast.unparse(k.value) for k in node.keywords})
        for file in (ROOT / "fxfuse").glob("**/*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert len(calls) > 1
    assert [name for name, keywords in calls if keywords.get("weights_only") != "True"] == ["checkpoints.py"]


# -- programs ---------------------------------------------------------------------------------------------------------------------


def program() -> Any:
    model, inputs = KINDS["experts"]()
    fused = fxfuse.optimize(model, inputs(1, 6), objective="launches", **QUICK)
    (plan,) = fxfuse.report(fused).fused
    return next(iter(plan.programs.values()))


@pytest.mark.parametrize("kind", KINDS)
def test_programs_survive(kind: str) -> None:
    model, inputs = KINDS[kind]()
    fused = fxfuse.optimize(model, inputs(1, 6), objective="launches", **QUICK)
    for plan in fxfuse.report(fused).fused:
        for each in plan.all_programs():
            again = program_from_data(program_to_data(each))
            assert str(again.graph) == str(each.graph)
            assert again.graph.python_code("self").src == each.graph.python_code("self").src
            assert (again.guard, again.in_spec, again.out_spec) == (each.guard, each.in_spec, each.out_spec)


FORBIDDEN = [
    ("os", "system"), ("builtins", "eval"), ("builtins", "exec"), ("builtins", "__import__"), ("builtins", "open"), ("posix", "system"),
    ("torch", "os.system"), ("torch", "load"), ("torch", "hub.load"), ("torch", "import_ir_module"), ("torch", "save"), ("nt", "system"),
    ("torch", "compile"), ("torch", "sys"), ("torch.serialization", "load"), ("subprocess", "run"), ("operator", "call"),
    ("operator", "methodcaller"), ("operator", "attrgetter"), ("importlib", "import_module"), ("pickle", "loads"), ("this", "s"),
    ("fxfuse.weights.lane", "rebuild"), ("fxfuse.passes.emit", "Emitter"), ("fxfuse.ops", "torch.load"), ("torch", "Tensor.__class__"),
    ("torch", "Tensor.numpy.__self__"), ("torch.ops", "load_library"), ("torch.ops", "load_library::__func__"), ("math", "__loader__"),
    ("torch.ops", "aten::__class__"), ("torch.ops", "__class__::mro"), ("torch.nn.functional", "torch"), ("torch.functional", "F"),
    ("torch.utils.cpp_extension", "load"), ("antigravity", "webbrowser"), ("torch", "Tensor.shape.__get__.__self__"), (None, None),
    ("torch", "nn.functional.relu"), ("torch", ["relu"]),
]  # fmt: skip


@pytest.mark.parametrize(("module", "name"), FORBIDDEN)
def test_only_functions_on_tensors_are_found_by_name(module: Any, name: Any) -> None:
    import sys

    before = set(sys.modules)
    with pytest.raises(FxfuseError, match="a saved program may not call"):
        known_function(module, name)
    assert set(sys.modules) == before, "a module was imported"


class Touches:
    """What a malicious file puts where a value should be: writing it as text runs code."""

    touched: list[str] = []  # noqa: RUF012

    def __repr__(self) -> str:
        Touches.touched.append("repr")
        return "__import__('sys').modules['test_on_disk'].Touches.touched.append('run')"

    def __call__(self, *args: Any) -> Any:
        Touches.touched.append("called")

    def __new__(cls, *args: Any) -> Any:
        if args:
            cls.touched.append("made")
        return object.__new__(cls)


INJECTION = 'x"), __import__("test_on_disk").Touches.touched.append("run"), getattr(self, "y'


def _node(data: dict[str, Any], op: str) -> dict[str, Any]:
    return next(item for item in data["graph"] if item["op"] == op)


def _set(op: str, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: _node(data, op).__setitem__(key, value)


CORRUPT: dict[str, Callable[[dict[str, Any]], None]] = {
    "a function by name": _set("call_function", "target", Target("os", "system")),
    "a function itself": _set("call_function", "target", __import__("os").system),
    "an object to call": _set("call_function", "target", Touches()),
    "an object as argument": _set("call_function", "args", (Touches(),)),
    "an object in a keyword": _set("call_function", "kwargs", {"dim": [Touches()]}),
    "a name as placeholder": _set("placeholder", "target", INJECTION),
    "a default of a placeholder": _set("placeholder", "args", (Touches(),)),
    "a path": _set("get_attr", "target", INJECTION),
    "a method": lambda data: _node(data, "call_function").update(op="call_method", target=INJECTION),
    "a property": lambda data: _node(data, "call_function").update(target=Target("builtins", "getattr"), args=("x", "grad"), kwargs={}),
    "an unknown kind": _set("call_function", "op", "exec"),
    "no such node": _set("call_function", "args", (NodeRef("nobody"),)),
    "no graph": lambda data: data.pop("graph"),
    "no nodes": lambda data: data.__setitem__("graph", None),
    "no guard": lambda data: data.__setitem__("guard", {"leaves": ()}),
    "a container": lambda data: data.__setitem__("out_spec", (Touches, Touches, [None])),
    "a context": lambda data: data.__setitem__("out_spec", (torch.utils._pytree.namedtuple, Touches, [None])),
    "a factory": lambda data: data.__setitem__("out_spec", (torch.utils._pytree.defaultdict, [Touches, ["a"]], [None])),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_corrupt_programs_run_nothing(name: str) -> None:
    data = program_to_data(program())
    CORRUPT[name](data)
    Touches.touched.clear()
    with pytest.raises(FxfuseError, match=r"a saved program may (not|read)|the saved program is corrupt"):
        program_from_data(data)
    assert not set(Touches.touched) - {"repr"}  # an error message may show what came


def test_a_program_that_calls_what_is_no_module_is_not_compiled() -> None:
    data = program_to_data(program())
    node = _node(data, "get_attr")
    node.update(op="call_module", target="forward.__func__.__globals__.torch.os.getcwd", args=(), kwargs={})
    made = program_from_data(data)
    from fxfuse.running.runtime import compile_program

    with pytest.raises((FxfuseError, AttributeError)):
        compile_program(made, KINDS["experts"]()[0])


def test_functions_of_others_are_not_saved() -> None:
    from fxfuse.running.serialize import target_to_data

    for function in (known_function, pickle.dumps, lambda x: x):
        with pytest.raises(FxfuseError, match="cannot be saved: it is none of torch's operations"):
            target_to_data(function)
