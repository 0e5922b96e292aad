"""Plans on disk: an equal model is not timed again, any other is, and no file, whatever is in it, makes a result wrong."""

from __future__ import annotations

import json
import os
import threading
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from checks import QUICK, assert_fused_equals, randn, randomized
from fxfuse.planning import plan_cache, timing
from fxfuse.planning.fingerprint import device_name


class Nets(nn.Module):
    def __init__(self, lanes: int = 8, hidden: int = 6, activation: type[nn.Module] = nn.Tanh) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(1, hidden), activation(), nn.Linear(hidden, 1)) for _ in range(lanes))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)


class OtherNames(nn.Module):
    """The same computation under other names, on other lines."""

    def __init__(self) -> None:
        super().__init__()
        self.columns = nn.ModuleList(nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)) for _ in range(8))

    def forward(self, values: Tensor) -> Tensor:
        found = []
        for i, net in enumerate(self.columns):
            found.append(net(values[:, i : i + 1]))
        return torch.cat(found, 1)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with everything that is timed."""
    calls: list[int] = []
    samples = timing._samples

    def counted(functions: Any, budget: float, least: int, most: int) -> Any:
        calls.append(len(functions))
        return samples(functions, 0.0, 3, 3)  # quick: which form wins does not matter here

    monkeypatch.setattr(timing, "_samples", counted)
    return calls


@pytest.fixture
def certain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packed form counts as faster, whatever the machine is doing."""
    monkeypatch.setattr(import_module("fxfuse.planning.plan"), "LEAST_GAIN", 0.0)


def files() -> list[Path]:
    where = plan_cache.directory()
    assert where is not None
    return sorted(where.glob("*")) if where.exists() else []


def fuse(model: nn.Module | None = None, x: Tensor | None = None, **options: Any) -> fxfuse.Report:
    torch.manual_seed(torch.initial_seed() % 1000 + 1)  # other weights each time
    model = Nets() if model is None else model
    return fxfuse.report(fxfuse.optimize(model, torch.randn(5, 8) if x is None else x, validate=False, **options))


@pytest.mark.usefixtures("certain")
def test_an_equal_model_is_not_timed_again(timed):
    first = fuse()
    assert timed
    assert not first.fused[0].cached
    assert "cached" in first.to_dict()["fused"][0]
    del timed[:]
    second = fuse()
    assert not timed
    (plan,) = second.fused
    assert plan.cached
    assert "from the cache" in str(second)
    assert "from the cache" not in str(first)
    assert [op.lowering for op in plan.ops] == [op.lowering for op in first.fused[0].ops]
    assert (plan.seconds, plan.peak_bytes) == (first.fused[0].seconds, first.fused[0].peak_bytes)
    assert plan.tried == first.fused[0].tried
    assert second.timings == first.timings


@pytest.mark.usefixtures("certain")
def test_a_cached_plan_is_compared_with_the_original(timed):
    model, x = randomized(Nets()), randn(5, 8)
    fuse(model, x)
    del timed[:]
    fused = assert_fused_equals(model, x, objective="time")
    report = fxfuse.report(fused)
    assert report.fused[0].cached
    assert report.validation is not None
    assert report.validation.ok
    assert not timed


def test_a_loop_that_is_faster_is_remembered_as_such(timed, monkeypatch):
    monkeypatch.setattr(import_module("fxfuse.planning.plan"), "LEAST_GAIN", 1e9)
    first = fuse()
    assert not first.fused
    del timed[:]
    second = fuse()
    assert not timed
    (one,), (two,) = first.refused, second.refused
    assert two.reason == f"{one.reason}, measured in an earlier run"


@pytest.mark.parametrize("busy", [True, False])
def test_a_loop_that_seems_faster_is_looked_at_again(busy, monkeypatch):
    """The machine had other things to do while the packed form ran: the least of its times tells."""
    plan = import_module("fxfuse.planning.plan")
    monkeypatch.setattr(plan, "as_usual", lambda planner, choice: choice)
    monkeypatch.setattr(plan, "medians", lambda functions, budget: [1.0, 4.5][: len(functions)] + [4.5] * (len(functions) - 2))
    monkeypatch.setattr(plan, "quickest", lambda functions: [1.0, 0.2 if busy else 4.4])
    report = fuse(cache=False)
    assert len(report.fused) == busy
    if not busy:
        assert "left as a loop: packed runs 0.23x" in str(report.refused[0])


@pytest.mark.usefixtures("certain")
@pytest.mark.parametrize(
    ("other", "x", "options"),
    [
        (lambda: Nets(7), (5, 7), {}), (lambda: Nets(8, 7), (5, 8), {}), (lambda: Nets(8, 6, nn.ReLU), (5, 8), {}), (Nets, (6, 8), {}),
        (Nets, (5, 8), {"mode": "infer"}), (Nets, (5, 8), {"lowering": "bmm"}), (Nets, (5, 8), {"max_memory": 10**9}),
        (Nets, (5, 8), {"tune_for": 3}), (Nets, (5, 8), {"cache": False}),
    ],
    ids=["lanes", "width", "activation", "batch", "mode", "lowering", "memory", "tune_for", "off"],
)  # fmt: skip
def test_what_differs_is_timed(timed, other, x, options):
    fuse()
    del timed[:]
    report = fuse(other(), torch.randn(x), **options)
    assert timed
    assert not any(plan.cached for plan in report.fused)


@pytest.mark.usefixtures("certain")
def test_dtype_threads_and_versions_count(timed, monkeypatch):
    fuse()
    for change in ("dtype", "threads", "version", "processor"):
        del timed[:]
        with pytest.MonkeyPatch.context() as patch:
            model, x = Nets(), torch.randn(5, 8)
            if change == "dtype":
                model, x = model.double(), x.double()
            elif change == "threads":
                patch.setattr(torch, "get_num_threads", lambda: 77)
            elif change == "version":
                patch.setattr(fxfuse, "__version__", "99")
            else:
                patch.setattr(import_module("fxfuse.planning.fingerprint"), "_processor", lambda: "another")
            fuse(model, x)
        assert timed, change


@pytest.mark.usefixtures("certain")
def test_names_and_lines_do_not_count(timed):
    fuse()
    del timed[:]
    assert fuse(OtherNames()).fused[0].cached
    assert timed == [2], "the whole model's classes are others: it is timed once, before and after"


@pytest.mark.usefixtures("certain")
@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b'{"format": 1, "key": "another", "plan": {}}', b"[" * 100_000, b" " * (1 << 19)],
    ids=["empty", "cut", "list", "null", "binary", "foreign", "deep", "large"],
)
def test_damaged_files_are_as_if_they_were_not_there(timed, damage):
    fuse()
    for path in files():
        path.write_bytes(damage)
    del timed[:]
    report = fuse()
    assert timed
    assert not report.fused[0].cached
    del timed[:]
    assert fuse().fused[0].cached, "it was written anew"
    assert not timed


@pytest.mark.usefixtures("certain")
@pytest.mark.parametrize(
    "change",
    [
        {"chunks": 0}, {"chunks": "2"}, {"chunks": True}, {"together": 1}, {"lowering": [[["linear", 8, [[5, 1], [6, 1], [6]]], "magic"]]},
        {"lowering": {"a": 1}}, {"lowering": [[{}, "dot"]]}, {"lowering": 3}, {"seconds": [1]}, {"seconds": "ab"}, {"tried": [[1, 2, 3]]},
        {"tried": [["a", "b"]]}, {"tried": [[1, 2.0]]}, {"refusal": 3}, {"peak": ["a", "b"]},
    ],
    ids=str,
)  # fmt: skip
def test_plans_that_make_no_sense_are_made_anew(timed, change):
    fuse()
    for path in files():
        data = json.loads(path.read_text())
        if "lowering" in data["plan"]:
            path.write_text(json.dumps({**data, "plan": {**data["plan"], **change}}))
    del timed[:]
    report = fuse()
    assert timed
    assert not report.fused[0].cached


@pytest.mark.usefixtures("certain")
def test_a_plan_of_any_sense_gives_the_right_numbers():
    """A file says how to compute, never what: another lowering and number of chunks than was best is slower, not wrong."""
    model, x = randomized(Nets()), randn(5, 8)
    fuse(model, x)
    for path in files():
        data = json.loads(path.read_text())
        if "lowering" in data["plan"]:
            lowering = [[key, "grouped_conv"] for key, _ in data["plan"]["lowering"]]
            path.write_text(json.dumps({**data, "plan": {**data["plan"], "lowering": lowering, "chunks": 3}}))
    fused = assert_fused_equals(model, x, objective="time")
    assert {op.lowering for op in fxfuse.report(fused).fused[0].ops if op.op == "linear"} == {"grouped_conv, 3 chunks"}
    assert fxfuse.report(fused).fused[0].cached


@pytest.mark.usefixtures("certain")
def test_off_for_the_process(timed, monkeypatch):
    where = Path(os.environ["FXFUSE_CACHE_DIR"])
    monkeypatch.setenv("FXFUSE_CACHE", "0")
    fuse()
    assert not where.exists()
    del timed[:]
    assert not fuse().fused[0].cached
    assert timed


@pytest.mark.usefixtures("certain")
def test_a_directory_that_cannot_be_used(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FXFUSE_CACHE_DIR", str(tmp_path / "file"))
    assert fxfuse.report(fxfuse.optimize(Nets(), torch.randn(5, 8), validate=False)).fused
    assert (tmp_path / "file").read_text() == ""


def test_no_plan_is_kept_of_what_is_only_counted():
    fxfuse.optimize(Nets(), torch.randn(5, 8), objective="launches", validate=False)
    fxfuse.optimize(Nets(), torch.randn(5, 8), **QUICK)
    assert not files()


def test_the_directory_is_bounded_and_others_files_stay(monkeypatch):
    monkeypatch.setattr(plan_cache, "MOST_FILES", 20)
    plan_cache.store("first", {"n": -1})
    where = plan_cache.directory()
    assert where is not None
    (where / "notes.txt").write_text("mine")
    (where / "plan-left.tmp").write_text("")
    os.utime(where / "plan-left.tmp", (1, 1))
    os.utime(where / "plan-first.json", (2, 2))
    plan_cache.store("second", {"n": 0})
    os.utime(where / "plan-second.json", (3, 3))
    assert plan_cache.load("second") == {"n": 0}, "a plan that is read is young again"
    for number in range(30):
        plan_cache.store(f"k{number}", {"n": number})
        os.utime(where / f"plan-k{number}.json", (10 + number, 10 + number))
    left = {path.name for path in files()}
    assert len(left) <= 21
    assert "notes.txt" in left
    assert "plan-left.tmp" not in left
    assert plan_cache.load("first") is None
    assert plan_cache.load("second") == {"n": 0}
    assert plan_cache.load("k29") == {"n": 29}


def test_too_large_a_plan_is_not_kept():
    plan_cache.store("large", {"text": "x" * plan_cache.MOST_BYTES})
    plan_cache.store("no json", {"text": object()})
    plan_cache.store("no number", {"text": float("nan")})
    assert not files()


def test_many_writers_leave_one_whole_file():
    def write(number: int) -> None:
        for _ in range(20):
            plan_cache.store("same", {"number": number, "filling": "x" * 5000})

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    seen = [plan_cache.load("same") for _ in range(200)]
    for thread in threads:
        thread.join()
    assert all(plan is None or plan["filling"] == "x" * 5000 for plan in seen)
    assert [path.name for path in files()] == ["plan-same.json"]


@pytest.mark.parametrize(
    ("system", "variables", "expected"),
    [
        ("linux", {"XDG_CACHE_HOME": "/c"}, "/c/fxfuse"), ("linux", {"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/fxfuse"),
        ("linux", {}, "/home/me/.cache/fxfuse"), ("darwin", {}, "/home/me/Library/Caches/fxfuse"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/fxfuse/Cache"), ("win32", {}, "/home/me/AppData/Local/fxfuse/Cache"),
        ("linux", {"FXFUSE_CACHE_DIR": "/mine"}, "/mine"), ("linux", {"FXFUSE_CACHE_DIR": "/mine", "FXFUSE_CACHE": "off"}, None),
        ("linux", {"FXFUSE_CACHE": "1"}, "/home/me/.cache/fxfuse"),
    ],
)  # fmt: skip
def test_where_the_platforms_keep_caches(monkeypatch, system, variables, expected):
    for name in ("FXFUSE_CACHE", "FXFUSE_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(plan_cache.sys, "platform", system)
    monkeypatch.setattr(plan_cache.Path, "home", lambda: Path("/home/me"))
    found = plan_cache.directory()
    assert (None if found is None else found.as_posix()) == expected


def test_the_device_s_name():
    assert device_name(torch.device("cpu")).endswith(f"{torch.get_num_threads()} threads")
    assert device_name(torch.device("meta")) == "meta"


@pytest.mark.usefixtures("certain", "timed")
def test_a_damaged_key_of_a_lowering_is_as_no_file() -> None:
    options = {"tune_for": [2, 2048]}
    fuse(x=torch.randn(16, 8), **options)
    damaged = 0
    for file in files():
        held = json.loads(file.read_text())
        if "plan" in held:
            for lowering in ([["linear", 4], "baddbmm"], [[], "dot"]):
                held["plan"]["sizes"] = [[0, [lowering], 1, False, [[2, 1e-3, 5e-4]], [0]], [64, [], 1, True, [[2048, 1e-3, 5e-4]], [1]]]
                file.write_text(json.dumps(held))
                again = fuse(x=torch.randn(16, 8), **options)
                assert again.fused, again
                assert "fxfuse failed" not in str(again)
                damaged += not again.fused[0].cached
    assert damaged
