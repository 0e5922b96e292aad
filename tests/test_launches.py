"""The launch counter: the numbers of the reference counter, on loops whose counts are known by hand."""

import pytest
import torch
from torch import nn

from fxfuse.launches import count


def lanes(n):
    return nn.ModuleList(nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)) for _ in range(n))


def test_a_loop_of_lanes_counts_every_lane_and_could_be_one_lane():
    nets, x = lanes(16), torch.randn(4, 16)
    got = count(lambda: torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(nets)], 1))
    assert got.heavy == 3 * 16
    assert got.bound == 3
    assert got.heavy_by_op == {"addmm": 48}
    assert got.total == 5 * 16 + 1
    assert got.total_by_op == {"addmm": 48, "relu": 32, "cat": 1}


def test_backward_is_counted():
    weight, x = torch.randn(3, 3, requires_grad=True), torch.randn(2, 3)
    forward = count(lambda: (x @ weight).sum())
    both = count(lambda: (x @ weight).sum().backward())
    assert (forward.heavy, both.heavy) == (1, 2)
    assert both.total > forward.total


@pytest.mark.parametrize("length", [1, 2, 7])
def test_a_chain_cannot_be_fused(length):
    x = torch.eye(3)

    def chain():
        y = x
        for _ in range(length):
            y = y @ x
        return y

    assert (count(chain).heavy, count(chain).bound) == (length, length)


def test_different_shapes_are_different_signatures():
    a, b = torch.ones(2, 3), torch.ones(2, 4)
    got = count(lambda: (a @ a.t(), b @ b.t(), a @ a.t()))
    assert (got.heavy, got.bound) == (3, 2)


def test_a_write_through_a_view_orders_what_reads_the_base():
    x = torch.eye(3)

    def run():
        out = torch.zeros(2, 3)
        out[0] = (x @ x)[0]
        return (out.t() @ out) @ x

    # x @ x -> written into out -> out.t() @ out -> (...) @ x: of the two 3x3 @ 3x3 products one waits for the other.
    assert (count(run).heavy, count(run).bound) == (3, 3)


def test_views_and_allocations_are_free():
    x = torch.ones(4, 4)
    assert count(lambda: (x.view(16)[3:].unsqueeze(0), x.t(), torch.empty(3))).total == 0


def test_without_the_bound():
    x = torch.eye(3)
    got = count(lambda: x @ x @ x, bound=False)
    assert (got.total, got.heavy, got.bound) == (2, 2, -1)
    assert got.to_dict()["heavy_by_op"] == {"mm": 2}


def test_memory_of_intermediates_is_not_held_and_addresses_are_not_confused():
    # Freed storages give their address to later ones; a stale depth there would make independent products look like a chain.
    def run():
        for _ in range(50):
            a = torch.ones(64, 64)
            del_me = a @ a
            del a, del_me

    assert (count(run).heavy, count(run).bound) == (50, 1)


def test_an_error_of_the_function_passes_through():
    with pytest.raises(ZeroDivisionError):
        count(lambda: 1 // 0)


def test_twenty_thousand_ops_merge_no_dictionary_twice():
    """Steps, not seconds: in a chain of equal products each op merges one entry."""
    x = torch.zeros(2, 2)

    def chain():
        y = x
        for _ in range(20_000):
            y = y @ x

    assert count(chain).bound == 20_000
