"""The page that a person reads, and the same as data."""

import json
from collections import Counter

import pytest
import torch
from torch import nn

from fxfuse.checking.validate import verify
from fxfuse.graph import FusedOp, Place, Recipe, Refusal, RegionPlan
from fxfuse.report import Report, _bars, _bytes, _ratio, _seconds, _table

PLACE = Place("/home/me/model.py", 41)


@pytest.fixture
def report():
    plan = RegionPlan(
        "features",
        [Recipe("packed.nets.0.weight", ("nets.0.0.weight", "nets.1.0.weight"), (32, 1), (0, 1), "stack")],
        {},
        ops=[FusedOp("linear", 128, "addcmul", PLACE, "[64, 1] x [1, 32]"), FusedOp("relu", 128, "pointwise", None, "[64, 32]")],
        notes=["dropout draws other random numbers than the loop did: same distribution"],
        place=PLACE,
        launches=(1154, 9),
        heavy=(384, 3),
        seconds=(3.92e-3, 4.2e-4),
        peak_bytes=(4_000_000, 3_000_000),
        tried=[("grouped_conv", 2.4e-3), ("baddbmm", 4.2e-4)],
    )
    torch.manual_seed(0)
    loop = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
    return Report(
        model="NAM",
        fused=[plan],
        refused=[Refusal("lane 2 differs: eps 1e-06 against 1e-05", PLACE, "heads"), Refusal("forward raises ValueError")],
        validation=verify(loop, loop, torch.randn(8, 4)),
        timings={"inference": (3.92e-3, 4.2e-4)},
        launches=(1200, 15),
        facts=["specialised to batch size 64: `if x.shape[0] == 64` (model.py:38)"],
        notes=["an optimizer holds the old parameters"],
        fallbacks=Counter({"batch size 3": 2}),
        stages={"record": 0.2, "plan": 1.1},
    )


def test_the_page_says_it_all(report):
    lines = str(report).splitlines()
    assert lines[0] == "fxfuse: NAM: 1 region fused, up to 128 lanes in one op, 2 left as they are"
    for wanted in [
        "fused: features (model.py:41)",
        "  linear  128 lanes  [64, 1] x [1, 32]  addcmul    model.py:41",
        "  relu    128 lanes  [64, 32]           pointwise",
        "  launches         1,154  ->        9    128x fewer",
        "  of them heavy      384  ->        3    128x fewer",
        "  median time    3.92 ms  ->   420 us  9.33x faster",
        "  peak memory    3.8 MiB  ->  2.9 MiB    1.33x less",
        "  also timed: baddbmm 420 us; grouped_conv 2.40 ms",
        "  note: dropout draws other random numbers than the loop did: same distribution",
        "  heads: lane 2 differs: eps 1e-06 against 1e-05 (model.py:41)",
        "  forward raises ValueError",
        "  equal to the original",
        "  specialised to batch size 64: `if x.shape[0] == 64` (model.py:38)",
        "  an optimizer holds the old parameters",
        "  2x batch size 3",
        "took 1.30 s: record 200 ms, plan 1.10 s",
    ]:
        assert wanted in lines, wanted
    assert any(line.startswith("  rounding in float32") for line in lines)
    assert any(line.split()[:1] == ["equal"] and line.endswith("#") for line in lines)


def test_the_page_fits_a_terminal(report):
    report.refused += [Refusal("a very long reason " * 20, PLACE)]
    report.notes += ["x" * 300]
    report.fused[0].ops += [FusedOp("conv_transpose3d", 2048, "grouped convolution in chunks of 16", PLACE, "[64, 3, 8, 8, 8] x " * 6)]
    report.fused[0].ops += [FusedOp("relu", 2, "pointwise", PLACE)] * 100
    text = str(report)
    assert max(map(len, text.splitlines())) < 100
    assert text.replace("\n", "").isprintable()
    assert "\x1b" not in text
    assert not any(line.endswith(" ") for line in text.splitlines())
    assert "and 64 more" in text


def test_nothing_fused():
    report = Report("Net", refused=[Refusal("no loop was found")])
    assert str(report) == "fxfuse: Net: nothing fused, 1 left as it is\n\nleft as it is\n  no loop was found"
    assert str(Report("Net")) == "fxfuse: Net: nothing fused"


def test_equal_refusals_are_said_once():
    page = str(Report("Net", refused=[Refusal("one lane only", PLACE)] * 7))
    assert page.count("one lane only") == 1
    assert "[7x]" in page


def test_a_failed_validation_is_on_the_page():
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    page = str(Report("Net", validation=verify(model, other, torch.randn(3, 2))))
    assert "NOT equal to the original" in page
    assert "differs: output output" in page


def test_json(report):
    report.timings["odd"] = (float("inf"), float("nan"))
    data = json.loads(report.to_json())
    assert data == json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["model"] == "NAM"
    assert data["timings"]["odd"] == ["inf", "nan"]
    region = data["fused"][0]
    assert region["path"] == "features"
    assert region["lanes"] == 128
    assert region["place"] == "model.py:41"
    assert (region["launches"], region["heavy"]) == ([1154, 9], [384, 3])
    assert region["ops"][0] == {
        "op": "linear",
        "lanes": 128,
        "lowering": "addcmul",
        "place": "model.py:41",
        "detail": "[64, 1] x [1, 32]",
    }
    assert region["packed"][0]["members"] == ["nets.0.0.weight", "nets.1.0.weight"]
    assert data["refused"][0] == {
        "reason": "lane 2 differs: eps 1e-06 against 1e-05",
        "region": "heads",
        "place": "model.py:41",
        "file": "/home/me/model.py",
        "line": 41,
    }
    assert data["refused"][1]["place"] is None
    assert data["validation"]["ok"] is True
    assert data["fallbacks"] == {"batch size 3": 2}


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0 us"), (4.2e-7, "0.42 us"), (1e-4, "100 us"), (0.0042, "4.20 ms"), (0.9999, "1000 ms"), (75, "75.0 s")]
)
def test_seconds(value, text):
    assert _seconds(value) == text


@pytest.mark.parametrize(("value", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 * 1024**4, "5,120.0 GiB")])
def test_bytes(value, text):
    assert _bytes(value) == text


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [(384, 3, "128x better"), (3, 384, "128x worse"), (9, 4, "2.25x better"), (5, 5, "the same"), (0, 0, "the same"), (0, 3, "")],
)
def test_ratios(before, after, text):
    assert _ratio(before, after, "better", "worse") == text


def test_bars():
    inf = float("inf")
    lines = _bars([(-inf, 5), *((float(e), 10) for e in range(-20, -4)), (inf, 1)], most=5)
    assert [line.split()[0] for line in lines] == ["equal", "below", "1e-06", "1e-05", "NaN"], "five lines, as asked"
    assert sum(int(line.replace("#", "").split()[-1]) for line in lines) == 5 + 160 + 1
    assert _bars([]) == []
    assert _bars([(-inf, 3)]) == [f"  {'equal':>14} {3:>12,} {'#' * 40}"]


def test_tables_align_numbers_to_the_right():
    assert _table([["a", "10", "x"], ["bcd", "9", ""]], "") == ["a    10  x", "bcd   9"]
    assert _table([], "") == []
