"""DCN-Mix: low-rank experts per cross layer, their weights indexed out of one 4-D Parameter; gates stacked, softmax, matmul."""

from zoo import ctr

PACKAGE = "deepctr-torch==0.3.0"
ROWS = 128
HEAVY = 16


def model():
    fields = ctr.columns()
    from deepctr_torch.models.dcnmix import DCNMix

    return DCNMix(fields, fields, cross_num=2, low_rank=16, num_experts=4, dnn_hidden_units=(64, 64), init_std=0.05)


def inputs(rows):
    return (ctr.table(rows),), {}
