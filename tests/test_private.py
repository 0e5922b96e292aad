"""What is relied on of torch's private APIs: a torch that changes one of them fails here, under its name, and not somewhere in a fusion.

Also: nothing outside ``fxfuse/private`` names such an API, and importing fxfuse stays cheap.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import tokenize
import tracemalloc
import types
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from fxfuse.private import (
    aotinductor,
    asserts,
    autocast,
    compiled_backward,
    custom_pass,
    dispatch,
    dynamo,
    exported,
    fake_tensors,
    known_result,
    module_hooks,
    ordinary,
    parse_to,
    profiler,
    pt2_archives,
    pt2_writer,
    pytree,
    recurrent,
    saved_hooks,
    schemas,
    state_dicts,
    storages,
    tensor_guards,
    tensor_hooks,
    torch_function,
    transforms,
    versions,
    vmap_fallback,
    while_traced,
)

ROOT = Path(__file__).resolve().parents[1]
# An attribute or a module of torch whose name begins with an underscore, and those of tensors, ops and storages that are known to us.
PRIVATE = re.compile(
    r"\btorch(\.\w+)*\._(?!_)\w+"
    r"|\b_(version|schema|overloadname|qualified_op_name|cdata|backward_hooks|post_accumulate_grad_hooks|metadata|pytree|python_dispatch"
    r"|flat_weights|flat_weight_refs|flat_weights_names|init_flat_weights|subclasses|should_skip_dynamo|forward_hooks|forward_pre_hooks"
    r"|backward_pre_hooks)\b"
)


def code_of(path: Path) -> str:
    """The file without comments and docstrings; names that are spelled in other strings count."""
    kept, at_start = [], True
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type == tokenize.COMMENT or (token.type == tokenize.STRING and at_start):
                continue
            if token.type in (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT):
                at_start = True
                kept.append("\n" if token.type == tokenize.NEWLINE else "")
                continue
            at_start = False
            kept.append(token.string if token.string == "." or (kept and kept[-1] == ".") else " " + token.string)
    return re.sub(r" ?\. ?", ".", "".join(kept))


# A Tensor attribute that a user's forward may read: the recorder has a list of those that tell nothing of the data.
ALLOWED = {"fxfuse/recording/tracer.py": {"_backward_hooks"}}


def test_no_other_file_names_a_private_api() -> None:
    files = [*(path for path in (ROOT / "fxfuse").rglob("*.py") if path.parent.name != "private"), *(ROOT / "passes").rglob("*.py")]
    assert len(files) > 90
    found = {
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in files
        for match in PRIVATE.finditer(code_of(path))
        if match[0] not in ALLOWED.get(str(path.relative_to(ROOT)), ())
    }
    assert not found


@pytest.mark.parametrize(
    "line",
    [
        "import torch.utils._pytree as p",
        "from torch._subclasses.fake_tensor import F",
        "x = tensor._version",
        "with torch._C.DisableTorchFunction(): pass",
        'x = getattr(tensor, "_post_accumulate_grad_hooks")',
        "x = a_storage()._cdata",
    ],
)
def test_the_search_finds_what_it_looks_for(line: str, tmp_path: Path) -> None:
    path = tmp_path / "sample.py"
    path.write_text(f'"""torch._C in a docstring is no use of it."""\n{line}  # comment\n')
    assert len(list(PRIVATE.finditer(code_of(path)))) == 1
    path.write_text('"""torch._C in a docstring is no use of it."""\nx = torch.nn.functional.relu  # torch._C\n')
    assert not PRIVATE.search(code_of(path))


def test_every_file_has_a_check_here() -> None:
    names = {path.stem for path in (ROOT / "fxfuse" / "private").glob("*.py")} - {"__init__"}
    here = Path(__file__).read_text()
    assert names == {name for name in names if re.search(rf"\b{name}\.\w", here)}


def test_importing_is_cheap() -> None:
    code = "import torch, sys, fxfuse; fxfuse.optimize, fxfuse.backend\n"  # its names are imported when they are asked for
    code += "print(*sorted({'sympy', 'torch._dynamo'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout == "\n"


def test_names_of_containers_in_files() -> None:
    """By which an exported program names the classes of its call and its result, and how it reads them."""

    @dataclasses.dataclass
    class Registered:
        x: torch.Tensor

    @dataclasses.dataclass
    class Nameless:
        x: torch.Tensor

    torch.export.register_dataclass(Registered, serialized_type_name="test_private.Registered")
    torch.export.register_dataclass(Nameless)
    assert pytree.serialized_name(Registered) == "test_private.Registered"
    assert pytree.serialized_type("test_private.Registered") is Registered
    assert pytree.reads_plain_data(Registered)
    assert pytree.serialized_name(Nameless) is None
    assert pytree.serialized_type("test_private.Nameless") is None
    assert not pytree.reads_plain_data(defaultdict)  # imports what the file names


def test_pytree() -> None:
    x, y = torch.zeros(1), torch.ones(2)
    tree = ((x, {"b": [y, 3]}, None), {})
    leaves, spec = pytree.tree_flatten(tree)
    assert [id(leaf) for leaf in leaves] == [id(x), id(y), id(leaves[2]), id(None)]
    assert leaves[2] == 3
    assert [id(leaf) for leaf in pytree.tree_leaves(tree)] == [id(leaf) for leaf in leaves]
    (a, b, none), kwargs = pytree.tree_unflatten(leaves, spec)
    assert a is x
    assert b["b"][0] is y
    assert b["b"][1] == 3
    assert none is None
    assert kwargs == {}
    assert pytree.tree_map_only(Tensor, lambda t: t + 1, {"x": x, "n": 4}) == {"x": torch.ones(1), "n": 4}
    assert spec == pytree.tree_flatten(tree)[1] != pytree.tree_flatten(((x,), {}))[1]
    assert {tuple, list, dict, OrderedDict} <= pytree.SUPPORTED_NODES.keys()

    def rebuilt(spec: pytree.TreeSpec) -> pytree.TreeSpec:  # what saving a program does
        return spec if spec.is_leaf() else pytree.TreeSpec(spec.type, spec.context, [rebuilt(child) for child in spec.children()])

    assert rebuilt(spec) == spec


class Opened:
    def __init__(self, value: object) -> None:
        self.value = value


def test_pytree_takes_classes_apart_that_are_registered() -> None:
    pytree.register_pytree_node(Opened, lambda o: ([o.value], None), lambda values, context: Opened(*values))
    leaves, spec = pytree.tree_flatten([Opened(5)])
    assert leaves == [5]
    assert pytree.tree_unflatten([6], spec)[0].value == 6


class Seen(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


class Loud(Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError("seen")


def test_torch_function() -> None:
    x, loud = torch.zeros(2), torch.zeros(2).as_subclass(Loud)
    with Seen() as seen:
        with torch_function.DisableTorchFunction():
            assert x.stride() == (1,)
            assert loud.is_leaf
            assert x.dtype is torch.float32
        assert seen.count == 0
        x.stride()
        assert seen.count == 1
    with pytest.raises(RuntimeError, match="seen"):
        loud.stride()


def test_versions() -> None:
    x = torch.zeros(4)
    view, before = x[1:], versions.version(x)
    view.add_(1)
    assert versions.version(x) == versions.version(view) == before + 1
    x.data.add_(1)  # what the counter does not tell
    assert versions.version(x) == before + 1
    with torch.inference_mode(), pytest.raises(RuntimeError):
        versions.version(torch.zeros(1))


class Calls(dispatch.WithoutDynamo):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class CallsBeside(dispatch.BesideDynamo, Calls):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_dispatch() -> None:
    assert issubclass(Calls, dispatch.TorchDispatchMode)
    for kind in (Calls, CallsBeside):
        x = torch.ones(2, 2, requires_grad=True)
        with kind() as calls:
            (x @ x).sum().backward()
        assert calls.names.count("mm") == 3
        assert "sum" in calls.names
    assert dispatch.dynamo_is_imported() == ("torch._dynamo" in sys.modules)
    seen = []

    class Casts(dispatch.WithoutDynamo):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Casts(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        torch.ones(2, 2) @ torch.ones(2, 2)
    assert seen.count(dispatch.CAST) == 2


def test_dispatch_does_not_import_dynamo() -> None:
    code = (
        "import sys, torch; from fxfuse import launches; from fxfuse.private import dispatch\n"
        "print(launches.count(lambda: torch.ones(2) + 1).total, dispatch.dynamo_is_imported(), 'torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.endswith(
        " False False\n"
    )


def test_fake_tensors() -> None:
    types: list[type] = []

    class Model(nn.Module):
        def forward(self, x):
            types.append(type(x))
            return x + 1

    torch.export.export(Model(), (torch.zeros(2),), strict=False)
    assert fake_tensors.FakeTensor in types


def test_tensor_guards() -> None:
    x, w = torch.zeros(2, 3), torch.nn.Parameter(torch.zeros(4))
    same = tensor_guards.alike([x, w])
    assert same(torch.ones(3, 2).t(), w)
    with torch.no_grad():
        assert same(x, w)
    others = [torch.zeros(2, 4), torch.zeros(2, 3, 1), x.double(), torch.zeros(2, 3, device="meta"), x.clone().requires_grad_()]
    for other in (*others, x.to_sparse(), None, w, x.as_subclass(torch.nn.Buffer)):
        assert not same(other, w), other
    with torch.inference_mode():
        assert not same(torch.zeros(2, 3), w)
    assert not same(x, w.detach())
    assert not tensor_guards.alike([])()
    assert not tensor_guards.alike([x, x.as_subclass(torch.nn.Buffer)])(x, x)
    assert "torch._dynamo" not in subprocess.run(
        [sys.executable, "-c", "import fxfuse.private.tensor_guards, sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    ).stdout.split()


def test_saved_hooks() -> None:
    assert saved_hooks.saved_hooks() is None
    outer, inner = ((lambda tensor: tensor, lambda tensor: tensor) for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(*outer):
        with torch.autograd.graph.saved_tensors_hooks(*inner):
            assert saved_hooks.saved_hooks() == inner != outer
        assert saved_hooks.saved_hooks() == outer
    assert saved_hooks.saved_hooks() is None


def test_autocast() -> None:
    assert not autocast.any_autocast_enabled()
    with torch.autocast("cpu", torch.bfloat16):
        assert autocast.any_autocast_enabled()
        with torch.autocast("cpu", enabled=False):
            assert not autocast.any_autocast_enabled()
        assert autocast.autocast_on() == (("cpu", torch.bfloat16),)
    assert autocast.autocast_on() == ()
    assert not autocast.any_autocast_enabled()


def test_transforms() -> None:
    inside: list[bool] = []

    def look(x: Tensor) -> Tensor:
        inside.append(transforms.transforming())
        return x.sum()

    torch.vmap(look)(torch.zeros(2, 3))
    torch.func.grad(look)(torch.zeros(3))
    look(torch.zeros(3))
    assert inside == [True, True, False]
    assert not transforms.transforming()
    kept: list[Tensor] = []
    torch.vmap(lambda x: kept.append(x) or x.sum())(torch.zeros(2, 3))  # type: ignore[func-returns-value]
    assert transforms.of_a_transform(kept[0])
    assert not transforms.of_a_transform(torch.zeros(3))
    assert not transforms.in_dual_level()
    with torch.autograd.forward_ad.dual_level():
        assert transforms.in_dual_level()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_ordinary_calls() -> None:
    inside: list[bool] = []

    def look(x: Tensor) -> Tensor:
        inside.append(ordinary.out_of_the_ordinary((x,), {}))
        return x.sum()

    x = torch.zeros(2, 3)
    look(x)
    with torch.inference_mode():
        look(x)
    assert inside == [False, False]
    torch.vmap(look)(x)
    torch.jit.trace(look, x, check_trace=False)
    make_fx(look)(x)
    with FakeTensorMode():
        look(torch.zeros(2, 3))
    torch.fx.symbolic_trace(look)
    assert inside == [False, False, True, True, True, True, True]


class _Twice(torch.autograd.Function):
    """A node that keeps its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] * (2 + 0 * x)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's, of what it traces
def test_before_compiled_autograd_takes_what_was_saved() -> None:
    told: list[str] = []
    x = torch.ones(2, requires_grad=True)
    out: Tensor = _Twice.apply(1 * x)  # type: ignore[no-untyped-call]
    assert out.grad_fn is not None
    compiled_backward.before_it_is_taken(out.grad_fn, lambda: told.append("taken"))
    with compiled_autograd._enable(torch.compile(backend="eager")):
        out.view(2, 1).sum().backward()  # type: ignore[no-untyped-call]
    assert told == ["taken"]
    assert x.grad is not None
    assert x.grad.tolist() == [2, 2]
    compiled_backward.before_it_is_taken((x * x).grad_fn, lambda: told.append("never"))


def test_vmap_fallback() -> None:
    with vmap_fallback.without_vmap_fallback():
        assert torch.vmap(torch.sin)(torch.zeros(2)).shape == (2,)
        with pytest.raises(RuntimeError, match=r"histc hit the vmap fallback|Batching rule not implemented for aten::histc"):
            torch.vmap(torch.histc)(torch.zeros(2, 3))
    with pytest.warns(UserWarning, match="performance drop"):  # the switch is as it was: it runs, lane by lane
        assert torch.vmap(torch.histc)(torch.zeros(2, 3)).shape == (2, 100)


def test_schemas() -> None:
    add = torch.ops.aten.add
    assert isinstance(add.Tensor, schemas.OpOverload)
    assert isinstance(add, schemas.OpOverloadPacket)
    assert schemas.op_name(add.Tensor) == "aten::add.Tensor"
    assert schemas.op_name(add) == "aten::add"
    assert schemas.op_name(torch.ops.aten.relu.default) == "aten::relu.default"
    arguments = schemas.schema_of(add.Tensor).arguments
    assert [(a.name, str(a.type), a.kwarg_only, a.has_default_value()) for a in arguments] == [
        ("self", "Tensor", False, False),
        ("other", "Tensor", False, False),
        ("alpha", "number", True, True),
    ]
    assert arguments[2].default_value == 1
    for name, op in (("torch", "relu"), (schemas.NN_FUNCTIONS, "gelu"), ("torch._C._special", "special_expit")):
        assert callable(getattr(schemas.C_FUNCTIONS[name], op))
    assert not hasattr(schemas.C_FUNCTIONS["torch"], "import_ir_module")  # nothing but operations
    mutable = [schemas.schema_of(op).is_mutable for op in (torch.ops.aten.relu.default, torch.ops.aten.relu_.default)]
    assert mutable == [False, True]
    aliased = [schemas.schema_of(op).returns[0].alias_info is not None for op in (torch.ops.aten.t.default, torch.ops.aten.mm.default)]
    assert aliased == [True, False]
    module = sys.modules.get(schemas.NN_FUNCTIONS) or getattr(torch._C, schemas.NN_FUNCTIONS.rpartition(".")[2])
    assert module.gelu is nn.functional.gelu


def test_storages() -> None:
    x, other = torch.zeros(4), torch.zeros(4)
    key = storages.storage_key(x.untyped_storage())
    assert key == storages.storage_key(x[2:].untyped_storage()) != storages.storage_key(other.untyped_storage())
    one, two = torch.empty(0), torch.empty(0)
    assert storages.storage_key(one.untyped_storage()) != storages.storage_key(two.untyped_storage())


def test_tensor_hooks() -> None:
    parameter = nn.Parameter(torch.ones(2))
    assert not tensor_hooks.has_gradient_hooks(parameter)
    calls: list[str] = []
    handle = parameter.register_hook(lambda grad: calls.append("hook"))
    assert tensor_hooks.has_gradient_hooks(parameter)
    assert len(tensor_hooks.hook_stores(parameter)[0]) == 1
    handle.remove()
    assert not tensor_hooks.has_gradient_hooks(parameter)
    handle = parameter.register_post_accumulate_grad_hook(lambda p: calls.append("late"))
    late = tensor_hooks.hook_stores(parameter)[1]
    assert tensor_hooks.has_gradient_hooks(parameter)
    assert len(late) == 1
    parameter.sum().backward()
    assert calls == ["late"]
    late.update(dict.fromkeys(late, lambda p: calls.append("silenced")))  # what trial runs do: the dict itself is read at a call
    parameter.sum().backward()
    assert calls == ["late", "silenced"]


def test_module_hooks() -> None:
    register = {
        "register_forward_hook": (lambda m, args, out: None, {}),
        "register_forward_pre_hook": (lambda m, args: None, {}),
        "register_full_backward_hook": (lambda m, before, after: None, {}),
        "register_full_backward_pre_hook": (lambda m, before: None, {}),
    }
    for name, (hook, options) in register.items():
        module = nn.Linear(2, 2)
        assert not module_hooks.has_hooks(module)
        handle = getattr(module, name)(hook, **options)
        assert module_hooks.has_hooks(module)
        assert any(module.__dict__[store] for store in module_hooks.CALL_HOOKS), name
        handle.remove()
        assert not module_hooks.has_hooks(module)
    # every dict of hooks that torch has is known, or belongs to state dicts
    stores = {name for name in nn.Module().__dict__ if "hook" in name and "state_dict" not in name and "full_backward" not in name}
    assert stores == set(module_hooks.HOOK_DICTS)
    assert nn.Module().__dict__.keys() >= module_hooks.BOOKKEEPING
    for register_for_all in ("forward_pre", "forward", "full_backward_pre", "full_backward"):
        assert not module_hooks.hooks_for_all()
        handle = getattr(nn.modules.module, f"register_module_{register_for_all}_hook")(lambda *args: None)
        assert module_hooks.hooks_for_all()
        handle.remove()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    module, x = kind(3, 4, num_layers=2).double(), torch.randn(5, 2, 3, dtype=torch.float64)
    expected = module(x)[0]
    parameters = dict(module.named_parameters())
    assert [id(w) for w in module._flat_weights] == [id(parameters[name]) for name in module._flat_weights_names]
    listed = type("Listed", (kind,), {**recurrent.listing(), "__slots__": ()})
    recurrent.forget(module)
    module.__class__ = listed
    assert torch.equal(module(x)[0], expected)
    del module._parameters["weight_hh_l0"]
    module.__dict__["weight_hh_l0"] = parameters["weight_hh_l0"].detach() * 2  # found by name at the next call
    assert not torch.equal(module(x)[0], expected)
    del module.__dict__["weight_hh_l0"]
    module.__class__ = kind
    module._parameters["weight_hh_l0"] = parameters["weight_hh_l0"]
    recurrent.relist(module)
    assert torch.equal(module(x)[0], expected)


def test_state_dicts() -> None:
    saved = nn.Sequential(nn.BatchNorm1d(2)).state_dict()
    given = state_dicts.versions_of(saved)
    assert given is not None
    assert given["0"] == {"version": 2}
    assert state_dicts.versions_of(dict(saved)) is None
    other = OrderedDict(saved)
    del other["0.num_batches_tracked"]
    state_dicts.set_versions(other, {"0": {"version": 1}})  # a checkpoint from before the counter: not missed
    assert not nn.Sequential(nn.BatchNorm1d(2)).load_state_dict(other).missing_keys


def test_profiler() -> None:
    x = torch.zeros(1000)

    def fn() -> None:
        assert profiler.is_profiling()
        (x + 1) + 1

    assert not profiler.is_profiling()
    assert profiler.has_recorder()
    for changes in (profiler.recorded(fn), profiler.profiled(fn)):
        assert [change for change in changes if abs(change) >= 4000] in ([4000, 4000, -4000, -4000],)
    assert not profiler.is_profiling()


def test_asserts() -> None:
    asserts.assert_async(torch.tensor(True), "fine")
    with pytest.raises(RuntimeError, match="not fine"):
        asserts.assert_async(torch.tensor(False), "not fine")


class Own(nn.Linear):
    """Overrides what the lanes override."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.register_buffer("kept", torch.zeros(1))
        self.register_buffer("left", torch.zeros(1), persistent=False)
        self.calls: list[str] = []

    def _apply(self, fn, recurse=True):
        self.calls.append("apply")
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        missing, unexpected, errors = rest[2:5]
        self.calls.append(f"load {prefix} {rest[0].get('assign_to_params_buffers', False)}")
        assert missing == []
        assert isinstance(errors, list)
        assert isinstance(unexpected, list)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self.calls.append(f"save {prefix}")
        super()._save_to_state_dict(destination, prefix, keep_vars)


def test_modules_keep_their_own_in_dicts_that_are_read_at_every_use() -> None:
    model = nn.Sequential(Own())
    own = model[0]
    assert list(own._parameters) == ["weight", "bias"]
    assert list(own._buffers) == ["kept", "left"]
    assert model._modules == {"0": own}
    assert own._non_persistent_buffers_set == {"left"}
    own.__dict__["_parameters"] = {"weight": own._parameters["weight"]}
    assert [name for name, _ in model.named_parameters()] == ["0.weight"]


def test_modules_call_the_methods_that_lanes_override() -> None:
    model = nn.Sequential(Own())
    saved = model.state_dict()
    model.load_state_dict(saved)
    model.load_state_dict(saved, assign=True)
    model.double()
    assert model[0].calls == ["save 0.", "load 0. False", "load 0. True", "apply"]


def test_parse_to() -> None:
    """What ``nn.Module.to`` is asked for."""
    assert parse_to.parse_to("cpu") == (torch.device("cpu"), None, False, None)
    assert parse_to.parse_to(torch.float64) == (None, torch.float64, False, None)
    assert parse_to.parse_to(torch.zeros(1, dtype=torch.float16))[:2] == (torch.device("cpu"), torch.float16)
    assert parse_to.parse_to(memory_format=torch.channels_last)[3] is torch.channels_last
    with pytest.raises(TypeError):
        parse_to.parse_to("no such device", 3)


def test_while_traced() -> None:
    """What ``comptime`` gives: objects, the tensors of a call, and a flag that the code which it runs does not see."""
    from torch._dynamo.comptime import comptime

    box, x = types.SimpleNamespace(number=3), torch.randn(2, 3)
    seen: list[bool] = []

    def look(context: Any) -> None:
        seen.append(while_traced.local_object(context, "box") is box)
        first, (computed, number), text = while_traced.local_example(context, "args")
        seen.append(first is x)
        seen.append((computed.shape, computed.stride(), number, text) == ((3, 2), (1, 3), 5, "a"))
        seen.append(torch.compiler.is_compiling())
        with while_traced.not_compiling():
            seen.append(not torch.compiler.is_compiling())
        seen.append(torch.compiler.is_compiling())

    _LOOK.append(look)

    def inner(box: Any, *args: Any) -> Any:
        comptime(_look)
        return args[0] + box.number

    torch.compile(lambda x: inner(box, x, [(x + 1).t(), 5], "a"), backend="eager", fullgraph=True)(x)
    assert seen == [True] * 6
    torch.compiler.reset()


def test_a_trace_that_starts_anew() -> None:
    """Another trace for each attempt, the same one within; what was traced before is left."""
    from torch._dynamo.comptime import comptime

    traces: list[Any] = []
    graphs: list[torch.fx.GraphModule] = []

    def look(context: Any) -> None:
        traces.append(while_traced.trace_now())
        if len(traces) == 2:
            while_traced.start_anew("a test")

    def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    def traced(x: Tensor) -> Tensor:
        comptime(_look)
        x = x + len(graphs)
        comptime(_look)
        return x

    _LOOK.append(look)
    torch.compile(traced, backend=keep, fullgraph=True)(torch.zeros(2))
    assert len(traces) == 4
    assert traces[0] is traces[1] is not traces[2] is traces[3]
    assert [node.op for node in graphs[0].graph.nodes].count("call_function") == 1
    assert while_traced.trace_now() is None
    torch.compiler.reset()


_LOOK: list[Any] = []


def _look(context: Any) -> None:  # comptime calls what has no variables of another function
    _LOOK[-1](context)


def test_dynamo() -> None:
    """What the backend relies on of torch.compile: names, settings, and what a graph's placeholders carry."""
    assert dynamo.backend_named("eager") is dynamo.backend_named("eager")
    assert dynamo.mode_settings("reduce-overhead") == {"triton.cudagraphs": True}
    assert dynamo.is_setting("max_autotune")
    assert dynamo.is_setting("max-autotune")
    assert not dynamo.is_setting("min_lanes")
    model, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), torch.randn(5, 3)
    model.eval()
    seen: list[bool] = []

    def look(graph: torch.fx.GraphModule, inputs: list[object]) -> object:
        nodes = graph.graph.find_nodes(op="placeholder")
        assert [dynamo.is_weight(node) for node in nodes] == [not (isinstance(i, Tensor) and i.shape == (5, 3)) for i in inputs]
        assert all(dynamo.example_of(node) is given for node, given in zip(nodes, inputs, strict=True))
        assert len({id(given) for given in inputs} & {id(t) for t in (*model.parameters(), *model.buffers())}) == 6
        made = dynamo.stand_in(torch.ones(2, 7), inputs)
        assert type(made) is fake_tensors.FakeTensor
        assert made.shape == (2, 7)
        fresh = torch.fx.Graph()
        copied = fresh.node_copy(nodes[0])
        dynamo.keep_source(copied, nodes[0])
        assert copied._dynamo_source is nodes[0]._dynamo_source is not None  # type: ignore[attr-defined]
        dynamo.keep_source(pack := fresh.placeholder("pack"), None)
        assert dynamo.is_weight(pack)
        other = torch.fx.GraphModule(nn.Module(), fresh)
        dynamo.keep_origin(other, graph)
        assert other.meta["dynamo_compile_id"] is graph.meta["dynamo_compile_id"]
        assert other._param_name_to_source == graph._param_name_to_source
        seen.append(True)
        return graph.forward

    torch.compile(model, backend=look)(x)
    assert seen == [True]
    torch.compiler.reset()


def test_dynamo_open_sizes() -> None:
    """Sizes that are open because all are, or because they change."""
    found: list[tuple[bool, bool]] = []

    def look(graph: torch.fx.GraphModule, inputs: list[object]) -> object:
        for node, given in zip(graph.graph.find_nodes(op="placeholder"), inputs, strict=True):
            if isinstance(given, Tensor):
                example = node.meta["example_value"]
                found.append((dynamo.is_open(example.shape[0]), dynamo.is_wanted_open(given, 0)))
        return graph.forward

    torch.compile(torch.sin, backend=look, dynamic=True)(torch.randn(5, 3))
    torch.compiler.reset()
    call = torch.compile(torch.sin, backend=look)
    for rows in (5, 6):
        call(torch.randn(rows, 3))
    assert found == [(True, False), (False, True), (True, True)]
    torch.compiler.reset()


def test_higher_order_calls() -> None:
    assert dynamo.is_higher_order(torch.ops.higher_order.cond)
    assert not dynamo.is_higher_order(torch.sin)


def test_custom_pass() -> None:
    done: list[torch.fx.Graph] = []
    made, graph = custom_pass.custom_pass(done.append, "identity", "name"), torch.fx.Graph()
    made(graph)
    assert done == [graph]
    assert made.uuid() == "identity"  # type: ignore[attr-defined]
    from torch._inductor.codecache import FxGraphHashDetails

    assert FxGraphHashDetails._get_custom_pass_detail(None, made) == "identity"  # type: ignore[arg-type]


def test_holders() -> None:
    tensor = torch.zeros(3)
    assert storages.holders(tensor) == 1
    kept = [tensor.detach(), tensor[1:], nn.Parameter(tensor)]
    assert storages.holders(tensor) == 4
    kept.clear()
    assert storages.holders(tensor) == 1
    (tensor * 2).numpy()
    held = tensor.numpy()
    assert storages.holders(tensor) == 2
    del held


def test_pt2_archives(tmp_path) -> None:
    """The records of a file that torch.export wrote, and its folders."""
    path = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(nn.Linear(2, 3), (torch.zeros(4, 2),)), path)
    records = pt2_archives.Records(path)
    assert records.read(pt2_archives.FORMAT) == b"pt2"
    folders = (pt2_archives.WEIGHTS, pt2_archives.CONSTANTS, pt2_archives.SAMPLES, pt2_archives.MODELS)
    for folder in folders:
        assert [name for name in records.names if name.startswith(folder)], folder
    assert records.size(f"{pt2_archives.WEIGHTS}weight_0") in (12, 24)
    assert pt2_archives.AOTINDUCTOR == "data/aotinductor/"
    with pytest.raises(RuntimeError):
        pt2_archives.Records(tmp_path / "none.pt2")


def test_aotinductor() -> None:
    """Compiling is tested where packages are written; here, that the functions are there."""
    from torch.export.pt2_archive import _package

    assert callable(torch._inductor.aot_compile)
    assert callable(_package._package_aoti_files)
    assert isinstance(torch._inductor.config.aot_inductor.force_mmap_weights, bool)
    assert callable(torch._inductor.aoti_load_package)
    with pytest.raises(Exception, match="zip archive"):
        aotinductor.load_package("none.pt2")


def test_weights_of_a_pt2_are_written_from_where_they_lie(tmp_path: Path) -> None:
    """The same records as torch writes; no ``bytes`` of a weight's size is made, which ``tracemalloc`` would see."""
    layer = nn.Linear(512, 256)
    layer.register_buffer("empty", torch.zeros(0, 4))
    program = torch.export.export(layer, (torch.randn(2, 512),))
    torch.export.save(program, tmp_path / "torch.pt2")
    with pt2_writer.written_in_place() as known:
        assert known
        tracemalloc.start()
        torch.export.save(program, tmp_path / "own.pt2")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < layer.weight.nbytes
    one, other = (pt2_archives.Records(tmp_path / f"{name}.pt2") for name in ("torch", "own"))
    assert one.names == other.names
    weights = [name for name in one.names if name.startswith(pt2_archives.WEIGHTS)]
    assert len(weights) == 4  # three tensors, and the config
    assert all(one.read(name) == other.read(name) for name in weights)
    tracemalloc.start()
    torch.export.save(program, tmp_path / "again.pt2")
    assert tracemalloc.get_traced_memory()[1] > layer.weight.nbytes  # what torch does by itself, and does again afterwards
    tracemalloc.stop()


def test_the_writer_that_maps_files_writes_what_torchs_own_does(tmp_path: Path) -> None:
    """Torch's own reads a file whole; both give the same records, also of an empty file."""
    from torch.export.pt2_archive._package import PT2ArchiveReader, PT2ArchiveWriter

    (tmp_path / "file").write_bytes(bytes(range(256)) * 33)
    (tmp_path / "empty").write_bytes(b"")
    found = []
    for writer in (PT2ArchiveWriter, aotinductor.mapping_writer()):
        with writer(str(tmp_path / "out.pt2")) as opened:
            opened.write_file("data/file", str(tmp_path / "file"))
            opened.write_file("data/empty", str(tmp_path / "empty"))
        with PT2ArchiveReader(str(tmp_path / "out.pt2")) as read:
            found.append([read.read_bytes(name) for name in ("data/file", "data/empty")])
    assert found[0] == found[1] == [(tmp_path / "file").read_bytes(), b""]


def test_exported() -> None:
    """How a program of torch.export takes its arguments."""

    class Named(nn.Module):
        def forward(self, x: Tensor, *, y: Tensor) -> dict[str, Tensor]:
            return {"sum": x + y}

    module = torch.export.export(Named(), (torch.zeros(2),), {"y": torch.ones(2)}).module()
    found = exported.specs(module)
    assert found is not None
    assert exported.keywords(found[0]) == ["y"]
    assert exported.positional(found[0]) == 1
    assert found[0] == pytree.tree_flatten(((torch.zeros(2),), {"y": torch.ones(2)}))[1]
    assert any(node.target == exported.GUARDS for node in module.graph.nodes) or not hasattr(module, exported.GUARDS)
    assert exported.specs(torch.fx.symbolic_trace(nn.ReLU())) is None


def test_known_result() -> None:
    """Autograd records the join, whose result is memory that is there: no copy; gradients are views of one."""
    for join, rows in ((torch.stack, [4] * 3), (torch.cat, [4, 2, 3])):
        parts = [torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in rows]
        memory = join([part.detach() for part in parts])
        packed = known_result.joined(join, parts, memory)
        assert packed.data_ptr() == memory.data_ptr()
        assert packed.requires_grad
        assert packed._version == memory._version
        gradient = torch.randn_like(packed)
        packed.backward(gradient)
        expected = gradient.unbind() if join is torch.stack else gradient.split(rows)
        for part, slice_ in zip(parts, expected):
            assert part.grad is not None
            assert torch.equal(part.grad, slice_)
        assert len({part.grad.untyped_storage().data_ptr() for part in parts if part.grad is not None}) == 1
        memory.mul_(2)
        assert torch.equal(packed, memory)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        packed = known_result.joined(torch.cat, parts, memory)
        squares = packed.square()
        memory.mul_(2)
        squares.sum().backward()
