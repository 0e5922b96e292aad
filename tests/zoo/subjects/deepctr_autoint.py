"""AutoInt: attention between fields, per layer four weights by einsum-like tensordot; 52 embeddings."""

from zoo import ctr

PACKAGE = "deepctr-torch==0.3.0"
ROWS = 64
HEAVY = 12


def model():
    fields = ctr.columns()
    from deepctr_torch.models.autoint import AutoInt

    return AutoInt(fields, fields, att_layer_num=2, dnn_hidden_units=(64, 32), init_std=0.05)


def inputs(rows):
    return (ctr.table(rows),), {}
