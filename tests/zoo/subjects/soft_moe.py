"""Soft MoE: the experts over the rows of one dispatched tensor, `zip(experts, x)`, stacked."""

import torch

PACKAGE = "soft-moe-pytorch==0.1.9"
ROWS = 8
HEAVY = 5


def model():
    from soft_moe_pytorch import SoftMoE

    return SoftMoE(dim=64, seq_len=32, num_experts=8)


def inputs(rows):
    return (torch.randn(rows, 32, 64),), {}
