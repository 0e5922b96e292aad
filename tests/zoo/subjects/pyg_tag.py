"""TAGConv: `out = out + lin(x)` over hops, a Linear per hop, each on another power of the graph."""

import torch

PACKAGE = "torch-geometric==2.8.1"
ROWS = 40
HEAVY = 1


def model():
    from torch_geometric.nn import TAGConv

    return TAGConv(16, 16, K=5, normalize=False)


def inputs(rows):
    return (torch.randn(rows, 16), torch.randint(0, rows, (2, 4 * rows))), {}
