"""What torch calls mean to the recorder, by name.

Comes in: nothing. Goes out: tables: which calls are facts, sizes or reads of data rather than operations, which write in place, and
which make tensors whose size, or content, comes from data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# What a torch call means to the recorder, by the function's name. Every other name is an operation.
ACTIONS: dict[str, str] = {
    # Facts which the guard checks at every call, or that say nothing of the data.
    **dict.fromkeys(
        "dim ndim ndimension device layout is_cuda is_cpu is_sparse "
        "is_quantized is_mkldnn is_meta is_mps is_mtia is_xpu is_signed is_nested is_inference is_conj is_neg get_device names has_names "
        "_backward_hooks is_sparse_csr is_ipu is_maia is_vulkan is_xla is_hpu is_distributed is_shared is_pinned "
        "__len__ set_grad_enabled".split(),
        "fact",
    ),
    **dict.fromkeys("requires_grad is_leaf grad_fn _is_view".split(), "gradient"),
    **dict.fromkeys("is_contiguous stride storage_offset".split(), "layout"),
    **dict.fromkeys("dtype type element_size itemsize nbytes is_floating_point is_complex finfo".split(), "dtype"),
    **dict.fromkeys(
        "__bool__ item tolist numpy __array__ __float__ __int__ __index__ __contains__ __complex__ equal allclose is_nonzero "
        "nonzero argwhere unique unique_consecutive masked_select data_ptr storage untyped_storage __repr__ __str__ __format__ "
        "_unique _unique2 unique_dim __dlpack__ bincount histc cpu_numpy".split(),
        "read",
    ),
    "multi_head_attention_forward": "open", "_set_grad_enabled": "tracking",
    "size": "size", "numel": "numel", "nelement": "numel", "__iter__": "iterate", "__set__": "set", "backward": "backward",
}  # fmt: skip
# Of the same name as a property and as a method: only the property is a plain fact.
PROPERTIES = ACTIONS | {"shape": "shape"}
IN_PLACE = frozenset(f"__{sign}__" for sign in "setitem iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift".split())
MAYBE_IN_PLACE = frozenset(
    name
    for name, function in vars(nn.functional).items()
    if {"inplace", "max_norm"} & {*getattr(getattr(function, "__code__", None), "co_varnames", ())}
)


def _has_mask(args: Any, kwargs: Any) -> bool:
    """Does an index hold a boolean tensor?"""
    index = args[1] if isinstance(args[1], (tuple, list)) else (args[1],)
    return any(isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8) for item in index)


def _has_tensor(args: Any, kwargs: Any) -> bool:
    return any(isinstance(arg, Tensor) for arg in (*args, *kwargs.values()))


# Calls whose result has another size on other data, where this is true of their arguments. (More such are among the reads above.)
DATA_SHAPED: dict[str, Callable[[Any, Any], bool]] = {
    "__getitem__": _has_mask,
    "where": lambda args, kwargs: len(args) + len(kwargs) == 1,
    "one_hot": lambda args, kwargs: [*args[1:], *kwargs.values()][:1] in ([], [-1]),
    "repeat_interleave": lambda args, kwargs: isinstance(kwargs.get("repeats", args[1] if len(args) > 1 else None), Tensor),
    **dict.fromkeys(("arange", "range"), _has_tensor),
    **dict.fromkeys(("_pack_padded_sequence", "_pad_packed_sequence"), lambda args, kwargs: True),
}
# Calls that make a tensor of data.
FROM_DATA = frozenset(("tensor", "as_tensor", "asarray", "new_tensor"))

# Types of arguments that stand for themselves in the record.
PLAIN = frozenset((int, float, bool, str, type(None), type(Ellipsis), complex, torch.dtype, torch.device))
