"""Parallel ViT: `sum([fn(x) for fn in fns])` over 3 attentions, then 3 feed-forwards, in each layer."""

import torch

from zoo.imports import bare

PACKAGE = "vit-pytorch==1.26.11"
ROWS = 8
HEAVY = 19


def model():
    bare("vit_pytorch")
    from vit_pytorch.parallel_vit import ViT

    return ViT(image_size=32, patch_size=8, num_classes=10, dim=64, depth=2, heads=4, dim_head=16, mlp_dim=128, num_parallel_branches=3)


def inputs(rows):
    return (torch.randn(rows, 3, 32, 32),), {}
