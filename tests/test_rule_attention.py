"""Attention in lanes: ``scaled_dot_product_attention``, ``nn.MultiheadAttention`` with all its options, transformer encoders."""

from __future__ import annotations

import copy
import itertools
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import checks
import fxfuse
from fxfuse import launches

LANES = 3


def ops_of(fused: nn.Module) -> set[str]:
    return {op.op for plan in fxfuse.report(fused).fused for op in plan.ops}


def mask_of(*shape: int, seed: int = 5, boolean: bool = True) -> Tensor:
    """A mask that leaves every query something to look at."""
    drawn = checks.randn(*shape, seed=seed)
    allowed = drawn > -0.3
    allowed[..., 0] = True
    return allowed if boolean else drawn


# -- scaled_dot_product_attention --------------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """Experts with an attention written by hand: projections, heads, ``scaled_dot_product_attention``."""

    def __init__(self, options: dict[str, Any], masks: Tensor | None = None, heads: int = 2, kv_heads: int = 2) -> None:
        super().__init__()
        self.q = nn.ModuleList(nn.Linear(6, heads * 3) for _ in range(LANES))
        # A bias of all keys moves all scores of a query alike, which softmax takes out: its gradient is zero, and only rounding shows.
        self.k = nn.ModuleList(nn.Linear(6, kv_heads * 3, bias=False) for _ in range(LANES))
        self.v = nn.ModuleList(nn.Linear(6, kv_heads * 4) for _ in range(LANES))
        self.options, self.heads, self.kv_heads = options, heads, kv_heads
        self.register_buffer("masks", masks)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        outputs = []
        for i in range(LANES):
            q = self.q[i](x).view(n, length, self.heads, 3).transpose(1, 2)
            k = self.k[i](x).view(n, length, self.kv_heads, 3).transpose(1, 2)
            v = self.v[i](x).view(n, length, self.kv_heads, 4).transpose(1, 2)
            mask = None
            if self.masks is not None:
                mask = self.masks[i] if self.masks.dim() > 2 else self.masks
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.options)
            outputs.append(out.transpose(1, 2).flatten(2))
        return torch.cat(outputs, -1)


class Masked(Heads):
    """The same with masks that come in: ``[N, 1 or heads, L, L]``, shared or one per lane."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        n, length, _ = x.shape
        outputs = []
        for i in range(LANES):
            q = self.q[i](x).reshape(n, length, self.heads, 3).transpose(1, 2)
            k = self.k[i](x).reshape(n, length, self.kv_heads, 3).transpose(1, 2)
            v = self.v[i](x).reshape(n, length, self.kv_heads, 4).transpose(1, 2)
            own = mask[:, i] if mask.dim() == 5 else mask
            outputs.append(F.scaled_dot_product_attention(q, k, v, own, **self.options))
        return torch.stack(outputs)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}, {"dropout_p": 0.0, "is_causal": True, "scale": 2.0}], ids=str)
def test_sdpa(options: dict[str, Any]) -> None:
    model = checks.randomized(Heads(options))
    fused = checks.assert_fused_equals(model, checks.randn(4, 5, 6), batches=(1, 3), **checks.QUICK)
    assert "scaled_dot_product_attention" in ops_of(fused)


@pytest.mark.parametrize(
    ("shape", "boolean"),
    [((5, 5), True), ((LANES, 5, 5), True), ((LANES, 5, 5), False), ((LANES, 2, 5, 5), False), ((LANES, 1, 1, 1, 5), True)],
)
def test_sdpa_with_masks_of_the_model(shape: tuple[int, ...], boolean: bool) -> None:
    model = Heads({})
    checks.randomized(model)
    model.register_buffer("masks", mask_of(*shape, boolean=boolean))
    fused = checks.assert_fused_equals(model, checks.randn(4, 5, 6), batches=(1,), **checks.QUICK)
    assert "scaled_dot_product_attention" in ops_of(fused)


@pytest.mark.parametrize("shape", [(4, 1, 5, 5), (4, 2, 5, 5), (4, 1, 1, 5), (4, LANES, 1, 5, 5), (4, LANES, 2, 1, 5)], ids=str)
def test_sdpa_with_masks_that_come_in(shape: tuple[int, ...]) -> None:
    model = checks.randomized(Masked({}))

    def make(rows: int) -> Any:
        return checks.randn(rows, 5, 6, seed=rows), mask_of(rows, *shape[1:], seed=rows)

    fused = checks.assert_fused_equals(model, make(4), make=make, batches=(1, 3), **checks.QUICK)
    assert "scaled_dot_product_attention" in ops_of(fused)


def test_sdpa_of_grouped_queries() -> None:
    model = checks.randomized(Heads({"enable_gqa": True, "is_causal": True}, heads=4, kv_heads=2))
    fused = checks.assert_fused_equals(model, checks.randn(4, 5, 6), batches=(1, 3), **checks.QUICK)
    assert "scaled_dot_product_attention" in ops_of(fused)


class Pooling(nn.Module):
    """Attention pooling by a learned query per lane: ranks as low as they come."""

    def __init__(self, rank: int, shared_values: bool) -> None:
        super().__init__()
        self.queries = nn.ParameterList(nn.Parameter(torch.zeros(*(1,) * (rank - 2), 2, 4)) for _ in range(LANES))
        self.keys = nn.ModuleList(nn.Linear(4, 4) for _ in range(1 if shared_values else LANES))
        self.rank = rank

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for i in range(LANES):
            k = self.keys[i % len(self.keys)](x)
            q = self.queries[i] if self.rank == 2 or k.dim() == 2 else self.queries[i].expand(k.shape[0], -1, -1)
            outputs.append(F.scaled_dot_product_attention(q, k, k))
        return torch.stack(outputs, -1)


@pytest.mark.parametrize("shared_values", [True, False])
@pytest.mark.parametrize(("rank", "shape"), [(2, (5, 4)), (3, (4, 5, 4)), (2, (4, 5, 4))], ids=["matrices", "batch", "unequal ranks"])
def test_sdpa_of_low_rank(rank: int, shape: tuple[int, ...], shared_values: bool) -> None:
    model = checks.randomized(Pooling(rank, shared_values))
    fused = checks.assert_fused_equals(model, checks.randn(*shape), batches=(1, 3), **checks.QUICK)
    assert "scaled_dot_product_attention" in ops_of(fused)


def test_sdpa_dropout_draws_its_own_masks() -> None:
    model = Heads({"dropout_p": 0.5}).double()
    with torch.no_grad():
        for layers in (model.q, model.k, model.v):
            for layer in layers:
                layer.load_state_dict(layers[0].state_dict())
    x = checks.randn(4, 5, 6)
    fused = fxfuse.optimize(model, x, objective="launches", tune=False)  # validation compares with fixed masks
    plan = fxfuse.report(fused).fused[0]
    assert "scaled_dot_product_attention" in ops_of(fused)
    assert any("random" in note for note in plan.notes)
    out = fused(x)
    assert not torch.allclose(out[..., :8], out[..., 8:16])
    many = checks.randn(1, 5, 6).repeat(200, 1, 1)
    for got, want in zip(fused(many).mean(0).flatten(), model(many).mean(0).flatten(), strict=True):
        assert abs(got - want) < 0.5 * want.abs() + 0.2


# -- nn.MultiheadAttention ---------------------------------------------------------------------------------------------------------------


class Modalities(nn.Module):
    """Self-attention per modality."""

    def __init__(self, call: dict[str, Any], **options: Any) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(nn.MultiheadAttention(8, 2, **options) for _ in range(LANES))
        self.call = call

    def forward(self, x: Tensor) -> Any:
        outputs, weights = [], []
        for i, attention in enumerate(self.attentions):
            part = x[..., i * 8 : (i + 1) * 8]
            out, seen = attention(part, part, part, **self.call)
            outputs.append(out)
            weights.append(seen)
        return torch.cat(outputs, -1), (None if weights[0] is None else torch.stack(weights))


CALLS: dict[str, dict[str, Any]] = {
    "weights": {},
    "no weights": {"need_weights": False},
    "weights of each head": {"average_attn_weights": False},
    "causal": {"need_weights": False, "is_causal": True, "attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1)},
    "mask": {"attn_mask": ~mask_of(5, 5)},
    "mask of numbers": {"need_weights": False, "attn_mask": mask_of(5, 5, boolean=False)},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "without bias": {"bias": False, "batch_first": True},
    "zero attention": {"add_zero_attn": True},
    "bias of keys and values": {"add_bias_kv": True},
    "all of it": {"add_zero_attn": True, "add_bias_kv": True, "batch_first": True, "bias": False},
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_mha_calls(call: dict[str, Any]) -> None:
    model = checks.randomized(Modalities(call, batch_first=True))
    fused = checks.assert_fused_equals(model, checks.randn(4, 5, 8 * LANES), most_heavy=4, batches=(1, 3), **checks.QUICK)
    assert "linear" in ops_of(fused)


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_mha_options(options: dict[str, Any], need_weights: bool) -> None:
    call = {"attn_mask": ~mask_of(5, 5)} if need_weights else {"need_weights": False}
    model = checks.randomized(Modalities(call, **options))
    shape = (4, 5) if options.get("batch_first") else (5, 4)
    rows = () if need_weights and not options.get("batch_first") else (1, 3)  # the mask's size is that of the rows
    checks.assert_fused_equals(model, checks.randn(*shape, 8 * LANES), batches=rows, **checks.QUICK)


class Cross(nn.Module):
    """Cross-attention to one memory, or to each lane's own; keys and values of other widths."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(nn.MultiheadAttention(8, 2, batch_first=True, **options) for _ in range(LANES))
        self.queries = nn.ModuleList(nn.Linear(4, 8) for _ in range(LANES))
        self.memories = nn.ModuleList(nn.Linear(4, 8, bias=kind != "keys and values") for _ in range(LANES))  # of keys: see Heads
        self.kind = kind

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        outputs = []
        for attention, query, own in zip(self.attentions, self.queries, self.memories, strict=True):
            q = query(x)
            if self.kind == "one memory":
                k = v = memory
            elif self.kind == "own memory":
                k = v = own(memory[..., :4])
            elif self.kind == "keys and values":
                k, v = own(memory[..., :4]), memory
            else:
                k, v = memory[..., :6], memory[..., 1:6]
            outputs.append(attention(q, k, v)[0])
        return torch.stack(outputs, 1)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("one memory", {}), ("own memory", {}), ("own memory", {"bias": False}), ("keys and values", {}), ("other widths", {}),
     ("other widths", {"bias": False})],
)  # fmt: skip
def test_cross_attention(kind: str, options: dict[str, Any]) -> None:
    if kind == "other widths":
        options = {**options, "kdim": 6, "vdim": 5}
    model = checks.randomized(Cross(kind, **options))

    def make(rows: int) -> Any:
        return checks.randn(rows, 3, 4, seed=rows), checks.randn(rows, 5, 8, seed=rows + 1)

    checks.assert_fused_equals(model, make(4), make=make, batches=(1, 3), **checks.QUICK)


class Padded(nn.Module):
    """``key_padding_mask``, the same for all lanes or one for each, alone or with an ``attn_mask``."""

    def __init__(self, own: bool, with_mask: bool, need_weights: bool, batch_first: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(nn.MultiheadAttention(4, 2, batch_first=batch_first) for _ in range(LANES))
        self.register_buffer("mask", ~mask_of(5, 5) if with_mask else None)
        self.own, self.need_weights, self.batch_first = own, need_weights, batch_first

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        outputs = []
        for i, attention in enumerate(self.attentions):
            given = x[..., 4 * i : 4 * i + 4] if self.batch_first else x[..., 4 * i : 4 * i + 4].transpose(0, 1)
            gone = padding[:, i] if self.own else padding[:, 0]
            out, _ = attention(given, given, given, key_padding_mask=gone, attn_mask=self.mask, need_weights=self.need_weights)
            outputs.append(out)
        return torch.stack(outputs)


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize(("own", "with_mask", "batch_first"), [(True, False, True), (False, True, True), (True, True, False)])
def test_padding(own: bool, with_mask: bool, need_weights: bool, batch_first: bool) -> None:
    model = checks.randomized(Padded(own, with_mask, need_weights, batch_first))

    def make(rows: int) -> Any:
        return checks.randn(rows, 5, 4 * LANES, seed=rows), ~mask_of(rows, LANES, 5, seed=rows + 7)

    checks.assert_fused_equals(model, make(4), make=make, batches=(1, 3), **checks.QUICK)


def test_boolean_padding_in_float32() -> None:
    """torch makes numbers of the dtype of the queries of it: the comparison in float64 has to follow."""
    torch.manual_seed(0)
    model = Padded(True, True, False, True)
    x, padding = torch.randn(4, 5, 4 * LANES), ~mask_of(4, LANES, 5)
    fused = fxfuse.optimize(model, (x, padding), objective="launches", tune=False)
    report = fxfuse.report(fused)
    assert report.fused, str(report)
    assert not report.refused, str(report)
    checks.assert_close(fused(x, padding), model(x, padding), "float32", rtol=1e-5)


class MasksByMode(nn.Module):
    """Masks that are no buffers, another one in each mode."""

    def __init__(self) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(nn.MultiheadAttention(4, 2, batch_first=True) for _ in range(LANES))
        self.masks = {True: [mask_of(5, 5, seed=1, boolean=False)], False: [mask_of(5, 5, seed=2, boolean=False)]}

    def forward(self, x: Tensor) -> Tensor:
        mask = self.masks[self.training][0]
        return torch.stack([attention(x, x, x, attn_mask=mask)[0] for attention in self.attentions])


def test_masks_that_differ_between_modes() -> None:
    model = checks.randomized(MasksByMode())
    checks.assert_fused_equals(model, checks.randn(4, 5, 4), most_heavy=4, batches=(1, 3), **checks.QUICK)


class Unbatched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(nn.MultiheadAttention(4, 2) for _ in range(LANES))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([attention(x, x, x)[0] for attention in self.attentions], -1)


def test_mha_without_a_batch() -> None:
    checks.assert_fused_equals(checks.randomized(Unbatched()), checks.randn(5, 4), batches=(1, 9), **checks.QUICK)


def test_mha_through_the_whole_pipeline() -> None:
    model = checks.randomized(Modalities({}, batch_first=True, dropout=0.1))
    fused = checks.assert_fused_equals(model, checks.randn(4, 5, 8 * LANES), random_in_train=True, batches=(1,))
    assert any("random" in note for note in fxfuse.report(fused).fused[0].notes)


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
def test_mha_dropout_draws_a_mask_per_lane(need_weights: bool) -> None:
    model = Modalities({"need_weights": need_weights}, dropout=0.5, batch_first=True).double()
    with torch.no_grad():
        for attention in model.attentions:
            attention.load_state_dict(model.attentions[0].state_dict())
    x = checks.randn(4, 5, 8).repeat(1, 1, LANES)
    fused = fxfuse.optimize(model, x, objective="launches", tune=False).train()
    out = fused(x)[0]
    assert not torch.allclose(out[..., :8], out[..., 8:16])
    fused.eval(), model.eval()
    checks.assert_close(fused(x)[0], model(x)[0], "eval")


# -- transformers ------------------------------------------------------------------------------------------------------------------------


class Encoders(nn.Module):
    """A transformer encoder per modality."""

    def __init__(self, layers: int, **options: Any) -> None:
        super().__init__()
        options = {"dropout": 0.0, **options}

        def layer() -> nn.TransformerEncoderLayer:
            return nn.TransformerEncoderLayer(8, 2, 12, **options)

        made = [nn.TransformerEncoder(layer(), layers) if layers else layer() for _ in range(LANES)]
        self.encoders = nn.ModuleDict({f"modality_{i}": encoder for i, encoder in enumerate(made)})

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([encoder(x[..., i, :]) for i, encoder in enumerate(self.encoders.values())], -2)


TRANSFORMERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "norm first": {"batch_first": True, "norm_first": True},
    "gelu": {"activation": "gelu", "batch_first": True},
    "without bias": {"bias": False, "batch_first": True},
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("options", TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_encoder_layers(options: dict[str, Any]) -> None:
    model = checks.randomized(Encoders(0, **options))
    checks.assert_fused_equals(model, checks.randn(4, 5, LANES, 8), most_heavy=7, batches=(1, 3), **checks.QUICK)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("options", [{"batch_first": True}, {"norm_first": True}], ids=["batch first", "norm first"])
def test_encoders(options: dict[str, Any]) -> None:
    model = checks.randomized(Encoders(2, **options))
    fused = checks.assert_fused_equals(model, checks.randn(4, 5, LANES, 8), most_heavy=14, batches=(1, 3), **checks.QUICK)
    model.eval(), fused.eval()
    with torch.no_grad():  # where torch itself takes its fast path
        checks.assert_close(fused(checks.randn(3, 5, LANES, 8)), model(checks.randn(3, 5, LANES, 8)), "fast path")


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize(("mode", "fuses"), [("train", True), ("infer", False)])
def test_for_inference_torchs_one_launch_per_layer_is_fewer(mode: Any, fuses: bool) -> None:
    model, x = checks.randomized(Encoders(0, batch_first=True)), checks.randn(4, 5, LANES, 8)
    fused = fxfuse.optimize(model, x, objective="launches", mode=mode, validate=False)
    assert bool(fxfuse.report(fused).fused) is fuses, fxfuse.report(fused)
    with torch.no_grad():
        before, after = (launches.count(lambda m=m: m.eval()(x)) for m in (model, fused))
    if not fuses:
        assert after.total == before.total
        assert re.search(r"packed launches \d+ ops, the loop \d+", str(fxfuse.report(fused).refused[-1]))


def test_encoders_with_dropout() -> None:
    model = checks.randomized(Encoders(1, batch_first=True, dropout=0.1))
    checks.assert_fused_equals(model, checks.randn(4, 5, LANES, 8), random_in_train=True, batches=(1,), tune=False)


class MaskedEncoders(nn.Module):
    """Encoders that are given a mask look at it with Python: whether it is causal."""

    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 1) for _ in range(2))
        self.register_buffer("mask", torch.ones(5, 5, dtype=torch.bool).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([encoder(x, mask=self.mask) for encoder in self.encoders], -1)


def test_encoders_that_read_their_mask_stay() -> None:
    model = MaskedEncoders().double()
    x = checks.randn(4, 5, 8)
    fused = fxfuse.optimize(model, x, objective="launches", tune=False)
    assert "reads tensor data into Python" in str(fxfuse.report(fused))
    model.eval(), fused.eval()
    checks.assert_close(fused(x), model(x), "eval")


class PaddedEncoders(nn.Module):
    """With a padding mask torch answers by nested tensors in eval without gradients, with zeros at padded places, and else not."""

    def __init__(self) -> None:
        super().__init__()
        made = [nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True), 1) for _ in range(3)]
        self.encoders = nn.ModuleList(made)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return torch.cat([encoder(x, src_key_padding_mask=padding) for encoder in self.encoders], -1)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padded_encoders_answer_as_torch_does() -> None:
    model = checks.randomized(PaddedEncoders())
    x, padding = checks.randn(4, 5, 8), torch.zeros(4, 5, dtype=torch.bool)
    padding[1, 3:] = padding[2, 1:] = True
    fused = fxfuse.optimize(model, (x, padding), objective="launches", **checks.QUICK)
    for training in (True, False):
        model.train(training), fused.train(training)
        checks.assert_close(fused(x, padding), model(x, padding), f"training={training}")
        with torch.no_grad():
            checks.assert_close(fused(x, padding), model(x, padding), f"training={training}, no gradients")


class Experts(nn.Module):
    """A mixture of experts, each with self-attention over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(8), "attention": nn.MultiheadAttention(8, 4, batch_first=True), "mlp": nn.Linear(8, 8)})
            for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gate(x.mean(1)).softmax(-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            y = expert["norm"](x)
            y = x + expert["attention"](y, y, y, need_weights=False)[0]
            out = out + gates[:, i, None, None] * torch.relu(expert["mlp"](y))
        return out


def test_experts_with_attention() -> None:
    model = checks.randomized(Experts())
    checks.assert_fused_equals(model, checks.randn(4, 5, 8), batches=(1, 3), **checks.QUICK)


class ManySequences(nn.Module):
    """One attention module on many inputs: the lanes share its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.attention(x[:, i], x[:, i], x[:, i])[0] for i in range(3)], 1)


def test_one_attention_on_many_inputs() -> None:
    model = checks.randomized(ManySequences())
    checks.assert_fused_equals(model, checks.randn(4, 3, 5, 8), most_heavy=4, batches=(1, 3), **checks.QUICK)


def test_saved_and_loaded(tmp_path: Any) -> None:
    model = checks.randomized(Encoders(1, batch_first=True)).eval()
    x = checks.randn(4, 5, LANES, 8)
    fused = fxfuse.optimize(model, x, objective="launches", **checks.QUICK)
    torch.save(fused, tmp_path / "fused.pt")
    checks.assert_close(torch.load(tmp_path / "fused.pt", weights_only=False)(x), model(x), "loaded")


# -- where torch takes its fast path, whose results lie in rows -----------------------------------------------------------------------


class Untracked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Linear(4, 4) for _ in range(LANES))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.stack([net(x[:, i]) for i, net in enumerate(self.nets)], 1)
        with torch.no_grad():
            h, _ = self.attention(h, h, h, need_weights=False)
        return h * self.scale


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_gradients_it_lies_as_in_the_original(dtype: torch.dtype, validate: bool) -> None:
    model = checks.randomized(Untracked()).to(dtype)
    fused = fxfuse.optimize(model, checks.randn(4, LANES, 4).to(dtype), objective="launches", tune=False, validate=validate)
    assert fxfuse.report(fused).fused, fxfuse.report(fused)
    for mode in (True, False):
        for rows in (4, 7):
            x = checks.randn(rows, LANES, 4, seed=rows).to(dtype)
            got, want = fused.train(mode)(x), model.train(mode)(x)
            assert got.stride() == want.stride(), "train" if mode else "eval"
            checks.assert_close(got, want, "attention", rtol=1e-10 if dtype is torch.float64 else 1e-5)
    assert not fxfuse.report(fused).fallbacks


class Returned(nn.Module):
    """What attention gives leaves the model as it is, or in a sum, which has its strides."""

    def __init__(self, join: str) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(LANES))
        self.join = join

    def forward(self, x: Tensor) -> Any:
        ys = [net(h, h, h, need_weights=False)[0] for net, h in zip(self.nets, x.unbind(1), strict=True)]
        return ys if self.join == "list" else sum(ys) if self.join == "sum" else torch.stack(ys, 1)


@pytest.mark.parametrize("join", ["list", "sum", "stack"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_lie_as_in_the_original_with_and_without_grad(dtype: torch.dtype, join: str) -> None:
    model = checks.randomized(Returned(join)).to(dtype)
    fused = fxfuse.optimize(model, checks.randn(4, LANES, 5, 8).to(dtype), objective="launches", tune=False)
    assert fxfuse.report(fused).fused, fxfuse.report(fused)
    seen = set()
    for training, grad, rows in itertools.product((True, False), (True, False), (4, 7)):
        x = checks.randn(rows, LANES, 5, 8, seed=rows).to(dtype)
        model.train(training)
        fused.train(training)
        torch.compiler.reset()
        compiled = torch.compile(fused, backend="eager", fullgraph=True)
        with torch.set_grad_enabled(grad):
            results = [tree_leaves(each(x)) for each in (model, fused, compiled)]
        for want, *others in zip(*results, strict=True):
            seen.add(want.is_contiguous())
            for got in others:
                assert got.stride() == want.stride(), (training, grad, rows)
                checks.assert_close(got, want, "attention", rtol=1e-10 if dtype is torch.float64 else 1e-5)
    assert not fxfuse.report(fused).fallbacks
    assert seen == ({True} if join == "stack" else {True, False})


def test_an_empty_batch_has_no_attention_weights_where_torch_gives_none() -> None:
    """torch's fast path returns None for the weights of an empty batch."""
    def forward(self: nn.Module, x: Tensor) -> list[Any]:
        return [net(x, x, x) for net in self.nets]

    model = checks.randomized(checks.model_of(forward, nets=nn.ModuleList(nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(3))))
    fused = fxfuse.optimize(copy.deepcopy(model), checks.randn(3, 5, 8), objective="launches", **checks.QUICK)
    assert fxfuse.report(fused).fused
    for training in (True, False):
        for each in (model, fused):
            each.train(training)
        for shape in ((0, 5, 8), (2, 0, 8), (1, 5, 8)):
            with torch.no_grad():
                expected, got = model(checks.randn(*shape)), fused(checks.randn(*shape))
            for (y, weights), (same, others) in zip(expected, got):
                checks.assert_close(same, y, f"{shape}")
                checks.assert_close(others, weights, f"weights of {shape}")
