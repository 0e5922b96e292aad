"""Feature columns of click models: ids and numbers, as deepctr-torch and torch-rechub want them."""

from __future__ import annotations

import torch

from zoo.imports import bare

IDS, NUMBERS, VOCABULARY, WIDTH = 26, 13, 1000, 8


def columns(ids: int = IDS, numbers: int = NUMBERS) -> list:
    """Columns of deepctr-torch, whose ``__init__`` would ask PyPI for its newest version."""
    bare("deepctr_torch")
    from deepctr_torch.inputs import DenseFeat, SparseFeat

    return [SparseFeat(f"C{i}", VOCABULARY, embedding_dim=WIDTH) for i in range(ids)] + [DenseFeat(f"I{i}", 1) for i in range(numbers)]


def table(rows: int, ids: int = IDS, numbers: int = NUMBERS) -> torch.Tensor:
    """Ids and numbers in one floating tensor, as deepctr-torch takes them."""
    return torch.cat([torch.randint(0, VOCABULARY, (rows, ids)).float(), torch.rand(rows, numbers)], 1)


def features(ids: int = IDS, numbers: int = NUMBERS) -> list:
    """Features of torch-rechub."""
    from torch_rechub.basic.features import DenseFeature, SparseFeature

    return [DenseFeature(f"d{i}") for i in range(numbers)] + [SparseFeature(f"s{i}", VOCABULARY, embed_dim=WIDTH) for i in range(ids)]


def named(rows: int, ids: int = IDS, numbers: int = NUMBERS) -> dict[str, torch.Tensor]:
    """The dict of columns that torch-rechub takes."""
    return {
        **{f"d{i}": torch.rand(rows) for i in range(numbers)},
        **{f"s{i}": torch.randint(0, VOCABULARY, (rows,)) for i in range(ids)},
    }
