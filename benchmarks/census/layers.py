"""Every module class of torch.nn, built small: by itself, and three of them as lanes, each with weights and inputs of its own.

Comes in: ``torch.nn``. Goes out: ``Subject``s. A class without an entry here is a subject that cannot be prepared, so that a new one shows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from census.subject import Inputs, Prepared, Subject, Tell
from zoo.registry import randomized, silence

LANES = 3
Draw = Callable[[int, int, torch.Generator], Tensor]
Entry = tuple[Callable[[], nn.Module], list[Draw]]


class Lanes(nn.Module):
    """Each module on a slice of its own of every input."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.lanes = nn.ModuleList(make() for _ in range(LANES))

    def forward(self, *inputs: Tensor) -> list[Any]:
        return [lane(*[x[:, i] for x in inputs]) for i, lane in enumerate(self.lanes)]


class Named(nn.Module):
    """Networks by name, as a ModuleDict holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(6, 4) for name in ("mean", "scale", "shift")})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: head(x) for name, head in self.heads.items()}


class Listed(nn.Module):
    """Weights in a ParameterList or a ParameterDict."""

    def __init__(self, named: bool) -> None:
        super().__init__()
        weights = [nn.Parameter(torch.randn(6, 4)) for _ in range(LANES)]
        self.weights = nn.ParameterDict({f"w{i}": w for i, w in enumerate(weights)}) if named else nn.ParameterList(weights)

    def forward(self, x: Tensor) -> Tensor:
        held = self.weights.values() if isinstance(self.weights, nn.ParameterDict) else self.weights
        return torch.stack([x @ weight for weight in held], 1)


def normal(*sizes: int) -> Draw:
    """Normal numbers; a size of -1 is the rows, -2 the length."""
    return lambda rows, length, random: torch.randn(_sized(sizes, rows, length), generator=random, dtype=torch.float64)


def unit(*sizes: int) -> Draw:
    """Numbers between 0.1 and 0.9."""
    return lambda rows, length, random: torch.rand(_sized(sizes, rows, length), generator=random, dtype=torch.float64) * 0.8 + 0.1


def signs(*sizes: int) -> Draw:
    """Ones and minus ones."""
    return lambda rows, length, random: torch.randint(2, _sized(sizes, rows, length), generator=random).double() * 2 - 1


def below(limit: int, *sizes: int, first: int = 0) -> Draw:
    """Whole numbers from ``first``."""
    return lambda rows, length, random: torch.randint(first, limit, _sized(sizes, rows, length), generator=random)


def _sized(sizes: tuple[int, ...], rows: int, length: int) -> tuple[int, ...]:
    return tuple({-1: rows, -2: length}.get(size, size) for size in sizes)


def maps(dims: int, channels: int = 4, side: int = 6) -> Draw:
    """Feature maps."""
    return normal(-1, channels, *[side] * dims)


def _entries() -> dict[str, list[Entry]]:
    flat = normal(-1, 6)
    found: dict[str, list[Entry]] = {}
    plain = "CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish PReLU ReLU ReLU6 RReLU SELU Sigmoid SiLU"
    for name in (plain + " Softplus Softshrink Softsign Tanh Tanhshrink GLU Identity Dropout AlphaDropout FeatureAlphaDropout").split():
        found[name] = [(getattr(nn, name), [flat])]
    for name in ("Softmax", "LogSoftmax", "Softmin"):
        found[name] = [(functools.partial(getattr(nn, name), dim=1), [flat])]
    for d in (1, 2, 3):
        for kind in ("Conv", "ConvTranspose"):
            for lazy in ("", "Lazy"):
                arguments = (4, 3) if lazy else (4, 4, 3)
                found[f"{lazy}{kind}{d}d"] = [(functools.partial(getattr(nn, f"{lazy}{kind}{d}d"), *arguments), [maps(d)])]
        for kind in ("BatchNorm", "InstanceNorm"):
            more = {} if kind == "BatchNorm" else {"affine": True, "track_running_stats": True}
            found[f"{kind}{d}d"] = [(functools.partial(getattr(nn, f"{kind}{d}d"), 4, **more), [maps(d)])]
            found[f"Lazy{kind}{d}d"] = [(functools.partial(getattr(nn, f"Lazy{kind}{d}d"), **more), [maps(d)])]
        found[f"Dropout{d}d"] = [(getattr(nn, f"Dropout{d}d"), [maps(d)])]
        for kind in ("MaxPool", "AvgPool"):
            found[f"{kind}{d}d"] = [(functools.partial(getattr(nn, f"{kind}{d}d"), 2), [maps(d)])]
        found[f"LPPool{d}d"] = [(functools.partial(getattr(nn, f"LPPool{d}d"), 2, 2), [unit(-1, 4, *[6] * d)])]
        for kind in ("AdaptiveMaxPool", "AdaptiveAvgPool"):
            found[f"{kind}{d}d"] = [(functools.partial(getattr(nn, f"{kind}{d}d"), 2), [maps(d)])]
        for kind in ("CircularPad", "ReflectionPad", "ReplicationPad", "ZeroPad"):
            found[f"{kind}{d}d"] = [(functools.partial(getattr(nn, f"{kind}{d}d"), 1), [maps(d)])]
        found[f"ConstantPad{d}d"] = [(functools.partial(getattr(nn, f"ConstantPad{d}d"), 1, 0.5), [maps(d)])]
        found[f"MaxUnpool{d}d"] = [(functools.partial(getattr(nn, f"MaxUnpool{d}d"), 2), [maps(d, side=2), _places(d)])]
    for d in (2, 3):
        found[f"FractionalMaxPool{d}d"] = [(functools.partial(getattr(nn, f"FractionalMaxPool{d}d"), 2, output_size=3), [maps(d)])]
    cell, series = [normal(-1, 5), normal(-1, 6)], normal(-1, -2, 5)
    for name in ("RNN", "GRU", "LSTM"):
        make = getattr(nn, name)
        found[name] = [
            (functools.partial(make, 5, 6, batch_first=True), [series]), (functools.partial(make, 5, 6, 2, bidirectional=True), [series]),
            (functools.partial(make, 5, 6, bias=False), [series]),
        ]  # fmt: skip
    found["LSTM"].append((functools.partial(nn.LSTM, 5, 6, proj_size=3), [series]))
    found |= {"RNNCell": [(functools.partial(nn.RNNCell, 5, 6), cell)], "GRUCell": [(functools.partial(nn.GRUCell, 5, 6), cell)]}
    found["LSTMCell"] = [(functools.partial(nn.LSTMCell, 5, 6), cell[:1])]
    tokens, other, series8 = normal(-1, -2, 8), normal(-1, 4, 8), normal(-2, -1, 8)
    small: dict[str, Any] = {"d_model": 8, "nhead": 2, "dim_feedforward": 12, "batch_first": True}

    def layer(**more: Any) -> nn.Module:
        return nn.TransformerEncoderLayer(**small, **more)

    found |= {
        "Linear": [(lambda: nn.Linear(6, 4), [flat])], "LazyLinear": [(lambda: nn.LazyLinear(4), [flat])],
        "Bilinear": [(lambda: nn.Bilinear(6, 5, 4), [flat, normal(-1, 5)])],
        "Threshold": [(lambda: nn.Threshold(0.1, 0.5), [flat])], "Softmax2d": [(nn.Softmax2d, [maps(2)])],
        "MultiheadAttention": [
            (lambda: nn.MultiheadAttention(8, 2, batch_first=True), [tokens, other, other]),
            (lambda: nn.MultiheadAttention(8, 2), [tokens, tokens, tokens]),
            (lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=5, add_bias_kv=True), [series8, normal(4, -1, 6), normal(4, -1, 5)]),
        ],
        "AdaptiveLogSoftmaxWithLoss": [(lambda: nn.AdaptiveLogSoftmaxWithLoss(6, 20, [4, 10]), [flat, below(20, -1)])],
        "SyncBatchNorm": [(lambda: nn.SyncBatchNorm(4), [maps(2)])],
        "ChannelShuffle": [(lambda: nn.ChannelShuffle(2), [maps(2)])],
        "CosineSimilarity": [(nn.CosineSimilarity, [flat, flat])], "PairwiseDistance": [(nn.PairwiseDistance, [flat, flat])],
        "Flatten": [(nn.Flatten, [maps(2)])], "Unflatten": [(lambda: nn.Unflatten(1, (2, 3)), [flat])],
        "Fold": [(lambda: nn.Fold((4, 4), 2), [normal(-1, 8, 9)])], "Unfold": [(lambda: nn.Unfold(2), [maps(2)])],
        "CrossMapLRN2d": [(lambda: nn.CrossMapLRN2d(2), [maps(2)])], "GroupNorm": [(lambda: nn.GroupNorm(2, 4), [maps(2)])],
        "LayerNorm": [(lambda: nn.LayerNorm(6), [flat])], "LocalResponseNorm": [(lambda: nn.LocalResponseNorm(2), [maps(2)])],
        "RMSNorm": [(lambda: nn.RMSNorm(6), [flat])],
        "PixelShuffle": [(lambda: nn.PixelShuffle(2), [maps(2)])], "PixelUnshuffle": [(lambda: nn.PixelUnshuffle(2), [maps(2)])],
        "Embedding": [
            (lambda: nn.Embedding(9, 5), [below(9, -1, -2)]), (lambda: nn.Embedding(9, 5, padding_idx=2, max_norm=1.0), [below(9, -1)]),
        ],
        "EmbeddingBag": [(lambda: nn.EmbeddingBag(9, 5), [below(9, -1, -2)])],
        "Upsample": [(lambda: nn.Upsample(scale_factor=2), [maps(2)]), (lambda: nn.Upsample(size=5, mode="bilinear"), [maps(2)])],
        "UpsamplingBilinear2d": [(lambda: nn.UpsamplingBilinear2d(scale_factor=2), [maps(2)])],
        "UpsamplingNearest2d": [(lambda: nn.UpsamplingNearest2d(scale_factor=2), [maps(2)])],
        "TransformerEncoderLayer": [(layer, [tokens]), (lambda: layer(norm_first=True, activation="gelu", bias=False), [tokens])],
        "TransformerDecoderLayer": [(lambda: nn.TransformerDecoderLayer(**small), [tokens, other])],
        "TransformerEncoder": [(lambda: nn.TransformerEncoder(layer(), 2), [tokens])],
        "TransformerDecoder": [(lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(**small), 2, nn.LayerNorm(8)), [tokens, other])],
        "Transformer": [(lambda: nn.Transformer(8, 2, 2, 2, 12, batch_first=True), [tokens, other])],
        "Sequential": [(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 3)), [flat])],
        "ModuleList": [(lambda: Lanes(lambda: nn.Linear(6, 4)), [normal(-1, LANES, 6)])],
        "ModuleDict": [(Named, [flat])],
        "ParameterList": [(lambda: Listed(False), [flat])], "ParameterDict": [(lambda: Listed(True), [flat])],
    }  # fmt: skip
    return found | _losses()


def _losses() -> dict[str, list[Entry]]:
    """Predictions and targets."""
    flat, row, classes = normal(-1, 6), normal(-1), below(6, -1)
    found: dict[str, list[Entry]] = {}
    for name in ("MSELoss", "L1Loss", "SmoothL1Loss", "HuberLoss"):
        found[name] = [(getattr(nn, name), [flat, flat])]
    found |= {
        "BCELoss": [(nn.BCELoss, [unit(-1, 6), unit(-1, 6)])], "BCEWithLogitsLoss": [(nn.BCEWithLogitsLoss, [flat, unit(-1, 6)])],
        "CosineEmbeddingLoss": [(nn.CosineEmbeddingLoss, [flat, flat, signs(-1)])],
        "CrossEntropyLoss": [(nn.CrossEntropyLoss, [flat, classes]), (lambda: nn.CrossEntropyLoss(label_smoothing=0.1), [flat, classes])],
        "CTCLoss": [(nn.CTCLoss, [_log_probs, below(5, -1, 4, first=1), _full(8), _full(4)])],
        "GaussianNLLLoss": [(nn.GaussianNLLLoss, [flat, flat, unit(-1, 6)])],
        "HingeEmbeddingLoss": [(nn.HingeEmbeddingLoss, [flat, signs(-1, 6)])],
        "KLDivLoss": [(lambda: nn.KLDivLoss(reduction="batchmean"), [flat, unit(-1, 6)])],
        "LinearCrossEntropyLoss": [(lambda: nn.LinearCrossEntropyLoss(6, 5), [flat, below(5, -1)])],
        "MarginRankingLoss": [(nn.MarginRankingLoss, [row, row, signs(-1)])],
        "MultiLabelMarginLoss": [(nn.MultiLabelMarginLoss, [flat, below(6, -1, 6, first=-1)])],
        "MultiLabelSoftMarginLoss": [(nn.MultiLabelSoftMarginLoss, [flat, unit(-1, 6)])],
        "MultiMarginLoss": [(nn.MultiMarginLoss, [flat, classes])], "NLLLoss": [(nn.NLLLoss, [flat, classes])],
        "NLLLoss2d": [(nn.NLLLoss2d, [maps(2), below(4, -1, 6, 6)])],
        "PoissonNLLLoss": [(nn.PoissonNLLLoss, [flat, unit(-1, 6)])], "SoftMarginLoss": [(nn.SoftMarginLoss, [flat, signs(-1, 6)])],
        "TripletMarginLoss": [(nn.TripletMarginLoss, [flat, flat, flat])],
        "TripletMarginWithDistanceLoss": [(nn.TripletMarginWithDistanceLoss, [flat, flat, flat])],
    }  # fmt: skip
    return found


def _log_probs(rows: int, length: int, random: torch.Generator) -> Tensor:
    return torch.randn(8, rows, 5, generator=random, dtype=torch.float64).log_softmax(-1)


def _full(value: int) -> Draw:
    return lambda rows, length, random: torch.full((rows,), value)


def _places(dims: int) -> Draw:
    """Where a max pool of twos may have found its values: one place in each window."""
    def draw(rows: int, length: int, random: torch.Generator) -> Tensor:
        pool = getattr(nn, f"MaxPool{dims}d")(2, return_indices=True)
        return pool(torch.rand(rows, 4, *[4] * dims, generator=random))[1]

    return draw


def subjects() -> list[Subject]:
    """Each class by itself, each form of it, and as lanes."""
    entries = _entries()
    abstract = {"Module", "Container", "RNNBase", "RNNCellBase", "DataParallel"}
    types = {name: value for name, value in vars(nn).items() if isinstance(value, type) and issubclass(value, nn.Module)}
    classes = sorted(types.keys() - abstract)
    found: list[Subject] = []
    for name in classes:
        for number, entry in enumerate(entries.get(name, [None])):
            label = f"nn.{name}" + (f".{number + 1}" if number else "")
            found.append(Subject(label, "torch.nn", functools.partial(_prepare, entry, False)))
            found.append(Subject(f"{label} x{LANES}", "torch.nn", functools.partial(_prepare, entry, True)))
    return found


def _prepare(entry: Entry | None, lanes: bool, tell: Tell) -> Prepared:
    if entry is None:
        raise LookupError("a class without an entry in benchmarks/census/layers.py")
    make, draws = entry

    def inputs(rows: int, length: int, seed: int) -> Inputs:
        random = torch.Generator().manual_seed(seed)
        if not lanes:
            return tuple(draw(rows, length, random) for draw in draws), {}
        return tuple(torch.stack([draw(rows, length, random) for _ in range(LANES)], 1) for draw in draws), {}

    def build() -> nn.Module:
        torch.manual_seed(0)
        model = (Lanes(make) if lanes else make()).double()
        with torch.no_grad():
            model(*inputs(3, 7, 0)[0])  # a lazy module makes its weights
        silence(randomized(model))
        return model.train()

    build()
    tell({"built": True})
    return Prepared(build, inputs, {"ran": True, "dtype": "torch.float64"})
