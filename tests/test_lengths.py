"""Sentences of another length: rows of integers may be longer or shorter than the example's, and take the fast way."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import checks
import fxfuse


class Attention(nn.Module):
    """Queries, keys and values by three Linears, as most people write them."""

    def __init__(self, width=8, heads=2):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.heads = heads

    def forward(self, x, mask=None):
        batch, length, width = x.shape
        q, k, v = (each(x).view(batch, length, self.heads, -1).transpose(1, 2) for each in (self.q, self.k, self.v))
        bias = None if mask is None else (1.0 - mask[:, None, None].to(x.dtype)) * -1e4
        return self.o(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).reshape(batch, length, width))


class Words(nn.Module):
    """Words and their places, two layers of attention, a score per word."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(30, 8), nn.Embedding(40, 8)
        self.layers = nn.ModuleList(Attention() for _ in range(2))
        self.norm, self.score = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, ids, mask=None):
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        for layer in self.layers:
            x = self.norm(x + layer(x, mask))
        return self.score(x)


class Sided(nn.Module):
    """Two readings of one sentence, added; the last word counts."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(30, 6)
        self.readers = nn.ModuleList(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)) for _ in range(3))

    def forward(self, ids):
        x = self.words(ids)
        return sum(reader(x) for reader in self.readers)[:, -1]


class Columns(nn.Module):
    """A table per column: here a row's integers are features, and a loop runs over as many as there are."""

    def __init__(self, columns=7):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(9, 4) for _ in range(columns))

    def forward(self, ids):
        return torch.cat([self.tables[i](ids[:, i]) for i in range(ids.shape[1])], 1)


class Decoder(nn.Module):
    """A layer that reads the sentence so far and another: five Linears, each cut into heads by the sizes of its own input."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.far_k, self.far_v, self.far_q, self.o = (nn.Linear(8, 8) for _ in range(7))

    def heads(self, layer, x):
        return layer(x).view(*x.shape[:-1], -1, 4).transpose(1, 2)

    def forward(self, x, far):
        q, k, v = (self.heads(each, x) for each in (self.q, self.k, self.v))
        near = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        q, k, v = self.heads(self.far_q, x + near), self.heads(self.far_k, far), self.heads(self.far_v, far)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Translator(nn.Module):
    def __init__(self):
        super().__init__()
        self.source, self.target = nn.Embedding(30, 8), nn.Embedding(30, 8)
        self.layers = nn.ModuleList(Decoder() for _ in range(2))

    def forward(self, source, target):
        if bool((source < 0).any()):
            raise ValueError("a word that there is not")
        x, far = self.target(target), self.source(source)
        for layer in self.layers:
            x = x + layer(x, far)
        return x


def ids(rows, length, limit=9, seed=0):
    return torch.randint(limit, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("model", [Words, Sided])
@pytest.mark.parametrize("length", [7, 16, 20])
def test_any_length_takes_the_fast_way(model, length):
    torch.manual_seed(0)
    made = checks.randomized(model())
    fused = fxfuse.optimize(made, ids(3, length), objective="launches", strict=True, tune=False)
    assert fxfuse.report(fused).fused
    sizes = ((3, length), (5, 11), (1, 30), (2, 1))
    checks.assert_equal_models(made, fused, [((ids(rows, other, seed=rows),), {}) for rows, other in sizes])
    assert not fxfuse.report(fused).fallbacks


def test_a_mask_is_as_long_as_the_sentence():
    torch.manual_seed(0)
    made = checks.randomized(Words())
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[0, 5:] = 0
    fused = fxfuse.optimize(made, (ids(3, 7), mask), objective="launches", strict=True, tune=False)
    longer = torch.ones(4, 12, dtype=torch.int64)
    longer[2, 3:] = 0
    checks.assert_equal_models(made, fused, [((ids(3, 7, seed=1), mask), {}), ((ids(4, 12), longer), {})])
    assert not fxfuse.report(fused).fallbacks


def test_integers_in_columns_are_as_many_as_there_are_tables():
    torch.manual_seed(0)
    made = checks.randomized(Columns())
    fused = checks.assert_fused_equals(made, ids(5, 7), heavy=1, tune=False, specialised=True)
    with pytest.raises(IndexError):
        fused(ids(5, 8))


@pytest.mark.parametrize("length", [7, 5])
def test_two_sentences(length):
    """As long as each other in the example, their lanes are one, for sentences that are; else each has lanes of its own.

    What surrounds the layers looks at its data: each layer is a region, and is given both sentences.
    """
    torch.manual_seed(0)
    made = checks.randomized(Translator())
    fused = fxfuse.optimize(made, (ids(3, 7), ids(3, length, seed=1)), objective="launches", tune=False)
    left = [str(each) for each in fxfuse.report(fused).refused]
    assert not [each for each in left if "reads tensor data" not in each and "input [3, 5, 8] against [3, 7, 8]" not in each], left
    sizes = [(4, 9, 9 if length == 7 else 6), (1, 30, 30 if length == 7 else 2)]
    checks.assert_equal_models(made, fused, [((ids(rows, one, seed=rows), ids(rows, other, seed=5)), {}) for rows, one, other in sizes])
    assert not fxfuse.report(fused).fallbacks
    checks.assert_equal_models(made, fused, [((ids(4, 8), ids(4, 3)), {})])
