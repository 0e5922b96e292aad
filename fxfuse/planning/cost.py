"""What a graph costs, estimated without running it: a few constants of the machine, and the shapes.

Comes in: an emitted graph, or a loop's prepared one, whose nodes know their shapes, and ``Rates``. Goes out: seconds of one step. Each op
pays for its dispatch, and then for whichever takes longer: the bytes that it reads and writes, at the bandwidth of the cache or of the
memory, or its arithmetic, at the rate of its kind (the roofline model of Williams, Waterman and Patterson,
2009, with a price per launch). A backward costs a launch and the same bytes for each operand that needs a gradient. ``compiled``: the
graph is to be compiled by Inductor, where what is elementwise costs its bytes alone, and gradients are recorded by nobody. It ranks forms;
it does not predict times. The constants are measured by ``benchmarks/calibrate.py``, which prints them as they stand here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx

from fxfuse.ops import MAY_COPY, Op, op_name

Node = torch.fx.Node


@dataclass(frozen=True)
class Rates:
    """Seconds, bytes per second, and arithmetic per second of one kind of device, measured with ``threads`` threads."""

    dispatch: float  # of an op, with Python's share
    product_dispatch: float  # of a product
    convolution_dispatch: float  # of a convolution of several samples, whose layouts are turned
    each: float  # of each matrix in a batch of products
    view: float  # of an op that launches nothing
    module: float  # of a call of a module
    autograd: float  # of recording an op, and of finding it again in the backward
    cache: float  # bytes that stay near
    near: float  # bytes per second within the cache
    far: float  # and beyond it, newly allocated
    run: float  # seconds for each stretch of results along which no operand is repeated: ops that broadcast
    reduced: float  # for each result of a sum over a last dim
    normalized: float  # for each row of a layer norm
    product: float  # multiplications and additions per second of a large matrix product
    column: float  # the same of products with one column
    column_each: float  # seconds for each of their results
    turned: float  # with one column, the matrix of columns being a view of one of rows
    row: float  # of products with one row
    row_each: float  # seconds for each of their results
    outer: float  # of products over one element
    convolution: float  # of convolutions with a window
    grouped: float  # of grouped ones
    group: float  # seconds for each of their groups
    scattered: float  # elements per second of copies in short runs: windows, transposed matrices
    gathered: float  # elements per second of functions that are no single instruction: tanh, exp
    threads: int = 1


# One core of an AMD EPYC with AVX-512, torch 2.13, other jobs beside it: of use for ratios alone.
CPU = Rates(
    dispatch=1.1e-6, product_dispatch=2.8e-6, convolution_dispatch=3.5e-5, each=5e-7, view=1e-6, module=9e-7, autograd=2.2e-6,
    cache=3.4e7, near=9e10, far=3.5e9, run=2.5e-9, reduced=4.2e-9, normalized=2.8e-8, product=4.4e10, column=1.3e9, column_each=4.8e-9,
    turned=1.2e10, row=9.5e9, row_each=1.3e-9, outer=3.8e9, convolution=3.5e10,
    grouped=1e10, group=4.4e-6, scattered=2.5e8, gathered=4e8,
)  # fmt: skip
# In the order of magnitude of a large accelerator, not measured: launches hide what is smaller.
ACCELERATOR = Rates(
    dispatch=6e-6, product_dispatch=1e-5, convolution_dispatch=1e-5, each=1e-9, view=1e-6, module=9e-7, autograd=6e-6, cache=4e7,
    near=4e12, far=2e12, run=0.0, reduced=0.0, normalized=0.0, product=2e13, column=5e11, column_each=0.0, turned=5e11, row=5e11,
    row_each=0.0, outer=5e11, convolution=1e13,
    grouped=2e12, group=1e-8, scattered=2e11, gathered=5e11,
)  # fmt: skip
# What is left of the prices per op in what Inductor compiles: of a fused loop, and of a call of a product from its wrapper.
_COMPILED_DISPATCH, _COMPILED_PRODUCT = 2e-7, 2.5e-6
# Work below this is done by one thread, and what each further thread adds.
PARALLEL_SECONDS = 2e-5
SPEEDUP = 0.85
# Of the cache's size: where the bandwidth begins to fall, and where it has fallen.
FALLS = (0.25, 2.0)
# Windows of so many numbers halve the rate of a convolution; runs of fewer elements are copied one by one.
FEW_CHANNELS = 48.0
SHORT_RUN = 16
# Passes over an activation whose gradient is laid out the other way, and the backward of grouped convolutions against their forward.
TURNED = 8.0
GROUPED_BACKWARD = 2.5

_VIEWS = frozenset(
    "view transpose permute movedim unsqueeze squeeze expand select slice_along narrow unbind split chunk unflatten getitem item size t mT "
    "detach view_as expand_as broadcast_to diagonal swapaxes getattr size_of unfold split_with_sizes slice as_strided".split()
)
_PRODUCTS = {"linear": 0, "mm": 0, "matmul": 0, "bmm": 0, "mv": 0, "dot": 0, "baddbmm": 1, "addmm": 1, "addmv": 1}
_GATHERED = frozenset(
    "tanh sigmoid exp log gelu silu softmax log_softmax erf softplus mish elu selu celu sin cos pow sqrt rsqrt logsumexp dropout rand "
    "randn special_expit hardswish logsigmoid scaled_dot_product_attention".split()
)
_SUMS = frozenset({"sum", "mean"})
_CHAINS = frozenset({"sum_of", "prod_of", "min_of", "max_of"})


def rates_of(device: str, compiled: bool = False) -> Rates:
    """The constants for a kind of device."""
    rates = CPU if device == "cpu" else ACCELERATOR
    if not compiled:
        return rates
    rates = replace(rates, view=0.0, module=0.0, autograd=0.0)
    return replace(rates, dispatch=_COMPILED_DISPATCH, product_dispatch=_COMPILED_PRODUCT) if device == "cpu" else rates


def speedup(device: str, rates: Rates) -> float:
    """Of large ops, by the threads that there are now."""
    return 1.0 if device != "cpu" else (max(torch.get_num_threads(), 1) / rates.threads) ** SPEEDUP


def emitted_seconds(graph: torch.fx.Graph, device: str, needs_grad: Mapping[Node, bool] | None, compiled: bool = False) -> float:
    """Of one step of a rewritten program. ``needs_grad``: of its placeholders and ``get_attr`` nodes; None for inference."""
    return _seconds(graph, device, needs_grad, lambda node: node.meta.get("val"), False, compiled)


def loop_seconds(graph: torch.fx.Graph, device: str, needs_grad: Mapping[Node, bool] | None, compiled: bool = False) -> float:
    """Of one step of the loop that a prepared graph was lifted from: each node an op, and each call of a module."""
    frames = {node.meta.get("frame") for node in graph.nodes if node.op == "call_function"}
    return _seconds(graph, device, needs_grad, _recorded, True, compiled) + rates_of(device, compiled).module * len(frames)


def _recorded(node: Node) -> Any:
    shape, dtype = node.meta.get("shape"), node.meta.get("dtype")
    if shape is None or dtype is None:
        return None
    stride = node.meta.get("stride")
    return torch.empty(shape, dtype=dtype, device="meta") if stride is None else _Form(tuple(shape), tuple(stride), dtype)


@dataclass(frozen=True)
class _Form:
    """What is asked of a tensor here."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def numel(self) -> int:
        return math.prod(self.shape)

    def element_size(self) -> int:
        return self.dtype.itemsize

    def stride(self) -> tuple[int, ...]:
        return self.strides


def _seconds(
    graph: torch.fx.Graph, device: str, needs_grad: Mapping[Node, bool] | None, value_of: Callable[[Node], Any], loop: bool, compiled: bool
) -> float:
    rates = rates_of(device, compiled)
    faster, total = speedup(device, rates), 0.0
    tracked: dict[Node, bool] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            tracked[node] = needs_grad is not None and needs_grad.get(node, False)
            continue
        if node.op == "output":
            continue
        operands = list(node.all_input_nodes)
        tracked[node] = any(tracked.get(operand, False) for operand in operands)
        needed = [tracked[operand] for operand in operands]
        total += _op(node, [value_of(operand) for operand in operands], value_of(node), rates, faster, needed, loop, compiled)
    return total


def _op(
    node: Node, given: list[Any], made: Any, rates: Rates, faster: float, tracked: list[bool], loop: bool, compiled: bool
) -> float:
    name = _name(node)
    backwards = sum(tracked)
    if name in _VIEWS or (name in MAY_COPY and (loop or not _copies(name, given, made))):
        return rates.view + (rates.autograd if backwards else 0.0)
    work = _work(node, name, given, made, rates)
    work = work / faster if work > PARALLEL_SECONDS else work
    heavy = name in _PRODUCTS or name.startswith("conv")
    dispatch = rates.product_dispatch if heavy else rates.dispatch
    if name.startswith("conv") and given and len(given[0].shape) > 2 and given[0].shape[0] > 1:
        dispatch = rates.convolution_dispatch
    times = max(len(given) - 1, 1) if name in _CHAINS and loop else 1  # a chain is one op for each of its terms
    seconds = times * dispatch + work
    if heavy and backwards:
        read = zip(node.all_input_nodes, tracked, given, strict=True)
        turned = [form for operand, needed, form in read if needed and _turned(operand, form, compiled)]
        # Inductor walks through such a gradient and what it meets element by element.
        again = sum(form.numel() / rates.scattered if compiled else TURNED * _moved(_bytes([form]), rates) for form in turned)
        slower = GROUPED_BACKWARD if name.startswith("conv") and _groups(node) > 1 else 1.0
        return seconds + rates.autograd + backwards * dispatch + min(backwards, 2) * work * slower + again
    return seconds + (times * (rates.autograd + dispatch) + work if backwards else 0.0)


def _groups(node: Node) -> int:
    """Of a convolution, whose last argument they are in every schema."""
    last = node.kwargs.get("groups", node.args[-1] if len(node.args) > 4 else 1)
    return last if isinstance(last, int) else 1


def _turned(operand: Node, form: Any, compiled: bool) -> bool:
    """Is this activation read across its rows? Its gradient is then laid out so, and all before it are computed on mixed strides.

    ``compiled``: or in any other order than the one in which it lies; op by op such dims are still walked through in runs.
    """
    if form is None or not hasattr(form, "stride") or len(form.shape) < 2:
        return False
    strides = [stride for size, stride in zip(form.shape, form.stride(), strict=True) if size != 1]
    across = form.stride()[-1] != 1 and form.shape[-1] != 1
    if not across and not (compiled and strides != sorted(strides, reverse=True)):
        return False
    root = operand
    while root.op != "get_attr" and len(root.all_input_nodes) == 1 and _name(root) in _VIEWS:
        root = root.all_input_nodes[0]
    return root.op != "get_attr"


def _name(node: Node) -> str:
    if isinstance(node.target, Op):
        return node.target.name
    name = node.target if isinstance(node.target, str) else op_name(node.target)
    return name.rstrip("_") if not name.startswith("__") else name.strip("_")


def _copies(name: str, given: list[Any], made: Any) -> bool:
    """Would a tensor of the given strides have to be copied for this view?"""
    if not given or not isinstance(given[0], torch.Tensor) or not isinstance(made, torch.Tensor):
        return False
    if name == "contiguous":
        return not given[0].is_contiguous()
    try:
        given[0].view(made.shape)
    except (RuntimeError, ValueError):
        return True
    return False


def _bytes(values: Iterable[Any]) -> float:
    return float(sum(value.numel() * value.element_size() for value in values if value is not None and hasattr(value, "numel")))


def _moved(size: float, rates: Rates) -> float:
    """Seconds to read or write so many bytes in all. What an op leaves in the cache pushes out what the ones around it want there: the
    bandwidth begins to fall where one op moves a quarter of the cache, and has fallen at twice its size."""
    fallen = min(max(math.log(size / rates.cache / FALLS[0]) / math.log(FALLS[1] / FALLS[0]), 0.0), 1.0) if size else 0.0
    return size / math.exp(math.log(rates.near) + fallen * math.log(rates.far / rates.near))


def _work(node: Node, name: str, given: list[Any], made: Any, rates: Rates) -> float:
    """Seconds of an op's own work."""
    outputs = list(made) if isinstance(made, (tuple, list)) else [made]
    moved = _moved(_bytes(given) + _bytes(outputs), rates)
    if name in _PRODUCTS:
        factors = given[_PRODUCTS[name] :] if name in ("baddbmm", "addmm", "addmv") else given
        if len(factors) >= 2 and all(factor is not None for factor in factors[:2]):
            return max(moved, _product(name, factors[0], factors[1], made, rates))
    if name.startswith("conv") and len(given) >= 2 and given[1] is not None and made is not None and hasattr(made, "numel"):
        weight = given[1]
        fan = math.prod(weight.shape[1:]) if "transpose" not in name else math.prod(weight.shape[1:]) * weight.shape[0]
        groups = _groups(node)
        work = float(made.numel() * fan)
        efficiency = fan / (fan + FEW_CHANNELS)
        return max(moved, groups * rates.group + work / rates.grouped if groups > 1 else work / (rates.convolution * efficiency))
    if name in MAY_COPY and _in_short_runs(given[0]):
        return max(moved, float(made.numel()) / rates.scattered)
    if name in _GATHERED:
        return max(moved, _bytes(outputs) / 4 / rates.gathered)
    if made is None or not hasattr(made, "numel"):
        return moved
    shapes = [tuple(form.shape) for form in given if hasattr(form, "numel")]
    if name == "layer_norm" and shapes:
        return moved + rates.normalized * float(math.prod(shapes[0][:-1]))
    if name in _SUMS and shapes and tuple(made.shape) in (shapes[0][:-1], (*shapes[0][:-1], 1)):
        return moved + rates.reduced * float(made.numel())
    return moved + rates.run * _runs(shapes, tuple(made.shape))


def _runs(operands: list[tuple[int, ...]], made: tuple[int, ...]) -> int:
    """The stretches of an elementwise op's results along which each operand is either read on or repeated; 0 where it is all one."""
    inner, kept = 1, None
    for back, size in enumerate(reversed(made), 1):
        if size == 1:
            continue
        repeated = [len(shape) < back or shape[-back] != size for shape in operands]
        if any(len(shape) >= back and shape[-back] not in (1, size) for shape in operands):
            return 0  # it is not elementwise
        if kept is not None and repeated != kept:
            return math.prod(made) // max(inner, 1)
        inner, kept = inner * size, repeated
    return 0


def _in_short_runs(source: Any) -> bool:
    """Do few of its elements lie one behind the other?"""
    return bool(len(source.shape)) and (source.stride()[-1] != 1 or source.shape[-1] < SHORT_RUN)


def _product(name: str, left: Any, right: Any, made: Any, rates: Rates) -> float:
    """Seconds of ``[..., N, K] x [..., K, M]``; ``linear``'s matrix is ``[M, K]``."""
    inner = int(left.shape[-1]) if left.shape else 1
    if made is None or not hasattr(made, "numel") or not inner:
        return 0.0
    if name == "linear":
        columns = int(right.shape[0]) if len(right.shape) > 1 else 1
        rows = max(left.numel() // inner, 1)
        turned = True
    else:
        columns = int(right.shape[-1]) if len(right.shape) > 1 else 1
        rows = int(left.shape[-2]) if len(left.shape) > 1 else 1
        turned = len(right.shape) > 1 and right.stride()[-1] != 1
    work = float(made.numel() * inner)
    if columns == 1:
        return work / (rates.turned if turned else rates.column) + rates.column_each * float(made.numel())
    if rows == 1:
        return work / rates.row + rates.row_each * float(made.numel())
    if inner == 1:
        return work / rates.outer
    matrices = float(made.numel() // max(rows * columns, 1))
    return work / rates.product + rates.each * matrices
