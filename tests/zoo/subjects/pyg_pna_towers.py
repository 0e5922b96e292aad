"""PNAConv: five towers before and five after the aggregation, `[nn(h[:, i]) ...]`, stacked and concatenated."""

import torch

PACKAGE = "torch-geometric==2.8.1"
ROWS = 40
HEAVY = 5


def model():
    from torch_geometric.nn import PNAConv

    return PNAConv(
        40, 40, aggregators=["mean", "max", "std"], scalers=["identity", "amplification"], deg=torch.tensor([0, 10, 20, 10]), towers=5,
        pre_layers=2, post_layers=2, divide_input=True,
    )


def inputs(rows):
    return (torch.randn(rows, 40), torch.randint(0, rows, (2, 4 * rows))), {}
