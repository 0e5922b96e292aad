"""Count what a call really launches, and the fewest launches that horizontal fusion could reach.

Comes in: a function without arguments. Goes out: ``Launches``. Knows nothing of fxfuse, so that it scores the loop and the packed
model alike; the numbers ``total``, ``heavy`` and ``bound`` are those of the project's reference counter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from fxfuse.private.dispatch import BesideDynamo, WithoutDynamo, dynamo_is_imported
from fxfuse.private.pytree import tree_leaves
from fxfuse.private.schemas import schema_of
from fxfuse.private.storages import storage_key

# Ops that carry parameters or cost like those that do: matmuls, convolutions, embeddings, norms, recurrent cells, attention.
HEAVY = frozenset(
    {
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "mv",
        "addmv",
        "dot",
        "linear",
        "einsum",
        "convolution",
        "convolution_backward",
        "mkldnn_convolution",
        "embedding",
        "_embedding_bag",
        "_embedding_bag_forward_only",
        "mkldnn_rnn_layer",
        "lstm",
        "gru",
        "_thnn_fused_lstm_cell",
        "_thnn_fused_gru_cell",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_attention_math",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "native_batch_norm",
        "_native_batch_norm_legit",
        "_native_batch_norm_legit_no_training",
        "native_layer_norm",
        "native_group_norm",
        "cudnn_batch_norm",
    }
)
# Ops that launch no kernel: views, allocations, metadata.
FREE = frozenset(
    {
        "view",
        "_unsafe_view",
        "t",
        "transpose",
        "permute",
        "select",
        "slice",
        "unsqueeze",
        "squeeze",
        "expand",
        "detach",
        "alias",
        "as_strided",
        "split",
        "split_with_sizes",
        "unbind",
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "lift_fresh",
        "unfold",
        "diagonal",
        "view_as_real",
        "view_as_complex",
        "_reshape_alias",
        "sym_size",
        "narrow",
        "chunk",
        "movedim",
        "is_same_size",
        "real",
        "imag",
        "_conj",
        "resolve_conj",
        "set_",
    }
)

_Depth = dict[int, int]  # signature -> how many heavy ops of that signature lie on the longest chain that ends here


@dataclass(frozen=True)
class Launches:
    """What one call launched.

    ``total``: ATen calls that launch work. ``free``: those that do not (views, allocations, metadata). ``heavy``: those that carry
    parameters. ``bound``: the fewest of these if ops of equal signature were fused whenever they are independent, -1 if not asked for.
    """

    total: int
    heavy: int
    bound: int
    heavy_by_op: dict[str, int] = field(default_factory=dict)
    total_by_op: dict[str, int] = field(default_factory=dict)
    free: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The counts as data for ``json.dumps``."""
        return {
            "total": self.total,
            "heavy": self.heavy,
            "bound": self.bound,
            "heavy_by_op": dict(self.heavy_by_op),
            "total_by_op": dict(self.total_by_op),
            "free": self.free,
        }


def count(fn: Callable[[], object], *, bound: bool = True) -> Launches:
    """Run ``fn`` once and count the ATen calls it makes, forward and backward.

    The bound follows from Mirsky's theorem (a partial order splits into as many antichains as its longest chain has
    elements): per signature (op, shapes, dtypes) the longest dependency chain among its ops, summed over signatures. It costs
    one dictionary merge per op, so at worst (ops x signatures); ``bound=False`` only counts, in linear time.

    Dependencies follow storages, not tensors: a write through a view orders what reads the base. Exceptions of ``fn`` pass through.

    >>> x, w = torch.ones(4, 4), torch.ones(4, 4)
    >>> got = count(lambda: torch.stack([x @ w for _ in range(3)]))
    >>> got.total, got.heavy, got.bound
    (4, 3, 1)
    """
    # Dynamo, where it is in use, is told to keep out of the counter. That would import it (a second) where it is not.
    kind = _CounterBesideDynamo if dynamo_is_imported() else _Counter
    with kind(bound) as counter:
        fn()
    calls: Counter[str] = Counter()
    for func, number in counter.calls.items():
        calls[func.overloadpacket.__name__] += number
    total_by_op = {name: number for name, number in calls.items() if name not in FREE}
    heavy_by_op = {name: number for name, number in calls.items() if name in HEAVY}
    return Launches(
        total=sum(total_by_op.values()),
        heavy=sum(heavy_by_op.values()),
        bound=sum(counter.chain.values()) if bound else -1,
        heavy_by_op=heavy_by_op,
        total_by_op=total_by_op,
        free=sum(calls.values()) - sum(total_by_op.values()),
    )


class _Counter(WithoutDynamo):
    def __init__(self, bound: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bound = bound
        self.calls: dict[Any, int] = {}  # by overload
        self.chain: Counter[int] = Counter()
        self._signatures: dict[Hashable, int] = {}
        self._depth: dict[int, _Depth] = {}
        self._alive: dict[int, object] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs) if kwargs else func(*args)
        self.calls[func] = self.calls.get(func, 0) + 1
        if self.bound:
            self._follow(func, func.overloadpacket.__name__, args, kwargs or {}, out)
        return out

    def _follow(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
        ins = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        keys = [self._storage(t) for t in ins]
        depth = _merge([d for key in keys if (d := self._depth.get(key))])
        if name in HEAVY:
            signature = (name, tuple((tuple(t.shape), t.dtype) for t in ins))
            number = self._signatures.setdefault(signature, len(self._signatures))
            depth = dict(depth)
            depth[number] = length = depth.get(number, 0) + 1
            self.chain[number] = max(self.chain[number], length)
        if not depth:
            return
        written = [self._storage(t) for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        if schema_of(func).is_mutable:
            written += keys
        for key in written:
            old = self._depth.get(key)
            self._depth[key] = depth if not old else _merge([old, depth])

    def _storage(self, tensor: torch.Tensor) -> int:
        # The weak reference lets the memory go, yet keeps the address from being given to another storage.
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # sparse, nested: no storage of its own
            self._alive[id(tensor)] = tensor
            return id(tensor)
        key = storage_key(storage)
        if key not in self._alive:
            self._alive[key] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        return key


class _CounterBesideDynamo(BesideDynamo, _Counter):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_dispatch__(func, types, args, kwargs)


def _merge(depths: list[_Depth]) -> _Depth:
    """The maximum per signature; shares the dictionary where there is nothing to merge."""
    if not depths:
        return {}
    largest = max(depths, key=len)
    merged = largest
    for depth in depths:
        if depth is largest:
            continue
        for number, length in depth.items():
            if length > merged.get(number, 0):
                if merged is largest:
                    merged = dict(largest)
                merged[number] = length
    return merged
