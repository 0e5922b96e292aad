"""What leaves a region is the caller's: it may be written to and viewed as what the original returned.

Comes in: an output of the lifted graph, and the node that computes it in the emitted one. Goes out: what has to be done to it. A join in
the loop (``cat``, ``stack``, a buffer that is filled) is new memory in rows; packed, it is a view of what the lanes computed last, which
autograd may have kept for its backward, which another output may show, or which has the strides of an input.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.fx

from fxfuse.ops import Op

Node = torch.fx.Node

# Views of one tensor, as the lifted graph and as the emitted one spell them.
_VIEWS = frozenset(
    "select slice_along narrow unsqueeze squeeze transpose t mT permute movedim flatten unflatten view reshape expand view_as reshape_as "
    "expand_as broadcast_to diagonal unfold getitem unbind ravel contiguous".split()
)
_COPIES = frozenset({"unbind_copy", "split_with_sizes_copy"})
# What the loop makes new memory for, and does not need for its own backward.
_JOINS = frozenset("cat stack sum_of prod_of min_of max_of".split())
# New memory in rows, whatever the strides of what they read, and not needed for their own backward.
_ROWS = frozenset(
    "cat stack clone bmm baddbmm mm addmm linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d "
    "unbind_copy split_with_sizes_copy select_copy index_select embedding".split()
)
# Not needed for their own backward either, but with the strides of what they read.
_PLAIN = frozenset(
    "add sub mul div neg addcmul sum mean dropout gelu silu leaky_relu where clamp sin cos log log1p abs square lerp matmul einsum "
    "softplus layer_norm group_norm batch_norm to minimum maximum sum_of prod_of min_of max_of".split()
)


def chain(node: Node) -> list[Node]:
    """``node`` and what it is a view of, up to the first that is none."""
    found = [node]
    while _name(found[-1]) in _VIEWS and found[-1].all_input_nodes and not _is_piece(found[-1]):
        found.append(found[-1].all_input_nodes[0])
    return found


def is_view(node: Node) -> bool:
    """A view of one tensor, of which it is the first operand."""
    name = _name(node)
    if name == "getitem":  # ``h[:, 1:]``; a piece of what a call has made at once is none
        return isinstance(node.all_input_nodes[0].meta.get("val"), torch.Tensor) and len(node.all_input_nodes) == 1
    return name in _VIEWS and name not in ("unbind", "contiguous") and bool(node.all_input_nodes)


def is_part_of_a_pack(node: Node) -> bool:
    """A view of one of several views that ``unbind`` or ``split`` made at once: autograd lets nobody write into those."""
    return any(
        _name(each) == "getitem" and each.all_input_nodes and _name(each.all_input_nodes[0]) in ("unbind", "split") for each in chain(node)
    )


def copies_by_size(node: Node) -> bool:
    """Is there a reshape on the way that has copied, and may be a view of other strides at another size?"""
    for each in chain(node):
        if _name(each) in ("reshape", "flatten", "ravel", "view_as", "reshape_as") and each.all_input_nodes:
            value = each.all_input_nodes[0].meta.get("val")
            if isinstance(value, torch.Tensor) and not value.is_contiguous():
                return True
    return False


def strides_unknown(node: Node, known: dict[Node, bool]) -> bool:
    """May the strides be others than ``meta["val"]`` has: by a Fourier transform, which sorts dims by the strides of what it reads, and
    not as a meta kernel does? ``known`` keeps the answers."""
    pending = [node]
    while pending:
        at = pending[-1]
        if at not in known:
            name, waiting = _name(at), []
            if name.startswith("fft_") and not at.meta.get("as_recorded"):
                known[at] = True
            elif name in _ROWS:
                known[at] = False
            else:
                waiting = [source for source in at.all_input_nodes if source not in known]
                if not waiting:
                    known[at] = any(known[source] for source in at.all_input_nodes)
            pending += waiting
        if at in known:
            pending.pop()
    return known[node]


def _is_piece(node: Node) -> bool:
    """One of several tensors that a call has made at once, each in memory of its own."""
    return _name(node) == "getitem" and _name(node.all_input_nodes[0]) in _COPIES


def treatment(before: Node, after: Node) -> Literal["", "contiguous", "clone"]:
    """How to make ``after`` the caller's own, where ``before`` is; nothing of the graph reads it as an output yet."""
    join = _name(chain(before)[-1])
    if join not in _JOINS:
        return ""
    views = chain(after)
    root = views[-1]
    # Only the chain itself may read what is handed out.
    shared = any(len(node.users) > 1 for node in views[1:]) or len(after.users) > 0
    name = _name(root.all_input_nodes[0] if _is_piece(root) else root)
    if root.op not in ("call_function", "call_method") or shared or name not in _ROWS | _PLAIN:
        return "clone"
    return "" if name in _ROWS or join not in ("cat", "stack") else "contiguous"


def _name(node: Node) -> str:
    target: Any = node.target
    if isinstance(target, Op):
        return target.name
    return str(target) if node.op != "call_function" else str(getattr(target, "__name__", ""))
