"""One subject: fused with ``objective="launches"``, compared with a model that fxfuse never saw, counted.

Comes in: a ``Subject``. Goes out: facts, told as they are found. What is compared: outputs, input gradients, every parameter's gradient,
buffers, in train and eval mode, on fresh data, other batch sizes and lengths, and with a mask where forward takes one. In float64 to
1e-10; a model that computes in float32 somewhere inside, to float32's rounding. What draws random numbers without dropout (a random mask)
is said to, and not judged where it does. Where gradients alone differ, and the original's are not its derivatives by finite differences,
it is doubtful which model is wrong: it is neither right nor wrong.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

import checks
import fxfuse
from census.subject import Inputs, Subject, Tell
from fxfuse.launches import count
from fxfuse.weights import packing
from zoo.check import FLOOR, RTOL, SINGLE, compare, differences

ROWS, LENGTH = 3, 7
TRIALS = ((ROWS, LENGTH, 2), (5, LENGTH, 3), (1, LENGTH, 4), (ROWS, 11, 5))  # rows, length, seed
COARSE = 64 * torch.finfo(torch.float32).eps


class Precisions(TorchFunctionMode):
    """The floating dtypes that a call computes in."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.seen.add(out.dtype)
        return out

    @property
    def narrow(self) -> bool:
        """Does it compute in anything narrower than float64?"""
        return any((d.is_floating_point or d.is_complex) and d not in (torch.float64, torch.complex128) for d in self.seen)


def judge(subject: Subject, tell: Tell) -> None:
    """All there is to know of one subject; raises what building raises, and what fxfuse should not have raised."""
    tell({"stage": "prepare"})
    prepared = subject.prepare(tell)
    tell({**prepared.facts, "stage": "reference"})
    model, reference = prepared.build(), prepared.build()
    given = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    args, kwargs = prepared.inputs(ROWS, LENGTH, 1)
    tell({"modules": sum(1 for _ in model.modules()), "stage": "optimize"})
    start = time.process_time()  # on one thread: what others do on the machine does not count
    fused = fxfuse.optimize(model, args or None, example_kwargs=kwargs or None, objective="launches", tune=False)
    tell({"seconds": round(time.process_time() - start, 2), "stage": "count"})
    report = fxfuse.report(fused)
    tell({
        "regions": len(report.fused), "ops": sum(len(plan.ops) for plan in report.fused), "refused": [str(each) for each in report.refused],
        "failed": [str(each) for each in report.refused if "fxfuse failed" in str(each)], "notes": report.notes, "facts": report.facts,
        "stages": {name: round(seconds, 2) for name, seconds in report.stages.items()},
    })  # fmt: skip
    wrong = [f"the original's {n} was changed" for n, t in model.state_dict().items() if not _same(t, given[n])]
    wrong += [f"{n} as fused is another" for n, t in packing.original_state_dict(fused).items() if not _same(t, given[n])]
    before, after = (_launches(each, args, kwargs) for each in (reference, fused))
    tell({"launches": [before.total, after.total], "heavy": [before.heavy, after.heavy], "bound": before.bound, "stage": "compare"})
    tell({"wrong": wrong})
    _compare(reference, fused, [prepared.inputs(*trial) for trial in TRIALS], [other() for other in prepared.others], tell, wrong)
    tell({"fallbacks": dict(fxfuse.report(fused).fallbacks), "stage": "done"})


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other) or (one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num()))


def _launches(model: nn.Module, args: Any, kwargs: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        return count(lambda: model.eval()(*args, **kwargs))


def _compare(
    reference: nn.Module, fused: nn.Module, trials: list[Inputs], others: list[Inputs], tell: Tell, wrong: list[str]
) -> None:  # fmt: skip
    """``others`` come last: a model may put hooks on itself to answer them."""
    compared = refused = 0
    unsteady: list[str] = []
    doubtful: list[str] = []
    for number, (inputs, training) in enumerate([(i, t) for group in (trials, others) for t in (True, False) for i in group]):
        precision = _precision(reference, inputs, training)
        _precision(fused, inputs, training)  # what a call leaves behind (a cache), it leaves in both
        rtol, floor = (SINGLE, COARSE) if precision is None or precision.narrow else (RTOL, FLOOR)
        found = compare(reference, fused, inputs, training, rtol=rtol, floor=floor) if precision is not None else None
        if found is None:  # the original refuses it, forward or backward
            refused += 1
            continue
        compared += 1
        sizes = [tuple(t.shape) for t in tree_flatten(inputs)[0] if isinstance(t, Tensor)]
        said = [f"{'train' if training else 'eval'}, call {number} {sizes}: {each}" for each in found]
        if said and not _steady(reference, inputs, training):
            unsteady += said
        elif said and all(": gradient of" in each for each in said) and not _differentiates(reference, inputs, training):
            doubtful += said
        else:
            wrong += said
    tell({"doubtful": doubtful[:5]})
    tell({"compared": compared, "not accepted": refused, "unsteady": unsteady[:20], "wrong": wrong[:20], "all wrong": len(wrong)})


def _precision(model: nn.Module, inputs: Inputs, training: bool) -> Precisions | None:
    """What the original computes in; None where it refuses the call."""
    precisions = Precisions()
    saved = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with torch.no_grad(), precisions:
            model.train(training)(*inputs[0], **inputs[1])
    except Exception:  # the model's own refusal, whatever it is
        return None
    finally:
        _restore(model, saved)
    return precisions


def _steady(model: nn.Module, inputs: Inputs, training: bool) -> bool:
    """Does the model answer the same whatever the random state?"""
    saved = {name: buffer.clone() for name, buffer in model.named_buffers()}
    runs = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        try:
            with torch.no_grad():
                runs.append(tree_flatten(checks.plain(model.train(training)(*inputs[0], **inputs[1])))[0])
        except Exception:  # refused: there is nothing to be unsteady
            return True
        finally:
            _restore(model, saved)
    return not differences("output", range(len(runs[0])), runs[1], runs[0], 1e-5)


def _differentiates(model: nn.Module, inputs: Inputs, training: bool) -> bool:
    """Are the original's own gradients its derivatives, in one random direction? (torch 2.13's are not for all layouts of one row.)"""
    random = torch.Generator().manual_seed(8)
    model.train(training)
    saved = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gradients = checks.run(model, *inputs, checks.own_gradients).parameters
    held = dict(model.named_parameters())
    steps = {n: torch.randn(p.shape, generator=random, dtype=torch.float64).to(p.dtype) for n, p in held.items() if p.is_floating_point()}
    expected = sum(float((g.double() * steps[n].double()).sum()) for n, g in gradients.items() if g is not None and n in steps)

    def loss(factor: float) -> float:
        _restore(model, saved)
        with torch.no_grad():
            kept = {n: held[n].clone() for n in steps}
            for n, step in steps.items():
                held[n].add_(step, alpha=factor)
            leaves = tree_flatten(checks.plain(model(*inputs[0], **inputs[1])))[0]
            for n, values in kept.items():
                held[n].copy_(values)
        cotangents = torch.Generator().manual_seed(7)  # as in checks.run
        floats = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        return sum(float((leaf * torch.randn(leaf.shape, generator=cotangents, dtype=torch.float64)).sum()) for leaf in floats)

    found = (loss(1e-6) - loss(-1e-6)) / 2e-6
    _restore(model, saved)
    return abs(found - expected) <= 1e-3 * max(abs(found), abs(expected))


def _restore(model: nn.Module, saved: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in saved and saved[name].shape == buffer.shape:
                buffer.copy_(saved[name])


def sentence(refusal: str) -> str:
    """A refusal without the names, numbers and lines of one model, to count it by.

    >>> sentence("layers.0.mlp stays out of the lanes next to it: weight [16, 1] against [8, 1] (model.py:41)")
    '~ stays out of the lanes next to it: weight [#, #] against [#, #]'
    """
    text = re.sub(r" \([\w<>-]+(\.py)?:\d+\)", "", refusal)
    text = re.sub(r"(?<![\w.])(?:\w+\.)*\w*\.\d+(?:\.\w+)*|(?<![\w.])\d+(?:\.[A-Za-z_]\w*)+", "~", text)
    return re.sub(r"\b\d+(\.\d+)?(e[-+]?\d+)?\b", "#", text)


def counted(records: list[dict[str, Any]]) -> Counter[str]:
    """Refusals by sentence: how many subjects say it."""
    return Counter(said for record in records for said in {sentence(each) for each in record.get("refused", ())})
