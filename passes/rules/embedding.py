"""Embedding tables: one table plus offsets.

- own tables, of equal or unequal row counts: the tables are rows of one packed table, ``[V0 + V1 + ..., D]``, and each lane's indices are
  moved by where its rows begin. One ``embedding`` (or ``embedding_bag``, lanes folded into the bags) for all lanes.
- one shared table: the same look-up on the packed indices.

An index outside its own table must raise as it does in the loop, and must not read the next lane's rows. ``own_rows`` therefore sends it to
row -1 of the packed table, where the kernel's own check meets it: an IndexError on the CPU, a device assert on a GPU, as in the loop,
without a synchronization. It costs three elementwise launches on the indices, which are as many times smaller than the result as
the embedding is wide.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F

from fxfuse.functional import bag_offsets, ragged_bags
from fxfuse.ops import Op

from ..bundle import Bundle, Node
from ..emit import Emitter
from ..writer import CannotVectorize, Packed
from .base import rank, rule
from .fold import fold, unfold


@rule("embedding", heavy=True)
def embedding(emitter: Emitter, bundle: Bundle) -> tuple[Packed, str]:
    """One look-up for all lanes, in rows as wide as the widest table's. Those of unequal tables come side by side: ``[..., G, D]``."""
    op = bundle.op
    assert op is not None
    index_name = "input" if "input" in op.names else "indices"  # F.embedding, torch.embedding
    given = {name: emitter.operand(bundle, name) for name in op.names if name not in ("weight", "padding_idx")}
    if given.get("max_norm") is not None:
        raise CannotVectorize("embedding with max_norm writes its weights in forward")
    frequency, sparse = bool(given["scale_grad_by_freq"]), bool(given["sparse"])
    index: Packed = given[index_name]
    nodes = emitter.nodes(bundle, "weight")
    assert nodes is not None
    padding = _padding(bundle, nodes, counts_back="input" in op.names)
    if all(node is nodes[0] for node in nodes):
        if len(set(padding)) > 1:
            raise CannotVectorize("embedding: lanes share a table but not its padding row")
        if frequency and index.dim is not None:
            raise CannotVectorize("embedding with scale_grad_by_freq: the lanes share a table and count its indices one by one")
        table = emitter.single(nodes[0])
        return Packed(emitter.call(F.embedding, index.node, table, padding[0], None, 2.0, frequency, sparse), index.dim), "one table"
    table, starts = _own_tables(emitter, bundle, nodes, frequency, sparse)
    if bundle.unequal:  # where they are to lie end to end: the indices are moved, and not the rows
        last = rank(_lane_indices(bundle, index_name)[0])
        index = Packed(emitter.at(Packed(emitter.front(index, len(bundle.members)), 0), last), last)
    rows = own_rows(emitter, index, _lane_indices(bundle, index_name), starts, [int(node.meta["shape"][0]) for node in nodes])
    looked_up = emitter.call(F.embedding, rows.node, table, None, None, 2.0, frequency, sparse)
    if any(p is not None for p in padding) and nodes[0].meta.get("requires_grad"):
        # Only one row can be padding to the kernel: the others' gradients are cut off here.
        pads = [-1 if p is None else start + p for p, start in zip(padding, starts, strict=True)]
        is_padding = emitter.call(torch.eq, rows.node, _per_lane(emitter, pads, rows))
        fixed = emitter.call("detach", looked_up)
        looked_up = emitter.call(torch.where, emitter.call(torch.unsqueeze, is_padding, -1), fixed, looked_up)
    return Packed(looked_up, rows.dim), "one table and offsets"


@rule("embedding_bag", heavy=True)
def _embedding_bag(emitter: Emitter, bundle: Bundle) -> tuple[Packed, str]:
    op = bundle.op
    assert op is not None
    if "mode" not in op.names or isinstance(emitter.operand(bundle, "mode"), int):
        raise CannotVectorize("torch.embedding_bag returns more than the bags; F.embedding_bag is covered")
    ragged = len({(node.meta["shape"], node.meta["dyn"]) for node in _lane_indices(bundle, "input")}) > 1
    left_out = ("weight", "padding_idx", *(["input"] if ragged else []))
    given = {name: emitter.operand(bundle, name) for name in op.names if name not in left_out}
    if given["max_norm"] is not None:
        raise CannotVectorize("embedding_bag with max_norm writes its weights in forward")
    frequency, sparse = bool(given["scale_grad_by_freq"]), bool(given["sparse"])
    weights, offsets = given["per_sample_weights"], given["offsets"]
    nodes = emitter.nodes(bundle, "weight")
    assert nodes is not None
    lanes = len(bundle.members)
    padding = _padding(bundle, nodes, counts_back=True)
    pad: int | None
    rest: dict[str, Any]
    if offsets is not None and given["include_last_offset"]:
        # In float64 they are in the last bag, in float32 a sum leaves them out, and a mean counts them without adding them.
        raise CannotVectorize("embedding_bag with include_last_offset: torch's kernels disagree on indices behind the last offset")
    if ragged:
        if weights is not None or frequency or any(p is not None for p in padding) or all(node is nodes[0] for node in nodes):
            raise CannotVectorize("embedding_bag: unequal numbers of indices with weights, padding, counted gradients or one shared table")
        table, starts = _own_tables(emitter, bundle, nodes, frequency, sparse)
        rows, begins = _ragged(emitter, bundle, offsets, starts, [int(node.meta["shape"][0]) for node in nodes])
        rest = {"mode": given["mode"], "sparse": sparse}
        return _by_offsets(emitter, bundle, rows, table, begins, rest), "one table and offsets, indices end to end"
    index: Packed = given["input"]
    if all(node is nodes[0] for node in nodes):
        if len(set(padding)) > 1:
            raise CannotVectorize("embedding_bag: lanes share a table but not its padding row")
        if frequency:
            raise CannotVectorize("embedding_bag with scale_grad_by_freq: the lanes share a table and count its indices one by one")
        table, pad, lowering = emitter.single(nodes[0]), padding[0], "one table, lanes folded into the bags"
    else:
        table, starts = _own_tables(emitter, bundle, nodes, frequency, sparse)
        index, pad = _bag_rows(emitter, bundle, index, nodes, starts, padding)
        lowering = "one table and offsets, lanes folded into the bags"
    front = Packed(emitter.front(index, lanes), 0)
    rest = {"mode": given["mode"], "scale_grad_by_freq": frequency, "sparse": sparse, "padding_idx": pad}
    bags, place = fold(emitter, front) if offsets is None else (emitter.call(torch.flatten, front.node, 0, 1), 0)
    if weights is not None:
        weights = Packed(emitter.front(weights, lanes), 0)
        rest["per_sample_weights"] = emitter.call(torch.flatten, emitter.at(weights, place), 0, 1)
    if offsets is None:  # [G, B, L]
        return unfold(emitter, emitter.call(F.embedding_bag, bags, table, **rest), place, lanes), lowering
    # 1-D indices [G, n], bags that begin at [G, B]: one run of indices.
    lane = emitter.call(torch.unsqueeze, emitter.constant(list(range(lanes)), emitter.device(bundle.members)), 1)
    begins = emitter.call(bag_offsets, emitter.front(offsets, lanes), front.node, lane)
    return _by_offsets(emitter, bundle, bags, table, begins, rest), lowering


def _by_offsets(emitter: Emitter, bundle: Bundle, rows: Node, table: Node, begins: Node, rest: dict[str, Any]) -> Packed:
    """One run of rows of the table, the bags of all lanes in it."""
    out = emitter.call(torch.unflatten, emitter.call(F.embedding_bag, rows, table, begins, **rest), 0, (len(bundle.members), -1))
    return Packed(out, 0)


def _ragged(emitter: Emitter, bundle: Bundle, offsets: Packed, starts: list[int], sizes: list[int]) -> tuple[Node, Node]:
    """The rows and where the bags begin, of lanes with unequal numbers of indices."""
    device = emitter.device(bundle.members)
    last = [start + size - 1 for start, size in zip(starts, sizes, strict=True)]
    indices = [emitter.single(node) for node in _lane_indices(bundle, "input")]
    rows = emitter.call(torch.unflatten, emitter.constant([*starts, *last], device), 0, (2, len(starts)))
    both = emitter.call(ragged_bags, indices, emitter.front(offsets, len(bundle.members)), rows)
    return emitter.call(operator.getitem, both, 0), emitter.call(operator.getitem, both, 1)


def _lane_indices(bundle: Bundle, name: str) -> list[Node]:
    assert bundle.op is not None
    column = bundle.op.names.index(name)
    return [member.args[column] for member in bundle.members]  # type: ignore[misc]


def _padding(bundle: Bundle, nodes: list[Node], counts_back: bool) -> list[int | None]:
    """Each lane's padding row, counted from the front; None without. To ``torch.embedding`` itself a negative one is none."""
    assert bundle.op is not None
    column = bundle.op.names.index("padding_idx")
    found: list[int | None] = []
    for member, table in zip(bundle.members, nodes, strict=True):
        value: Any = member.args[column]
        if value is not None and value < 0:
            value = value + table.meta["shape"][0] if counts_back else None
        found.append(value)
    return found


def _own_tables(emitter: Emitter, bundle: Bundle, nodes: list[Node], frequency: bool, sparse: bool) -> tuple[Node, list[int]]:
    """The packed table, and where each lane's rows begin."""
    if frequency and len(set(nodes)) < len(nodes):
        raise CannotVectorize(f"{bundle.name} with scale_grad_by_freq: lanes share a table and count its indices one by one")
    if any(node.op != "get_attr" for node in nodes):
        stacked = emitter.operand(bundle, "weight")
        if sparse or stacked.dim is None:
            raise CannotVectorize(f"{bundle.name} with sparse gradients of tables that are computed")
        rows = int(nodes[0].meta["shape"][0])
        return emitter.call(torch.flatten, emitter.at(stacked, 0), 0, 1), [lane * rows for lane in range(len(nodes))]
    if sparse and emitter.packs.members_stay:
        raise CannotVectorize(f"{bundle.name} with sparse gradients: the tables stay Parameters, and parts of a pack's gradient are dense")
    found = emitter.table(nodes)
    if isinstance(found, str):
        raise CannotVectorize(f"{bundle.name}: {found}")
    if sparse and found[0].op != "get_attr":
        raise CannotVectorize(f"{bundle.name} with sparse gradients: the table is packed in another form already")
    return found


def _per_lane(emitter: Emitter, values: list[int], like: Packed) -> Node:
    """One number per lane, shaped to broadcast with ``like``."""
    assert like.dim is not None
    node = emitter.constant(values, emitter.device(None))
    behind = len(like.node.meta["val"].shape) - like.dim - 1
    return emitter.call(torch.reshape, node, (len(values), *([1] * behind))) if behind else node


def own_rows(emitter: Emitter, index: Packed, lane_nodes: list[Node], starts: list[int], sizes: list[int]) -> Packed:
    """Indices into each lane's own table as rows of the packed one; -1, which every look-up refuses, for those outside of their own."""
    if index.dim is None:
        index = Packed(emitter.call(torch.unsqueeze, index.node, 0), 0)
    first = _per_lane(emitter, starts, index)
    rows = emitter.call(torch.add, index.node, first)
    if all(_stays_below(node, size) for node, size in zip(lane_nodes, sizes, strict=True)):
        return Packed(rows, index.dim)
    last = _per_lane(emitter, [start + size - 1 for start, size in zip(starts, sizes, strict=True)], index)
    inside = emitter.call(torch.clamp, rows, first, last)
    return Packed(emitter.call("masked_fill", rows, emitter.call(torch.ne, rows, inside), -1), index.dim)


def _stays_below(node: Node, size: int) -> bool:
    """True where an index is a remainder, which is in the table whatever was divided: hashed ids."""
    if not isinstance(node.target, Op) or node.target.name != "remainder":
        return False
    divisor: Any = node.args[1]
    return type(divisor) is int and 0 < divisor <= size


def _bag_rows(
    emitter: Emitter, bundle: Bundle, index: Packed, nodes: list[Node], starts: list[int], padding: list[int | None]
) -> tuple[Packed, int | None]:
    """The rows of the packed table, and the row that is left out of the bags: one for all lanes, as a bag does not read it."""
    sizes = [int(node.meta["shape"][0]) for node in nodes]
    rows = own_rows(emitter, index, _lane_indices(bundle, "input"), starts, sizes)
    pads = [None if p is None else start + p for p, start in zip(padding, starts, strict=True)]
    chosen = next((pad for pad in pads if pad is not None), None)
    if chosen is None or all(pad in (None, chosen) for pad in pads):
        return rows, chosen
    none = -2  # no row is -2: those outside are -1
    is_padding = emitter.call(torch.eq, rows.node, _per_lane(emitter, [none if pad is None else pad for pad in pads], rows))
    return Packed(emitter.call("masked_fill", rows.node, is_padding, chosen), rows.dim), chosen
