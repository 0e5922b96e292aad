"""Models with loops of many kinds, as small as they can be and no two lanes alike: for tests of what does not depend on the loop's shape.

``KINDS[name]()`` is a model in float64 and a function of a seed and a batch size that makes its inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from checks import mlp, model_of, randn, randomized

Inputs = Callable[[int, int], tuple[Any, ...]]


def _rows(*shape: int) -> Inputs:
    return lambda seed, batch: (randn(batch, *shape, seed=seed),)


def columns(lanes: int = 4) -> tuple[nn.Module, Inputs]:
    def forward(self: Any, x: Tensor) -> Tensor:
        out = torch.zeros(x.shape[0], len(self.nets), dtype=x.dtype)
        for i, net in enumerate(self.nets):
            out[:, i] = net(x[:, i : i + 1]).squeeze(-1)
        return self.head(out)

    nets = nn.ModuleList(mlp() for _ in range(lanes))
    return randomized(model_of(forward, nets=nets, head=nn.Linear(lanes, 2))), _rows(lanes)


def conv_norm() -> tuple[nn.Module, Inputs]:
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.stack([conv(x[:, :, i]) for i, conv in enumerate(self.convs)], 2)

    convs = nn.ModuleList(nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.ReLU()) for _ in range(3))
    return randomized(model_of(forward, convs=convs)), _rows(2, 3, 7)


def embeddings() -> tuple[nn.Module, Inputs]:
    def forward(self: Any, ids: Tensor) -> Tensor:
        return self.out(torch.cat([table(ids[:, i]) for i, table in enumerate(self.tables)], 1))

    tables = nn.ModuleList(nn.Embedding(5 + i, 3) for i in range(4))
    model = randomized(model_of(forward, tables=tables, out=nn.Linear(12, 2)))
    return model, lambda seed, batch: (torch.randint(0, 5, (batch, 4), generator=torch.Generator().manual_seed(seed)),)


def lstms() -> tuple[nn.Module, Inputs]:
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.cat([lstm(x[:, :, i : i + 1])[0][:, -1] for i, lstm in enumerate(self.lstms)], 1)

    return randomized(model_of(forward, lstms=nn.ModuleList(nn.LSTM(1, 3, batch_first=True) for _ in range(3)))), _rows(4, 3)


def attention() -> tuple[nn.Module, Inputs]:
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.stack([layer(x[:, i], x[:, i], x[:, i], need_weights=False)[0] for i, layer in enumerate(self.layers)], 1)

    layers = nn.ModuleList(nn.MultiheadAttention(4, 2, batch_first=True) for _ in range(3))
    return randomized(model_of(forward, layers=layers)), _rows(3, 5, 4)


def experts() -> tuple[nn.Module, Inputs]:
    def forward(self: Any, x: Tensor) -> list[Tensor]:
        expert = torch.stack([net(x) for net in self.experts], 1)
        gates = [torch.softmax(gate(x), -1).unsqueeze(1) for gate in self.gates]
        return [tower((gate @ expert).squeeze(1)) for gate, tower in zip(gates, self.towers)]

    gates, towers = nn.ModuleList(nn.Linear(4, 3) for _ in range(2)), nn.ModuleList(mlp(5, 4) for _ in range(2))
    return randomized(model_of(forward, gates=gates, towers=towers, experts=nn.ModuleList(mlp(4, 6, 5) for _ in range(3)))), _rows(4)


def unequal() -> tuple[nn.Module, Inputs]:
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.cat([net(x[:, i : i + 1]) for i, net in enumerate(self.nets)], 1)

    return randomized(model_of(forward, nets=nn.ModuleList(mlp(1, 4 + 2 * (i % 2)) for i in range(6)))), _rows(6)


def tied() -> tuple[nn.Module, Inputs]:
    model, inputs = columns(5)
    model.nets[3][2].weight = model.nets[0][2].weight
    model.nets[4] = model.nets[1]
    return model, inputs


def frozen() -> tuple[nn.Module, Inputs]:
    model, inputs = columns(6)
    model.nets[0].requires_grad_(False)
    model.nets[2].requires_grad_(False)
    model.nets[4][0].weight.requires_grad_(False)
    return model, inputs


def raw_weights() -> tuple[nn.Module, Inputs]:
    def forward(self: Any, x: Tensor) -> Tensor:
        return sum(torch.tanh(x @ weight + bias) for weight, bias in zip(self.weights, self.biases))  # type: ignore[return-value]

    weights = nn.ParameterList(nn.Parameter(torch.empty(4, 3)) for _ in range(4))
    return randomized(model_of(forward, weights=weights, biases=nn.ParameterList(nn.Parameter(torch.empty(3)) for _ in range(4)))), _rows(4)


KINDS: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {
    each.__name__: each
    for each in (columns, conv_norm, embeddings, lstms, attention, experts, unequal, tied, frozen, raw_weights)
}
