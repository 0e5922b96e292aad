"""One small call, or a few, for every op that a rule covers: what tests/test_rules_generated.py makes its lanes of.

To cover an op, add an entry to ``SAMPLES`` under the op's canonical name: ``call(function, shape, shape, ...)``, where ``function``
takes one lane's operands. ``of_module(make, shape)`` has a module in every lane. The tests find out by themselves which layouts, lane
counts and dtypes there are to try.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Numbers:
    """An operand that is not any normal numbers: ``draw(shape, generator)`` gives them. ``per_lane``: it may differ from lane to lane."""

    shape: tuple[int, ...]
    draw: Callable[[tuple[int, ...], torch.Generator], Tensor]
    per_lane: bool = True


@dataclass(frozen=True)
class Sample:
    """One call. ``refused``: beginnings of the sentences by which the rule may refuse a layout; with ``never=True`` it refuses all."""

    function: Callable[..., Any]
    operands: tuple[Numbers, ...]
    refused: tuple[str, ...] = ()
    never: bool = False
    oracle: bool = True  # torch.func.vmap can do it
    free: bool = False  # the operands' first sizes are free: only then has every lane a call of its own
    module: Callable[[], nn.Module] | None = None


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def positive(*shape: int) -> Numbers:
    return Numbers(shape, lambda s, g: torch.rand(s, generator=g, dtype=torch.float64) + 0.2)


def unit(*shape: int) -> Numbers:
    return Numbers(shape, lambda s, g: torch.rand(s, generator=g, dtype=torch.float64) * 0.8 + 0.1)


def below(high: int, *shape: int) -> Numbers:
    """Whole numbers from 0 to ``high - 1``."""
    return Numbers(shape, lambda s, g: torch.randint(high, s, generator=g))


def truth(*shape: int) -> Numbers:
    return Numbers(shape, lambda s, g: torch.rand(s, generator=g) > 0.5)


def definite(n: int) -> Numbers:
    """Symmetric matrices with eigenvalues well apart from each other and from 0."""

    def draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        q = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64))[0]
        return q @ torch.diag_embed(torch.arange(1, n + 1, dtype=torch.float64).expand(shape[:-1])) @ q.mT

    return Numbers((n, n), draw)


def places(count: int, dims: int, *shape: int) -> Numbers:
    """Whole numbers below ``count``, no two equal along the last ``dims`` dims: what a max pool says of where it found its values."""

    def draw(given: tuple[int, ...], generator: torch.Generator) -> Tensor:
        batch = given[: len(given) - dims]
        return torch.rand((*batch, count), generator=generator).argsort(-1)[..., : torch.Size(given[-dims:]).numel()].reshape(given)

    return Numbers(shape, draw)


def imaginary(*shape: int) -> Numbers:
    return Numbers(shape, lambda s, g: torch.randn(s, generator=g, dtype=torch.complex128))


def call(function: Callable[..., Any], *operands: tuple[int, ...] | Numbers, **facts: Any) -> Sample:
    """A ``Sample``; a plain shape stands for normal numbers."""
    return Sample(function, tuple(o if isinstance(o, Numbers) else Numbers(o, normal) for o in operands), **facts)


def of_module(make: Callable[[], nn.Module], *operands: tuple[int, ...] | Numbers, **facts: Any) -> Sample:
    """A module of its own in every lane."""
    return call(lambda module, *own: module(*own), *operands, module=make, **facts)


def each(names: str, function: Callable[[str], Callable[..., Any]], *operands: tuple[int, ...] | Numbers, **facts: Any) -> dict[str, Any]:
    """One sample for each of these ops."""
    return {name: [call(function(name), *operands, **facts)] for name in names.split()}


def in_torch(name: str) -> Callable[..., Any]:
    """The function of that canonical name: ``special_expit``, ``linalg_det``, ``fft_rfft``, ``relu``."""
    space, _, rest = name.partition("_")
    if space in ("special", "linalg", "fft") and hasattr(getattr(torch, space), rest):
        return getattr(getattr(torch, space), rest)  # type: ignore[no-any-return]
    return getattr(torch, name, None) or getattr(F, name, None) or getattr(Tensor, name)


def reduced(name: str) -> list[Sample]:
    """A reduction along one dim, along all (where it may), and with the dim kept."""
    function = in_torch(name)
    made = [call(lambda x: function(x, dim=1), (3, 4)), call(lambda x: function(x, dim=-2, keepdim=True), (3, 4))]
    if name not in ("amax", "amin", "logsumexp"):
        made.append(call(lambda x: function(x), (3, 4)))
    return made


def _convolution(name: str) -> list[Sample]:
    function, d = getattr(F, name), int(name[-2])
    transposed = "transpose" in name
    kernel, image = (2,) * d, (4,) * d
    weight = (2, 3, *kernel) if transposed else (3, 2, *kernel)
    two = "lanes share the weight but not the bias"
    return [
        call(lambda x, w, b: function(x, w, b, stride=1, padding=1), (2, 2, *image), weight, (3,), refused=(f"{name}: {two}",)),
        call(lambda x, w: function(x, w, stride=2, groups=2), (2, 4, *image), (4, 1, *kernel) if transposed else (2, 2, *kernel)),
        call(lambda x, w: function(x, w), (2, *image), weight),
        call(lambda x, w, b: function(x, w, b), (2, 2, *image), (*weight[:2], *([1] * d)), (3,), refused=(f"{name}: {two}",)),
    ]


def _numpy_stack(name: str) -> list[Sample]:
    function = in_torch(name)
    return [call(lambda a, b: function([a, b]), shape, shape, oracle=name != "column_stack") for shape in ((3, 4), (3,), ())]


def _pool_with_indices(kind: str, d: int) -> list[Sample]:
    function = getattr(F, f"{kind}_pool{d}d")
    return [call(lambda x: function(x, 2, return_indices=True), (2, 3, *((4,) * d)))]


def _fractional_pool(d: int, end: str) -> list[Sample]:
    function, name = getattr(F, f"fractional_max_pool{d}d"), f"fractional_max_pool{d}d{end}"
    sentence = f"{name} draws its own windows"
    image = (2, 3, *((5,) * d))
    return [call(lambda x: function(x, 2, 2, return_indices=bool(end)), image, never=True, oracle=False, refused=(sentence,))]


def _unpool(d: int) -> list[Sample]:
    function = getattr(F, f"max_unpool{d}d")
    shape = (2, 3, *((2,) * d))
    return [call(lambda x, i: function(x, i, 2), s, places(4**d, d, *s), oracle=False) for s in (shape, shape[1:])[: 1 if d > 1 else 2]]


def _recurrent(name: str) -> dict[str, list[Sample]]:
    """A module, and the call with its weights as operands: sequences and cells."""
    lstm = name == "lstm"
    module = {"lstm": nn.LSTM, "gru": nn.GRU}.get(name, lambda *a, **k: nn.RNN(*a, nonlinearity=name[4:], **k))
    gates = {"lstm": 4, "gru": 3}.get(name, 1) * 2
    sequence, cell = getattr(torch, name), getattr(torch, f"{name}_cell")
    rest = (True, 1, 0.0, False, False, True)
    weights = ((gates, 3), (gates, 2), (gates,), (gates,))
    two_layers = of_module(lambda: module(3, 2, num_layers=2, bidirectional=True, bias=False), (4, 2, 3), oracle=False)
    return {
        name: [
            of_module(lambda: module(3, 2, batch_first=True), (2, 4, 3), oracle=False),
            *([two_layers] if name != "rnn_relu" else []),
            call(lambda x, h, *w: sequence(x, (h, h * 2) if lstm else h, list(w), *rest), (3, 4, 3), (1, 3, 2), *weights, oracle=False),
        ],
        f"{name}_cell": [
            call(lambda x, h, *w: cell(x, (h, h * 2) if lstm else h, *w), (3, 3), (3, 2), *weights, oracle=False),
            call(lambda x, h, *w: cell(x, (h, h * 2) if lstm else h, *w), (3, 3), (3, 2), *weights[:2], oracle=False),
        ],
    }


def _pool(kind: str, d: int) -> list[Sample]:
    function = getattr(F, f"{kind}_pool{d}d")
    rest = (2.0, 2) if kind == "lp" else (2,)
    return [call(lambda x: function(x, *rest), (2, 3, *((4,) * d))), call(lambda x: function(x, *rest), (3, *((4,) * d)))]


# Ops that only stand between others: sizes, which are numbers where they are fixed, spellings that no recording shows, and last writes
# into buffers (tests/test_written_buffers.py).
BETWEEN = frozenset("size size_add size_sub size_mul get_real get_imag threshold copy_".split())

SAMPLES: dict[str, list[Sample]] = {
    # layers
    "linear": [
        call(F.linear, (3, 4), (5, 4), (5,)), call(F.linear, (4,), (1, 4), (1,)), call(F.linear, (2, 3, 1), (5, 1)),
        of_module(lambda: nn.Linear(3, 2), (4, 3)),
    ],
    **{name: _convolution(name) for name in "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split()},
    "prelu": [call(F.prelu, (3, 2, 4), (2,)), call(F.prelu, (3, 2), (1,)), call(F.prelu, (4,), (1,))],
    "layer_norm": [
        call(lambda x, w, b: F.layer_norm(x, (4,), w, b), (2, 3, 4), (4,), (4,)),
        call(lambda x: F.layer_norm(x, (3, 4), eps=0.3), (2, 3, 4)),
        call(lambda x, w: F.layer_norm(x, (4,), w), (3, 4), (4,)), of_module(lambda: nn.LayerNorm(4, 0.3), (3, 4)),
    ],
    "batch_norm": [
        of_module(lambda: nn.BatchNorm1d(3, track_running_stats=False), (5, 3)),
        of_module(lambda: nn.BatchNorm2d(3, eps=0.3, track_running_stats=False), (4, 3, 2, 2)),
        of_module(lambda: nn.BatchNorm1d(3).eval(), (5, 3)), of_module(lambda: nn.BatchNorm1d(3, momentum=None).eval(), (5, 3)),
        of_module(lambda: nn.BatchNorm2d(3, 0.3, 0.3, affine=False).eval(), (4, 3, 2, 2)),
        call(lambda x: F.batch_norm(x, None, None, training=True), (5, 3)),  # weights as slices: torch's own gradient is wrong there
    ],
    **{name: [
        of_module(lambda: nn.BatchNorm1d(3), (5, 3)), of_module(lambda: nn.BatchNorm2d(3, 0.3, 0.3, affine=False), (4, 3, 2, 2)),
    ] for name in ("batch_norm_update", "add_")},
    "cumulative_batch_norm": [of_module(lambda: nn.BatchNorm1d(3, 0.3, None), (5, 3), oracle=False)],
    "instance_norm_update": [
        of_module(lambda a=a: nn.InstanceNorm1d(3, 0.3, 0.4, affine=a, track_running_stats=True), (2, 3, 4)) for a in (True, False)
    ],
    "instance_norm": [
        of_module(lambda: nn.InstanceNorm1d(3, 0.3, affine=True), (2, 3, 4)),
        of_module(lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True).eval(), (2, 3, 4)),
        call(lambda x: F.instance_norm(x, eps=0.3), (2, 3, 4)),
    ],
    "group_norm": [of_module(lambda: nn.GroupNorm(2, 4, 0.3), (3, 4, 2)), call(lambda x: F.group_norm(x, 2, eps=0.3), (3, 4))],
    "rms_norm": [call(lambda x, w: F.rms_norm(x, (4,), w, 0.3), (3, 4), (4,)), call(lambda x: F.rms_norm(x, (4,)), (2, 3, 4))],
    "local_response_norm": [call(lambda x: F.local_response_norm(x, 2), (2, 4, 3))],
    "embedding": [call(F.embedding, below(5, 3), (5, 4)), call(lambda w: F.embedding(torch.tensor([[1, 0], [3, 3]]), w), (5, 4))],
    "embedding_bag": [call(lambda i, w: F.embedding_bag(i, w, mode="mean"), below(5, 3, 2), (5, 4), oracle=False)],
    "_weight_norm": [
        call(torch._weight_norm, (3, 4), (3, 1), oracle=False),
        call(lambda v, g: torch._weight_norm(v, g, 1), (3, 4, 2), (1, 4, 1), oracle=False),
        call(lambda v, g: torch._weight_norm(v, g, -1), (3, 4), (), oracle=False),
    ],
    "bilinear": [call(F.bilinear, (3, 2), (3, 4), (5, 2, 4), (5,), oracle=False)],
    **_recurrent("lstm"), **_recurrent("gru"), **_recurrent("rnn_tanh"), **_recurrent("rnn_relu"),
    "scaled_dot_product_attention": [
        call(F.scaled_dot_product_attention, (2, 3, 4), (2, 5, 4), (2, 5, 4)),
        call(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), (2, 3, 4), (2, 3, 4), (2, 3, 4)),
    ],
    "dropout": [call(lambda x, p=p: F.dropout(x, p, True), (3, 4)) for p in (1.0,)],
    "alpha_dropout": [call(lambda x: F.alpha_dropout(x, 1.0, True), (3, 4))],
    "dropout1d": [call(lambda x, p=p: F.dropout1d(x, p, True), s) for p, s in ((1.0, (2, 3, 4)), (1.0, (3, 4)), (0.0, (3, 4)))],
    "dropout2d": [call(lambda x, p=p: F.dropout2d(x, p, True), (2, 3, 2, 2)) for p in (1.0,)],
    "dropout3d": [call(lambda x, p=p: F.dropout3d(x, p, True), (2, 3, 2, 2, 2)) for p in (1.0,)],
    "feature_dropout": [call(lambda x, p=p: torch.feature_dropout(x, p, True), (2, 3, 2)) for p in (1.0,)],
    "feature_alpha_dropout": [call(lambda x: F.feature_alpha_dropout(x, 1.0, True), (2, 3, 2))],
    # products
    "matmul": [
        call(torch.matmul, (3, 4), (4, 2)), call(torch.matmul, (4,), (4,)), call(torch.matmul, (2, 3, 4), (4,)),
        call(torch.matmul, (4,), (2, 4, 3)), call(torch.matmul, (2, 3, 4), (4, 2)), call(torch.matmul, (3, 4), (2, 4, 2)),
        call(torch.matmul, (2, 1, 3, 4), (5, 4, 2)),
    ],
    "mm": [call(torch.mm, (3, 4), (4, 2))], "bmm": [call(torch.bmm, (2, 3, 4), (2, 4, 2))], "mv": [call(torch.mv, (3, 4), (4,))],
    "dot": [call(torch.dot, (4,), (4,))], "vdot": [call(torch.vdot, (4,), (4,))], "inner": [call(torch.inner, (3, 4), (2, 4))],
    "outer": [call(torch.outer, (3,), (4,))], "ger": [call(torch.ger, (3,), (4,))], "addr": [call(torch.addr, (3, 4), (3,), (4,))],
    "tensordot": [call(lambda a, b: torch.tensordot(a, b, dims=([1], [0])), (3, 4), (4, 2))],
    "addmm": [call(torch.addmm, (2,), (3, 4), (4, 2)),
    call(lambda a, b, c: torch.addmm(a, b, c, beta=0.5, alpha=2), (3, 2), (3, 4), (4, 2))],
    "baddbmm": [call(torch.baddbmm, (1, 3, 2), (2, 3, 4), (2, 4, 2)),
    call(lambda *t: torch.baddbmm(*t, alpha=3), (2, 1, 2), (2, 3, 4), (2, 4, 2))],
    "addmv": [call(torch.addmv, (3,), (3, 4), (4,))], "addbmm": [call(torch.addbmm, (3, 2), (2, 3, 4), (2, 4, 2))],
    "einsum": [
        call(lambda a, b: torch.einsum("bi,ij->bj", a, b), (3, 4), (4, 2)),
    call(lambda a, b: torch.einsum("...i,i", a, b), (2, 3, 4), (4,)),
        call(lambda a: torch.einsum("ii", a), (3, 3)), call(lambda a, b: torch.einsum("a, b -> ab", [a, b]), (3,), (4,)),
    ],
    "cdist": [call(torch.cdist, (3, 4), (2, 4))], "cross": [call(lambda a, b: torch.cross(a, b, dim=1), (2, 3), (2, 3))],
    "linalg_cross": [call(torch.linalg.cross, (2, 3), (2, 3))],
    # elementwise
    **each("clone zeros_like ones_like contiguous", in_torch, (3, 4)),
    "contiguous": [call(lambda x: x.mT.contiguous(), (3, 4))], "detach": [call(lambda x: x.detach() * x, (3, 4))],
    "fill": [call(lambda x: torch.fill(x, 2.5), (3, 4), oracle=False)], "full_like": [call(lambda x: torch.full_like(x, 2.5), (3, 4))],
    "to": [call(lambda x: x.to(torch.float32), (3, 4)), call(lambda x: x.type("torch.FloatTensor"), (3, 4))],
    "type_as": [call(lambda x, y: x.type_as(y), (3, 4), below(3, 2))],
    "masked_fill": [
        call(lambda x, m: x.masked_fill(m, -2.0), (3, 4), truth(4)), call(torch.masked_fill, (3, 4), truth(3, 4), (), oracle=False),
        call(lambda x, m: x.masked_fill(m, 1.5), (4,), truth(3, 4)),
    ],
    "where": [call(torch.where, truth(3, 4), (3, 4), (4,)), call(lambda c, x: torch.where(c, x, 0.0), truth(3, 1), (3, 4))],
    "_threshold": [call(lambda x: F.threshold(x, 0.1, 2.0), (3, 4))], "isclose": [call(torch.isclose, (3, 4), (3, 4), oracle=False)],
    "complex": [call(torch.complex, (3, 4), (3, 4))], "polar": [call(torch.polar, positive(3, 4), (3, 4))],
    **each("long int short bool char byte cfloat cdouble", lambda n: getattr(Tensor, n), (3, 4)),
    **each("special_expit special_exp2 special_expm1 special_erf special_erfc special_sinc special_round special_i0", in_torch, (3, 4)),
    **each("special_gammaln special_digamma special_psi special_log1p", in_torch, positive(3, 4)),
    **each("special_logit special_erfinv", in_torch, unit(3, 4)), "special_xlogy": [call(torch.special.xlogy, (3, 4), positive(4))],
    "special_multigammaln": [call(lambda x: torch.special.multigammaln(x + 2, 2), positive(3, 4))],
    **each("imag conj real", in_torch, imaginary(3, 4)),
    "conj_physical": [call(torch.conj_physical, imaginary(3, 4), oracle=False)],
    "resolve_conj": [call(lambda x: x.conj().resolve_conj(), imaginary(3, 4))],
    "bucketize": [call(lambda x: torch.bucketize(x, torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)), (3, 4))],
    "searchsorted": [call(lambda x: torch.searchsorted(torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64), x), (3, 4))],
    # random numbers that do not show, or of which there is one outcome alone
    **each("rand_like randn_like", lambda n: lambda x: in_torch(n)(x) * 0 + x, (3, 4)),
    **each("rand randn", lambda n: lambda x: in_torch(n)(3, 4) * 0 + x, (3, 4)),
    "bernoulli": [call(lambda x: torch.bernoulli((x > 0).double()), (3, 4))],
    "poisson": [call(lambda x: torch.poisson(x * 0) + x, (3, 4))], "randint_like": [call(lambda x: torch.randint_like(x, 1) + x, (3, 4))],
    "randint": [call(lambda x: torch.randint(1, (3, 4)) + x, (3, 4)), call(lambda x: torch.randint(2, 3, (3, 1)) * x, (3, 4))],
    "randperm": [call(lambda x: torch.randperm(1) + x, (3, 4), oracle=False)],
    "normal": [
        call(torch.normal, (3, 4), Numbers((4,), lambda s, g: torch.zeros(s, dtype=torch.float64), False), oracle=False),
        call(lambda x: torch.normal(x, 0.0), (3, 4), oracle=False),
        call(lambda x: torch.normal(2.0, 0.0, (3, 4)) * x, (3, 4), oracle=False),
    ],
    "multinomial": [
        call(lambda x: torch.multinomial((x == x.amax(-1, keepdim=True)).double(), 1) + x, s, oracle=False) for s in ((3, 4), (4,))
    ],
    "drawn": [call(lambda x: torch.empty_like(x).uniform_(2, 2) * x, (3, 4), oracle=False)],
    "rrelu": [call(lambda x, t=t: F.rrelu(x, 0.3, 0.3 if t else 0.4, training=t), (3, 4), oracle=False) for t in (True, False)],
    "gumbel_softmax": [call(lambda x, d=d: F.gumbel_softmax(x * 1e9, dim=d), (3, 4)) for d in (0, -1)],
    # tensors made from numbers
    **each("new_zeros new_ones", lambda n: lambda x: getattr(x, n)(3, 4).cos() * x, (3, 4)),
    "new_full": [call(lambda x: x.new_full((3, 4), 2.5) * x, (3, 4))],
    **each("zeros ones", lambda n: lambda x: in_torch(n)(x.shape[0], 3).cos() * x, (4, 3), free=True, oracle=False),
    "full": [call(lambda x: torch.full((x.shape[0], 3), 2.5) * x, (4, 3), free=True, oracle=False)],
    "arange": [call(lambda x: torch.arange(x.shape[0])[:, None] * x, (4, 3), free=True, oracle=False)],
    "eye": [call(lambda x: torch.eye(x.shape[0], dtype=x.dtype) @ x, (4, 3), free=True, oracle=False)],
    # without a rule of their own: tagged pointwise by their schema, and left to torch.vmap
    **each("relu tanh exp", in_torch, (3, 4)),
    "atan2": [call(torch.atan2, (3, 4), (4,))], "lt": [call(torch.lt, (3, 4), (3, 4))],
    "gelu": [call(lambda x: F.gelu(x, approximate="tanh"), (3, 4))], "leaky_relu": [call(lambda x: F.leaky_relu(x, 0.2), (3, 4))],
    "elu": [call(lambda x: F.elu(x, 1.3), (3, 4))], "softplus": [call(lambda x: F.softplus(x, 1.5), (3, 4))],
    "add": [call(lambda x, y: torch.add(x, y, alpha=2), (3, 4), (4,)), call(lambda x: x + 1.5, (3, 4))],
    "sub": [call(lambda x, y: x - y, (3, 4), (4,))], "mul": [call(torch.mul, (3, 4), (3, 1))],
    "div": [call(torch.div, (3, 4), positive(4)), call(lambda x: torch.div(x, 0.4, rounding_mode="floor"), (3, 4))],
    "pow": [call(torch.pow, positive(3, 4), (4,)), call(lambda x: x**3, (3, 4))], "lerp": [call(torch.lerp, (3, 4), (3, 4), (4,))],
    "clamp": [call(lambda x: x.clamp(-0.5, 0.7), (3, 4)), call(torch.clamp, (3, 4), (3, 4), (3, 4))],
    "addcmul": [call(lambda x, y, z: torch.addcmul(x, y, z, value=0.5), (3, 4), (3, 4), (4,))],
    "kron": [call(torch.kron, (2, 3), (3, 2))], "cov": [call(torch.cov, (3, 4))],
    "trapezoid": [call(lambda x: torch.trapezoid(x, dx=0.5, dim=0), (3, 4))],
    # shape
    "view": [call(lambda x: x.view(torch.int64) + 1, (2, 6), never=True, refused=("a view as another dtype",), oracle=False)],
    "ravel": [call(torch.ravel, (3, 4)), call(torch.ravel, (3,))],
    "reshape": [
        call(lambda x: x.view(4, 3), (2, 6)), call(lambda x: x.view(-1), (3, 4)), call(lambda x: x.view(2, 3, 1, -1), (6, 4)),
        call(lambda x: x.reshape(4, 3), (2, 6)), call(lambda x: x.T.reshape(-1, 2), (3, 4)),
    ],
    **each("view_as reshape_as", in_torch, (3, 4), (4, 3)),
    "flatten": [call(torch.flatten, (2, 3, 4)), call(lambda x: x.flatten(1), (2, 3, 4)),
    call(lambda x: x.flatten(0, 1), (2, 3, 4)), call(torch.flatten, ())],
    "unflatten": [call(lambda x: x.unflatten(1, (2, 3)), (4, 6, 2)), call(lambda x: x.unflatten(-1, (2, -1)), (3, 4))],
    "unsqueeze": [call(lambda x, d=d: x.unsqueeze(d), (3, 4)) for d in (0, 1, -1)],
    "squeeze": [call(lambda x: x.squeeze(), (1, 3, 1, 4)), call(lambda x: x.squeeze(1), (3, 1, 4)),
    call(lambda x: x.squeeze((0, -1)), (1, 3, 1))],
    "transpose": [call(lambda x: x.transpose(0, 2), (2, 3, 4)), call(lambda x: x.swapaxes(-1, 1), (2, 3, 4))],
    "t": [call(torch.t, (3, 4)), call(torch.t, (4,))], "mT": [call(lambda x: x.mT, (2, 3, 4))],
    "permute": [call(lambda x: x.permute(2, 0, 1), (2, 3, 4)), call(lambda x: x.permute((1, -1, 0)), (2, 3, 4))],
    "movedim": [call(lambda x: x.movedim(0, -1), (2, 3, 4)), call(lambda x: torch.movedim(x, (0, 1), (2, 0)), (2, 3, 4))],
    "expand": [call(lambda x: x.expand(5, 3, 4), (3, 1)), call(lambda x: x.expand(2, -1), (4,))],
    "expand_as": [call(lambda x, y: x.expand_as(y) * y, (3, 1), (2, 3, 4))],
    "broadcast_to": [call(lambda x: x.broadcast_to(5, 3, 4), (3, 1))],
    "repeat": [call(lambda x: x.repeat(2, 1, 3), (3, 4)), call(lambda x: x.repeat(2), (4,))],
    "tile": [call(lambda x: x.tile(2, 3), (3, 4))],
    "flip": [call(lambda x: x.flip(0), (3, 4)), call(lambda x: torch.flip(x, (0, -1)), (2, 3, 4))],
    **each("fliplr flipud rot90 tril triu diag_embed diagonal adjoint trace", in_torch, (3, 3)), "mH": [call(lambda x: x.mH, (3, 4))],
    "H": [call(lambda x: x.H, (3, 4))], "view_as_real": [call(torch.view_as_real, imaginary(3, 4))],
    "view_as_complex": [call(torch.view_as_complex, (3, 2))],
    "roll": [call(lambda x: x.roll(1, -1), (3, 4)), call(lambda x: x.roll(2), (3, 4))],
    "pixel_shuffle": [call(lambda x: F.pixel_shuffle(x, 2), (2, 4, 2, 3))],
    "pixel_unshuffle": [call(lambda x: F.pixel_unshuffle(x, 2), (1, 2, 4))],
    "channel_shuffle": [call(lambda x: F.channel_shuffle(x, 2), (2, 4, 3))], "diff": [call(torch.diff, (3, 4))],
    "repeat_interleave": [call(lambda x: x.repeat_interleave(2, 1), (3, 4))],
    "unfold": [call(lambda x: x.unfold(1, 2, 1), (3, 4)), call(lambda x: F.unfold(x, (2, 2)), (1, 2, 3, 3))],
    "fold": [call(lambda x: F.fold(x, (3, 3), (2, 2)), (2, 4, 4))],
    "pad": [
        call(lambda x: F.pad(x, (1, 2)), (3, 4)), call(lambda x: F.pad(x, (1, 0, 2, 1), value=3.0), (2, 3, 4)),
        call(lambda x: F.pad(x, (1, 1), mode="reflect"), (3, 4)), call(lambda x: F.pad(x, (1, 1), mode="circular"), (2, 3, 4)),
        call(lambda x: F.pad(x, (1, 1, 0, 2), mode="replicate"), (2, 3, 4)),
    ],
    "select": [call(lambda x: x.select(1, 2), (3, 4)), call(lambda x: x[0] * 2, (3, 4))],
    "slice_along": [call(lambda x: x[1:], (3, 4)), call(lambda x: x[:, ::2], (3, 4))],
    "pick_along": [call(lambda x: x[:, [2, 0]], (3, 4)), call(lambda x: x[[0, 2, 2]], (3,))],
    # indices
    "__getitem__": [
        call(lambda x, i: x[i], (5, 3), below(5, 2)), call(lambda x, i: x[:, i], (3, 5), below(5, 2, 2)),
        call(lambda x, i, j: x[i, :, j], (5, 2, 4), below(5, 3), below(4, 3)),
        call(lambda x, i, j: x[i, 1, j], (5, 2, 4), below(5), below(4)),
        call(lambda x, i, j: x[1:, i, j], (3, 5, 4), below(5, 2, 1), below(4, 3)), call(lambda x, i: x[..., i, None], (3, 5), below(5, 2)),
    ],
    "gather": [call(lambda x, i: x.gather(1, i), (3, 5), below(5, 3, 2)), call(lambda x, i: x.gather(-2, i), (4, 3), below(4, 2, 3))],
    "take_along_dim": [
        call(lambda x, i: torch.take_along_dim(x, i, 1), (3, 5), below(5, 3, 2)), call(torch.take_along_dim, (3, 5), below(15, 4)),
        call(lambda x, i: torch.take_along_dim(x, i, -1), (1, 5), below(5, 3, 2)),
    ],
    "index_select": [call(lambda x, i, d=d: x.index_select(d, i), (4, 4, 2), below(4, 3)) for d in (0, 1)],
    "one_hot": [call(lambda i: F.one_hot(i, 5), below(5, 3, 2))],
    "as_slot": [call(lambda x: _filled(x), (3,), oracle=False)],
    "item": [call(lambda x: torch.aminmax(x, dim=1)[1], (3, 4))],
    # joins inside of lanes
    "cat": [call(lambda a, b: torch.cat([a, b]), (2, 4), (3, 4)), call(lambda a, b: torch.cat((a, b), -1), (3, 2), (3, 4))],
    "stack": [call(lambda a, b: torch.stack([a, b]), (3, 4), (3, 4)), call(lambda a, b: torch.stack([a, b], -1), (3, 4), (3, 4))],
    "sum_of": [call(lambda a, b, c: a + b + c, (3, 4), (3, 4), (3, 4))],
    "prod_of": [call(lambda a, b, c: a * b * c, (3, 4), (3, 4), (3, 4))],
    **{f"{m}_of": [call(lambda a, b, c, f=f: f(f(a, b), c), (3, 4), (3, 4), (3, 4))] for m, f in (("min", torch.minimum), ("max",
    torch.maximum))},
    **{name: _numpy_stack(name) for name in "hstack vstack dstack row_stack column_stack".split()},
    # reductions and scans
    **{name: reduced(name) for name in "sum mean amax amin prod var std logsumexp all any nansum nanmean".split()},
    "count_nonzero": [call(lambda x: (x > 0).count_nonzero(1), (3, 4)), call(lambda x: (x > 0).count_nonzero(), (3, 4))],
    "all": [call(lambda x: (x > -1).all(1), (3, 4)), call(lambda x: (x > -1).all(), (3, 4))],
    "any": [call(lambda x: (x > 1).any(0, keepdim=True), (3, 4)), call(lambda x: (x > 1).any(), (3, 4))],
    "norm": [call(lambda x: x.norm(), (3, 4)), call(lambda x: x.norm(dim=-1), (3, 4)),
    call(lambda x: x.norm(1, dim=0, keepdim=True), (3, 4))],
    "linalg_vector_norm": [call(lambda x: torch.linalg.vector_norm(x, dim=1), (3, 4))],
    "linalg_norm": [call(lambda x: torch.linalg.norm(x, dim=1), (3, 4))],
    "linalg_matrix_norm": [call(torch.linalg.matrix_norm, (3, 4))],
    **each("var_mean std_mean", lambda n: lambda x: in_torch(n)(x, dim=1), (3, 4)),
    "aminmax": [call(lambda x: torch.aminmax(x, dim=1), (3, 4))],
    **each("max min median nanmedian mode", lambda n: lambda x: in_torch(n)(x, 1), (3, 5)),
    **each("argmax argmin", lambda n: lambda x: in_torch(n)(x, 1), (3, 4)),
    "kthvalue": [call(lambda x: torch.kthvalue(x, 2, 1), (3, 4))],
    **each("quantile nanquantile", lambda n: lambda x: in_torch(n)(x, 0.3, 1), (3, 4), oracle=False),
    **each("softmax log_softmax softmin", lambda n: lambda x: getattr(F, n)(x, dim=1) + getattr(F, n)(x, dim=-1), (2, 3, 4)),
    "cumsum": [call(lambda x: x.cumsum(0), (3, 4)), call(lambda x: x.cumsum(-1), (3, 4))],
    "cumprod": [call(lambda x: x.cumprod(1), (3, 4))],
    "normalize": [call(F.normalize, (3, 4)), call(lambda x: F.normalize(x, dim=0), (3, 4))],
    "glu": [call(F.glu, (3, 4)), call(lambda x: F.glu(x, 0), (4, 3))],
    **each("logcumsumexp cummax cummin", lambda n: lambda x: in_torch(n)(x, 1), (3, 4)), "topk": [call(lambda x: x.topk(2), (3, 4))],
    **each("sort argsort", in_torch, (3, 4)), "msort": [call(torch.msort, (3, 4))],
    # pools, resampling
    **{f"{k}_pool{d}d": _pool(k, d) for k in ("max", "avg", "adaptive_avg", "adaptive_max") for d in (1, 2, 3)},
    **{f"lp_pool{d}d": _pool("lp", d) for d in (1, 2, 3)},
    **{f"{k}_pool{d}d_with_indices": _pool_with_indices(k, d) for k in ("max", "adaptive_max") for d in (1, 2, 3)},
    **{f"max_unpool{d}d": _unpool(d) for d in (1, 2, 3)},
    **{f"fractional_max_pool{d}d{end}": _fractional_pool(d, end) for d in (2, 3) for end in ("", "_with_indices")},
    "interpolate": [call(lambda x: F.interpolate(x, scale_factor=2), (2, 3, 4, 4))],
    "grid_sample": [call(lambda x, g: F.grid_sample(x, g, align_corners=False), (1, 2, 3, 3), (1, 2, 2, 2))],
    "affine_grid": [call(lambda t: F.affine_grid(t, (2, 1, 3, 3), align_corners=False), (2, 2, 3), oracle=False)],
    # transforms, matrices
    **each("fft_fft fft_ifft fft_rfft fft_ihfft fft_fft2 fft_ifft2 fft_rfft2 fft_fftn fft_ifftn fft_rfftn", in_torch, (3, 4)),
    **each("fft_ihfft2 fft_ihfftn", in_torch, (3, 4), oracle=False),
    **each("fft_irfft fft_hfft fft_irfft2 fft_hfft2 fft_irfftn fft_hfftn", in_torch, imaginary(3, 4)),
    **each("fft_fftshift fft_ifftshift", in_torch, (3, 4)),
    **each("linalg_det linalg_slogdet linalg_inv inverse linalg_cholesky linalg_matrix_exp matrix_exp logdet slogdet det", in_torch,
    definite(3)),
    **each("linalg_pinv linalg_qr linalg_eigvalsh linalg_svdvals linalg_eigh linalg_svd", in_torch, definite(3)),
    "linalg_matrix_power": [call(lambda a: torch.linalg.matrix_power(a, 3), (3, 3))],
    "linalg_solve": [call(torch.linalg.solve, definite(3), (3, 2))],
    # losses, distances
    **each("mse_loss l1_loss smooth_l1_loss huber_loss", in_torch, (3, 4), (3, 4)),
    "kl_div": [call(lambda a, b: F.kl_div(a, b, reduction="sum"), (3, 4), unit(3, 4), oracle=False)],
    "soft_margin_loss": [call(lambda a, b: F.soft_margin_loss(a, b * 2.0 - 1), (3, 4), below(2, 3, 4), oracle=False)],
    "binary_cross_entropy": [call(F.binary_cross_entropy, unit(3, 4), unit(3, 4))],
    "binary_cross_entropy_with_logits": [call(F.binary_cross_entropy_with_logits, (3, 4), unit(3, 4))],
    "poisson_nll_loss": [call(F.poisson_nll_loss, (3, 4), positive(3, 4))],
    "gaussian_nll_loss": [call(F.gaussian_nll_loss, (3, 4), (3, 4), positive(3, 4), oracle=False)],
    "cosine_similarity": [call(F.cosine_similarity, (3, 4), (3, 4))], "pairwise_distance": [call(F.pairwise_distance, (3, 4), (3, 4))],
}  # fmt: skip


def _filled(x: Tensor) -> Tensor:
    out = torch.zeros(2, 3, dtype=x.dtype)
    out[0] = x[:1]
    out[1] = x * 2
    return out
