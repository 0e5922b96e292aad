"""A name for everything that a plan hangs on: where two are equal, what was measured for one holds for the other.

Comes in: a region's prepared graph, what is asked for, and the inputs that are timed. Goes out: a SHA-256 in hex of a canonical text: the
device and its threads, the versions, the options, every node's op, attributes, shapes and dtypes, the kinds of the modules in the region,
and the sizes of the inputs. Names of weights, source lines and numbers in tensors are not part of it. None where there is no such text: an
object in it is told by its address.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.fx
from torch import nn

from fxfuse.ops import Op
from fxfuse.options import Options
from fxfuse.passes.packs import Packs
from fxfuse.passes.vectorize import Prepared
from fxfuse.private.pytree import tree_flatten

from .workbench import Case

# What is known of a node that decides what may be written for it.
_FACTS = (
    *("shape", "dyn", "dtype", "device", "stride", "own_shape", "out_stride"),
    *("requires_grad", "untracked", "unread", "alone", "distinct", "update", "late"),
)
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+|object at ")


def fingerprint(prepared: Prepared, region: nn.Module, packs: Packs, options: Options, cases: Sequence[Case]) -> str | None:
    """The key of the plan for this region; equal models on equal machines have equal ones."""
    devices = sorted({str(node.meta["device"]) for node in prepared.lifted.graph.nodes if node.meta.get("device") is not None})
    lines = [
        *_environment(),
        *(device_name(torch.device(device)) for device in devices or ["cpu"]),
        repr((options.mode, options.objective, options.lowering, options.max_memory, options.packing)),
        repr((prepared.min_lanes, prepared.single, prepared.merge, prepared.together, sorted(map(repr, prepared.skipped)))),
        repr([(op, count) for op, count, _ in prepared.factored]),
        *_graph(prepared, region, packs),
        " ".join(f"{type(module).__module__}.{type(module).__qualname__}" for module in list(region.modules())[1:]),
        *(repr(sizes_of(case)) for case in cases),
    ]
    text = "\n".join(lines)
    return None if _ADDRESS.search(text) else hashlib.sha256(text.encode()).hexdigest()


def combined(parts: Iterable[str]) -> str:
    """One key for several texts, in their order."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def sizes_of(values: Any) -> list[Any]:
    """What a plan needs to know of inputs: of tensors their form, of anything else its text."""
    return [
        (tuple(leaf.shape), leaf.stride() if leaf.layout is torch.strided else None, str(leaf.dtype), leaf.requires_grad)
        if isinstance(leaf, torch.Tensor) else repr(leaf)
        for leaf in tree_flatten(values)[0]
    ]  # fmt: skip


def device_name(device: torch.device) -> str:
    """The hardware, its threads and capabilities: ``cpu Intel(R) Xeon(R) ..., AVX512, 2 threads``."""
    if device.type == "cpu":
        return f"cpu {_processor()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"cuda {properties.name}, {properties.multi_processor_count} multiprocessors, {torch.version.cuda or torch.version.hip}"
    return device.type


@functools.cache
def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.lower().startswith(("model name", "hardware", "cpu model")):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _environment() -> list[str]:
    from fxfuse import __version__

    switches = (
        torch.get_float32_matmul_precision(), torch.backends.mkldnn.enabled, torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(), str(torch.get_default_dtype()),
    )  # fmt: skip
    return [torch.__version__, __version__, _sources(), repr(switches)]


@functools.cache
def _sources() -> str:
    """The rules and the planner themselves: a plan of yesterday's says nothing of lowerings that were written today."""
    digest = hashlib.sha256()
    here = Path(__file__).resolve().parents[1]
    for path in sorted([*here.glob("**/*.py"), *(here / "passes").glob("**/*.py")]):
        try:
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        except OSError:
            continue
    return digest.hexdigest()


def _graph(prepared: Prepared, region: nn.Module, packs: Packs) -> list[str]:
    numbers: dict[torch.fx.Node, int] = {}
    names: dict[str, int] = {}
    lines: list[str] = []
    for node in prepared.lifted.graph.nodes:
        numbers[node] = len(numbers)
        facts = [_text(node.meta.get(fact), numbers) for fact in _FACTS]
        what = node.op
        if node.op == "get_attr":
            target = str(node.target)
            held = "constant" if target in prepared.lifted.constants else packs.kinds.get(target, "")
            what = f"get_attr {names.setdefault(target, len(names))} {held} {target in packs.unpackable}"
        elif node.op == "call_module":
            module = region.get_submodule(str(node.target))
            what = f"call_module {type(module).__qualname__} {module!r}"
        elif isinstance(node.target, Op):
            what = f"{node.target.name}.{node.target.overload}"
        elif node.op == "call_function":
            what = f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__qualname__', repr(node.target))}"
        lines.append(f"{what} {_text(node.args, numbers)} {_text(dict(node.kwargs), numbers)} {' '.join(facts)}")
    return lines


def _text(value: Any, numbers: dict[torch.fx.Node, int]) -> str:
    if isinstance(value, torch.fx.Node):
        return f"%{numbers[value]}"
    if isinstance(value, (list, tuple)):
        return f"({','.join(_text(item, numbers) for item in value)})"
    if isinstance(value, (set, frozenset)):
        return f"{{{','.join(sorted(_text(item, numbers) for item in value))}}}"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key!r}:{_text(item, numbers)}' for key, item in value.items())}}}"
    if isinstance(value, slice):
        return f"slice{_text((value.start, value.stop, value.step), numbers)}"
    return repr(value)
