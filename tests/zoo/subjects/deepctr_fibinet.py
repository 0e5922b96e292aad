"""FiBiNET, 26 fields: one Linear per pair of 325, used on two inputs, concatenated; 52 embeddings."""

from zoo import ctr

PACKAGE = "deepctr-torch==0.3.0"
ROWS = 256
HEAVY = 9


def model():
    fields = ctr.columns()
    from deepctr_torch.models.fibinet import FiBiNET

    return FiBiNET(fields, fields, bilinear_type="interaction", init_std=0.05)


def inputs(rows):
    return (ctr.table(rows),), {}
