"""Ops for which all leading dims are batch: lanes go in front, ``[G, ...]``, and dims counted from the end mean what they meant.

Several operands broadcast as the lanes' own do. Dims counted from the front are counted past the lane axis.
"""

from __future__ import annotations

from typing import Any

import torch

from ..bundle import Bundle
from ..emit import Emitter
from ..writer import CannotVectorize, Packed
from .base import rank, rule, shared, tensors, unpacked
from .fallback import by_vmap

_DIMS = ("dim", "dim1", "dim2", "dims")
# Shapes are found by running an op on zeros, which these do not take.
_NOT_OF_ZEROS = frozenset("linalg_inv inverse linalg_cholesky linalg_solve linalg_matrix_power linalg_pinv".split())


def _past_lanes(dims: Any) -> Any:
    if isinstance(dims, (tuple, list)):
        return tuple(_past_lanes(d) for d in dims)
    return dims + 1 if isinstance(dims, int) and dims >= 0 else dims


def leading(emitter: Emitter, bundle: Bundle, contiguous: bool = False) -> Packed:
    """The op with lanes in front of every operand."""
    op = bundle.op
    assert op is not None
    args = tensors(emitter, bundle)
    column = dict(zip(op.names, bundle.members[0].args, strict=True))
    packed = {name: value for name, value in args.items() if isinstance(value, Packed)}
    if shared(*packed.values()):
        return Packed(emitter.respell(op, unpacked(args)), None)
    full = max(rank(column[name]) for name in packed)
    for name, value in packed.items():
        node = emitter.front(value, len(bundle.members))
        for _ in range(full - rank(column[name])):
            node = emitter.call(torch.unsqueeze, node, 1)
        args[name] = emitter.call("contiguous", node) if contiguous else node
    args.update((name, _past_lanes(args[name])) for name in _DIMS if name in args)
    return Packed(emitter.respell(op, tuple(args.values()), zeros=bundle.name not in _NOT_OF_ZEROS), 0)


@rule("diagonal", "view_as_real", "adjoint", "mH", view=True)
@rule(
    "tril", "triu", "diag_embed", "pixel_shuffle", "pixel_unshuffle", "rot90", "cosine_similarity", "pairwise_distance", "cdist",
    "linalg_cross", "linalg_det", "linalg_slogdet", "linalg_inv", "inverse", "linalg_cholesky", "linalg_matrix_power", "linalg_pinv",
    "linalg_qr", "linalg_eigh", "linalg_eigvalsh", "linalg_svd", "linalg_svdvals", "linalg_matrix_norm", "logdet", "slogdet", "det",
    lowering="lanes in front",
)  # fmt: skip
def _leading(emitter: Emitter, bundle: Bundle) -> Packed:
    return leading(emitter, bundle)


@rule("H", view=True)
def _h(emitter: Emitter, bundle: Bundle) -> Packed:
    assert bundle.op is not None
    value: Packed = emitter.operand(bundle, bundle.op.names[0])  # ``H`` itself is for matrices alone
    return Packed(emitter.call(torch.adjoint, value.node if value.dim is None else emitter.at(value, 0)), None if value.dim is None else 0)


@rule("view_as_complex", view=True)
def _view_as_complex(emitter: Emitter, bundle: Bundle) -> Packed:
    return leading(emitter, bundle, contiguous=True)  # real and imaginary part must be neighbours in memory, at every call


@rule("matrix_exp", "linalg_matrix_exp", lowering="lanes in front")
def _matrix_exp(emitter: Emitter, bundle: Bundle) -> Packed:
    return leading(emitter, bundle, contiguous=True)


@rule("cross", lowering="lanes in front")
def _cross(emitter: Emitter, bundle: Bundle) -> Packed:
    if emitter.operand(bundle, "dim") is None:
        raise CannotVectorize("cross without a dim takes the first dim of size 3")
    return leading(emitter, bundle)


@rule("linalg_solve", lowering="lanes in front")
def _solve(emitter: Emitter, bundle: Bundle) -> Packed | tuple[Packed, str]:
    if rank(bundle.members[0].args[0]) != rank(bundle.members[0].args[1]):  # a vector: which one is, shapes tell, and lanes change those
        return by_vmap(emitter, bundle)
    return leading(emitter, bundle)
