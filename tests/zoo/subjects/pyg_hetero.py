"""HeteroConv: a SAGEConv per edge type, inputs by dict, outputs grouped by node type and summed."""

import torch

PACKAGE = "torch-geometric==2.8.1"
ROWS = 30
HEAVY = 2
EDGES = [(source, f"to_{target}", target) for source in "abc" for target in "abc"]


def model():
    from torch_geometric.nn import HeteroConv, SAGEConv

    return HeteroConv({edge: SAGEConv((16, 16), 16) for edge in EDGES}, aggr="sum")


def inputs(rows):
    nodes = {name: torch.randn(rows, 16) for name in ("a", "b", "c")}
    return (nodes, {edge: torch.randint(0, rows, (2, 3 * rows)) for edge in EDGES}), {}
