"""The grid's models: lanes of one family as a loop, and the best form that the same person could write by hand.

Comes in: a ``Case``. Goes out: ``loop(case)``, its example, and ``by_hand(case, model)``, which computes the same from packed Parameters.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FAMILIES = ("mlp", "conv", "norm", "embedding", "attention", "recurrent")
LANES = (2, 4, 8, 16, 32, 64, 128, 256, 512)
WIDTHS = (4, 8, 16, 32, 64, 128, 256)
BATCHES = (1, 4, 16, 64, 256, 1024, 4096)
# Elements of one layer's results for all lanes: what is larger takes seconds a step and gigabytes on any machine that this is for.
MOST_ELEMENTS = 1 << 26
LENGTH = 8  # of sequences
ROWS = 50  # of tables
IN, OUT = 1, 1  # columns of a lane that has its own, and what it gives


@dataclass(frozen=True)
class Case:
    """``shared``: all lanes read one input of ``width`` columns; else each has columns of its own. ``join``: "cat" or "sum"."""

    family: str
    lanes: int
    width: int
    batch: int
    shared: bool = False
    join: str = "cat"

    @property
    def key(self) -> str:
        """Its name in the results."""
        return "-".join(str(value) for value in asdict(self).values())


def cases() -> list[Case]:
    """The whole grid, in an order of which every beginning is spread over all of it."""
    found: list[Case] = []
    for family, lanes, width, batch in itertools.product(FAMILIES, LANES, WIDTHS, BATCHES):
        if lanes * width * batch * (LENGTH if family in ("conv", "attention", "recurrent") else 1) > MOST_ELEMENTS:
            continue
        if lanes * width * width > MOST_ELEMENTS // 4:
            continue
        for shared, join in itertools.product((False, True), ("cat", "sum")):
            if not (family == "embedding" and shared):
                found.append(Case(family, lanes, width, batch, shared, join))
    random.Random(0).shuffle(found)
    return found


def short() -> list[Case]:
    """The part that takes minutes: each family once in the middle, and the cases that single goals speak of."""
    middle = [Case(family, 32, 32, 64) for family in FAMILIES]
    goals = [Case("mlp", 128, 32, 64), Case("mlp", 128, 32, 1024), Case("mlp", 16, 4, 1), Case("mlp", 64, 64, 16, True, "cat")]
    return [*middle, *goals, Case("mlp", 128, 32, 64, False, "sum"), Case("mlp", 2, 256, 256)]


def sample(count: int) -> list[Case]:
    """So many cases of the whole grid, in an order of which every beginning speaks to each goal: those that goals and past troubles name,
    then every family in turn, and after each round one of the MLP lanes for which there are goals of their own."""
    named = [Case("mlp", 128, 32, 1024), Case("mlp", 16, 32, 16), Case("norm", 8, 4, 64, False, "sum"), Case("mlp", 128, 32, 64)]
    whole = cases()
    queues = [[case for case in whole if case.family == family] for family in FAMILIES]
    small = [case for case in whole if 16 <= case.lanes <= 256 and 4 <= case.width <= 128 and case.batch <= 64]
    queues.append([case for case in small if case.family == "mlp"])
    in_turn = [case for turn in itertools.zip_longest(*queues) for case in turn if case is not None]
    return list(dict.fromkeys([*named, *in_turn]))[:count]


class Attention(nn.Module):
    """One head over a sequence."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(inputs, width) for _ in range(3))
        self.out = nn.Linear(width, OUT)

    def forward(self, x: Tensor) -> Tensor:
        attended = F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
        return self.out(attended.mean(1))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """A GRU over a sequence, and what its last step says."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.gru, self.out = nn.GRU(inputs, width, batch_first=True), nn.Linear(width, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.gru(x)[0][:, -1])  # type: ignore[no-any-return]


class Convolution(nn.Module):
    """Two convolutions over a sequence."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(inputs, width, 3, padding=1), nn.Conv1d(width, OUT, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x.mT))).mean(-1)  # type: ignore[no-any-return]


class Embedded(nn.Module):
    """A table and a layer."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(ROWS, width), nn.Linear(width, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.table(x.squeeze(-1))))  # type: ignore[no-any-return]


def mlp(inputs: int, width: int) -> nn.Sequential:
    """Three layers."""
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, OUT))


def norm(inputs: int, width: int) -> nn.Sequential:
    """Two layers with a LayerNorm between."""
    return nn.Sequential(nn.Linear(inputs, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, OUT))


LANE: dict[str, Callable[[int, int], nn.Module]] = {
    "mlp": mlp, "conv": Convolution, "norm": norm, "embedding": Embedded, "attention": Attention, "recurrent": Recurrent,
}  # fmt: skip


class Loop(nn.Module):
    """The lanes as people write them."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.shared, self.join = case.shared, case.join
        self.nets = nn.ModuleList(LANE[case.family](case.width if case.shared else IN, case.width) for _ in range(case.lanes))

    def forward(self, x: Tensor) -> Tensor:
        outputs = [net(x if self.shared else x[..., i : i + IN]) for i, net in enumerate(self.nets)]
        return torch.cat(outputs, 1) if self.join == "cat" else sum(outputs)  # type: ignore[return-value]


def example(case: Case, device: torch.device, seed: int = 0) -> Tensor:
    """An input: ``[batch, columns]``, of sequences ``[batch, LENGTH, columns]``."""
    generator = torch.Generator().manual_seed(seed)
    columns = case.width if case.shared else case.lanes * IN
    if case.family == "embedding":
        return torch.randint(ROWS, (case.batch, columns), generator=generator).to(device)
    sequence = (LENGTH,) if case.family in ("conv", "attention", "recurrent") else ()
    return torch.randn(case.batch, *sequence, columns, generator=generator).to(device)


# -- by hand -----------------------------------------------------------------------------------------------------------------------------


class ByHand(nn.Module):
    """Packed Parameters by short names, and what all families have in common."""

    def __init__(self, case: Case, model: nn.Module) -> None:
        super().__init__()
        self.case = case
        names = [name for name, _ in next(iter(model.nets)).named_parameters()]
        for name in names:
            packed = torch.stack([net.get_parameter(name).detach() for net in model.nets])
            if packed.dim() == 3 and not name.endswith(("table.weight",)):
                packed = packed.transpose(1, 2).contiguous()  # [G, K, M]
            self.register_parameter(name.replace(".", "_"), nn.Parameter(packed))

    def lanes_first(self, x: Tensor) -> Tensor:
        """``[N, (T,) G]`` -> ``[G, N, (T,) 1]``; a shared input is expanded."""
        if self.case.shared:
            return x.unsqueeze(0).expand(self.case.lanes, *([-1] * x.dim()))
        return x.movedim(-1, 0).unsqueeze(-1)

    def linear(self, x: Tensor, name: str) -> Tensor:
        """``[G, N, K]`` by all lanes' layers of that name."""
        weight, bias = self.get_parameter(f"{name}_weight"), self.get_parameter(f"{name}_bias")
        if weight.shape[1] == 1:
            return torch.addcmul(bias.unsqueeze(1), x, weight)
        return torch.baddbmm(bias.unsqueeze(1), x, weight)

    def first(self, x: Tensor, name: str) -> Tensor:
        """A first layer: one wide one where the input is shared; for sequences more rows."""
        weight, bias = self.get_parameter(f"{name}_weight"), self.get_parameter(f"{name}_bias")
        if self.case.shared:
            wide = torch.addmm(bias.flatten(), x.flatten(0, -2), weight.transpose(0, 1).flatten(1))
            return wide.unflatten(1, (self.case.lanes, -1)).transpose(0, 1)
        rows = self.lanes_first(x)
        return self.linear(rows.flatten(1, -2), name)

    def last(self, h: Tensor, name: str) -> Tensor:
        """``[G, N, K]`` -> ``[N, G]``, or the sum ``[N, 1]`` as one product over lanes and features."""
        weight, bias = self.get_parameter(f"{name}_weight"), self.get_parameter(f"{name}_bias")  # [G, K, 1], [G, 1]
        if self.case.join == "sum":
            return torch.addmm(bias.sum(0), h.transpose(0, 1).flatten(1), weight.flatten(0, 1))
        return torch.add((h * weight.transpose(1, 2)).sum(-1), bias).t()


class HandMlp(ByHand):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x, "0"))
        return self.last(torch.relu_(self.linear(h, "2")), "4")


class HandNorm(ByHand):
    def forward(self, x: Tensor) -> Tensor:
        h = F.layer_norm(self.first(x, "0"), (self.case.width,))
        scale, shift = self.get_parameter("1_weight").unsqueeze(1), self.get_parameter("1_bias").unsqueeze(1)
        return self.last(torch.relu_(torch.addcmul(shift, h, scale)), "3")


class HandConvolution(ByHand):
    def __init__(self, case: Case, model: nn.Module) -> None:
        super().__init__(case, model)
        for name in ("first", "second"):
            packed = torch.cat([getattr(net, name).weight.detach() for net in model.nets])
            self.register_parameter(f"{name}_weight", nn.Parameter(packed))

    def forward(self, x: Tensor) -> Tensor:
        lanes, groups = self.case.lanes, 1 if self.case.shared else self.case.lanes
        h = torch.relu_(F.conv1d(x.mT, self.first_weight, self.first_bias.flatten(), padding=1, groups=groups))
        out = F.conv1d(h, self.second_weight, self.second_bias.flatten(), padding=1, groups=lanes).mean(-1)
        return out if self.case.join == "cat" else out.sum(1, keepdim=True)


class HandEmbedding(ByHand):
    def __init__(self, case: Case, model: nn.Module) -> None:
        super().__init__(case, model)
        self.table_weight = nn.Parameter(self.table_weight.detach().flatten(0, 1))
        self.register_buffer("offsets", torch.arange(case.lanes, device=self.table_weight.device) * ROWS)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(F.embedding(x + self.offsets, self.table_weight))  # [N, G, K]
        if self.case.join == "sum":
            return torch.addmm(self.out_bias.sum(0), h.flatten(1), self.out_weight.flatten(0, 1))
        return (h * self.out_weight.squeeze(-1)).sum(-1) + self.out_bias.squeeze(-1)


class HandAttention(ByHand):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.first(x, name).unflatten(1, (-1, LENGTH)) for name in "qkv")  # [G, N, T, K]
        return self.last(F.scaled_dot_product_attention(q, k, v).mean(2), "out")


class HandRecurrent(ByHand):
    def __init__(self, case: Case, model: nn.Module) -> None:
        super().__init__(case, model)
        self.gru_ih_weight, self.gru_ih_bias = self.gru_weight_ih_l0, self.gru_bias_ih_l0
        self.gru_hh_weight, self.gru_hh_bias = self.gru_weight_hh_l0, self.gru_bias_hh_l0
        for name in ("weight_ih_l0", "bias_ih_l0", "weight_hh_l0", "bias_hh_l0"):
            delattr(self, f"gru_{name}")

    def forward(self, x: Tensor) -> Tensor:
        given = self.first(x, "gru_ih").unflatten(1, (-1, LENGTH))  # [G, N, T, 3K]
        h = given.new_zeros(self.case.lanes, x.shape[0], self.case.width)
        bias, weight = self.gru_hh_bias.unsqueeze(1), self.gru_hh_weight
        for step in given.unbind(2):
            old = torch.baddbmm(bias, h, weight)
            reset, update, new = step.chunk(3, -1)
            old_reset, old_update, old_new = old.chunk(3, -1)
            update = torch.sigmoid(update + old_update)
            new = torch.tanh(torch.addcmul(new, torch.sigmoid(reset + old_reset), old_new))
            h = torch.lerp(new, h, update)
        return self.last(h, "out")


HAND: dict[str, type[ByHand]] = {
    "mlp": HandMlp, "conv": HandConvolution, "norm": HandNorm, "embedding": HandEmbedding, "attention": HandAttention,
    "recurrent": HandRecurrent,
}  # fmt: skip


def by_hand(case: Case, model: nn.Module) -> nn.Module:
    """The best form of the case, with the weights of ``model``."""
    return HAND[case.family](case, model)


def smallest() -> Iterator[Case]:
    """One small case of each kind, for tests."""
    for family, shared, join in itertools.product(FAMILIES, (False, True), ("cat", "sum")):
        if not (family == "embedding" and shared):
            yield Case(family, 3, 4, 5, shared, join)
