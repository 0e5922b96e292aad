"""Recurrences of many lanes at once: what the recurrent rules write into graphs.

Comes in: per lane (axis 0 of everything) what the input adds to the gates, for all time steps, and the state before the first. Goes out:
the states after every step. One batched product and a few elementwise ops per step, whatever the number of lanes. Weights come
transposed, ``[G, H, gates * H]``; gates in torch's order; ``gates`` over time as ``[G, T, N, gates * H]``. Where nobody reads the outputs
(``stacked`` is False), the last state stands in their place.
"""

from __future__ import annotations

import torch
from torch import Tensor


def together(*outputs: Tensor) -> tuple[Tensor, ...]:
    """Several outputs as the tuple that the op they stand for returns.

    >>> together(torch.ones(1), torch.zeros(1))
    (tensor([1.]), tensor([0.]))
    """
    return outputs


def lstm_step(gates: Tensor, h: Tensor, c: Tensor, weight: Tensor, projection: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One step of an LSTM: ``gates`` ``[G, N, 4 * H]`` holds the input's part and both biases."""
    i, f, g, o = torch.baddbmm(gates, h, weight).chunk(4, -1)
    c = torch.addcmul(i.sigmoid() * g.tanh(), f.sigmoid(), c)
    h = o.sigmoid() * c.tanh()
    return (h if projection is None else torch.bmm(h, projection)), c


def gru_step(gates: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One step of a GRU: ``gates`` ``[G, N, 3 * H]`` holds the input's part with its bias; ``bias`` ``[G, 1, 3 * H]`` is the state's."""
    own = torch.bmm(h, weight) if bias is None else torch.baddbmm(bias, h, weight)
    width = h.shape[-1]
    r, z = (gates[..., : 2 * width] + own[..., : 2 * width]).sigmoid().chunk(2, -1)
    n = torch.addcmul(gates[..., 2 * width :], r, own[..., 2 * width :]).tanh()
    # One op in place of two, 1.05x to 1.1x a step; but ``lerp`` takes one dtype, and under autocast there may be two.
    return torch.lerp(n, h, z) if n.dtype == h.dtype == z.dtype else torch.addcmul(n, z, h - n)


def rnn_step(gates: Tensor, h: Tensor, weight: Tensor, relu: bool) -> Tensor:
    """One step of an Elman network: ``gates`` ``[G, N, H]`` holds the input's part and both biases."""
    out = torch.baddbmm(gates, h, weight)
    return out.relu() if relu else out.tanh()


def lstm_over_time(
    gates: Tensor, h: Tensor, c: Tensor, weight: Tensor, projection: Tensor | None, backwards: bool, dim: int, stacked: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """All steps of one LSTM layer in one direction: outputs with time at ``dim``, and the last ``h`` and ``c``."""
    outputs: list[Tensor] = []
    for step in _steps(gates, backwards):
        h, c = lstm_step(step, h, c, weight, projection)
        if stacked:
            outputs.append(h)
    return (_stacked(outputs, backwards, dim) if stacked else h), h, c


def gru_over_time(
    gates: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, backwards: bool, dim: int, stacked: bool = True
) -> tuple[Tensor, Tensor]:
    """All steps of one GRU layer in one direction: outputs with time at ``dim``, and the last state."""
    outputs: list[Tensor] = []
    for step in _steps(gates, backwards):
        h = gru_step(step, h, weight, bias)
        if stacked:
            outputs.append(h)
    return (_stacked(outputs, backwards, dim) if stacked else h), h


def rnn_over_time(
    gates: Tensor, h: Tensor, weight: Tensor, relu: bool, backwards: bool, dim: int, stacked: bool = True
) -> tuple[Tensor, Tensor]:
    """All steps of one Elman layer in one direction: outputs with time at ``dim``, and the last state."""
    outputs: list[Tensor] = []
    for step in _steps(gates, backwards):
        h = rnn_step(step, h, weight, relu)
        if stacked:
            outputs.append(h)
    return (_stacked(outputs, backwards, dim) if stacked else h), h


def _steps(gates: Tensor, backwards: bool) -> tuple[Tensor, ...]:
    steps = gates.unbind(1)
    return steps[::-1] if backwards else steps


def _stacked(outputs: list[Tensor], backwards: bool, dim: int) -> Tensor:
    return torch.stack(outputs[::-1] if backwards else outputs, dim)


OVER_TIME = (lstm_over_time, gru_over_time, rnn_over_time)
