"""Peak memory, against cases whose answer is known."""

import pytest
import torch
from torch import nn

from fxfuse.errors import FxfuseError
from fxfuse.planning import memory
from fxfuse.planning.memory import peak_bytes

MB = 1_000_000
SMALL = 4096  # scalars that PyTorch makes on the way


def near(got, expected):
    return expected <= got <= expected + SMALL


@pytest.fixture(params=["recorder", "profiler"])
def peak(request, monkeypatch):
    """Both ways of measuring on the CPU."""
    if request.param == "profiler":
        monkeypatch.delattr(torch._C._autograd, "_enable_profiler_legacy")
    return peak_bytes


def test_two_results_alive(peak):
    x = torch.zeros(MB // 4)
    assert near(peak(lambda: (x + 1) + 1), 2 * MB)


def test_freed_memory_is_counted_once(peak):
    x = torch.zeros(MB // 4)

    def run():
        for _ in range(5):
            x + 1

    assert near(peak(run), MB)


def test_memory_from_before_is_not_counted(peak):
    kept = [torch.zeros(MB // 4)]
    assert near(peak(lambda: kept.append(kept[0][: MB // 8] + 1)), MB // 2)


def test_backward_holds_what_it_needs():
    x = torch.zeros(MB // 4, requires_grad=True)

    def forward():
        return x.exp().exp().exp()

    assert near(peak_bytes(forward), 3 * MB)  # autograd keeps every result
    with torch.no_grad():
        assert near(peak_bytes(forward), 2 * MB)
    assert peak_bytes(lambda: forward().sum().backward()) >= 4 * MB


def test_scratch_inside_a_kernel_counts():
    # A sum over a transposed bfloat16 matmul has no result of this size: what is seen was allocated inside the op.
    conv = nn.Conv2d(1, 1, 3, bias=False).double()
    x = torch.zeros(1, 1, 100, 100, dtype=torch.float64)
    out_bytes = 98 * 98 * 8
    with torch.no_grad():
        assert peak_bytes(lambda: conv(x)) > 2 * out_bytes  # the unfolded input


def test_growing_cat_needs_more_than_one_buffer():
    parts = torch.zeros(10, MB // 40)

    def growing():
        z = parts[0]
        for i in range(1, 10):
            z = torch.cat([z, parts[i]])
        return z

    assert near(peak_bytes(growing), MB + 9 * MB // 10)
    assert near(peak_bytes(lambda: torch.cat(list(parts))), MB)


def test_nothing_allocated():
    assert peak_bytes(lambda: None) == 0


def test_the_recorder_is_off_after_an_error():
    with pytest.raises(ZeroDivisionError):
        peak_bytes(lambda: 1 // 0)
    assert peak_bytes(lambda: None) == 0


def test_inside_another_profiler_it_says_so():
    with torch.autograd.profiler.profile(use_kineto=False), pytest.raises(FxfuseError, match="while a profiler is running"):
        peak_bytes(lambda: None)


def test_silent(capfd):
    peak_bytes(lambda: torch.zeros(3))
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.gpu
def test_cuda():
    x = torch.zeros(MB // 4, device="cuda")
    assert 2 * MB <= memory.peak_bytes(lambda: (x + 1) + 1, device="cuda") <= 3 * MB
