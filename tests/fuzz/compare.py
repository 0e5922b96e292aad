"""Is a case's model the same when it is fused? ``check(case)`` fuses it as a user would, and once without fxfuse's own validation.

The truth is another instance of the same class with the same numbers, which fxfuse has never seen.
"""

from __future__ import annotations

import copy
import pickle
import re
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fxfuse

from . import structure
from .calls import Seen, compare, distances, look
from .model import EXAMPLE, Made, build, discard

QUICK: dict[str, Any] = {"objective": "launches", "tune": False}
# What computes in less than float64 in a model of float64.
ATTENTION = re.compile("MultiheadAttention|TransformerEncoder")
DRAWN = re.compile(r"\.normal_\(\)")  # in eval mode as well
NARROW = re.compile(r'float32|\.float\(\)|bfloat16|SAMPLES\["(to|cfloat|type_as|half)"\]')


@dataclass
class Outcome:
    """``status``: "fused", "left" as it is, or "invalid": the model itself does not run. ``problems``: what is wrong, in words."""

    status: str
    problems: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    text: str = ""  # the model's source
    seconds: float = 0.0


def check(case: dict[str, Any]) -> Outcome:
    """Fuse the case's model and compare everything."""
    start = time.perf_counter()
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(case["seed"])
        try:
            made = build(case)
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError, AssertionError) as error:
            return Outcome("invalid", text=f"cannot be written: {error}")
        try:
            outcome = _Check(made).run()
        finally:
            discard(made)
    outcome.text = made.text
    outcome.seconds = time.perf_counter() - start
    return outcome


class _Check:
    def __init__(self, made: Made) -> None:
        self.made, self.case = made, made.case
        self.narrow = NARROW.search(made.text) is not None
        self.problems: list[str] = []
        self.modes = (False,) if made.random else (True, False)

    def run(self) -> Outcome:
        try:
            truth = self.made.model()
        except (RuntimeError, ValueError, TypeError) as error:
            return Outcome("invalid", text=str(error))
        for training in (True, False):
            self._mode(truth, training)
            seen = look(truth, *self.made.arguments(), fused=False)
            if seen.error:
                return Outcome("invalid", text=seen.error)
        outcome = Outcome("left")
        for validate in (False, True):
            fused = self._fused(validate)
            if fused is None:
                break
            report = fxfuse.report(fused)
            outcome.refusals += [str(refusal) for refusal in report.refused]
            if report.fused:
                outcome.status = "fused"
            for refusal in report.refused:
                undone = "the rewritten form differs" in refusal.reason
                if "please report it" in refusal.reason or (undone and not self._chaotic()):
                    self._problem("report", f"{refusal} {' '.join(note for note in report.notes if 'bug report' in note)}")
            self._calls(fused, validate)
            if not validate or not report.fused:
                self._others(fused)
                self._training()
                self._state()
            if self.problems:
                break
        outcome.problems = self.problems
        return outcome

    # -- parts of a check ----------------------------------------------------------------------------------------------

    def _problem(self, where: str, what: str) -> None:
        self.problems.append(f"{where}: {what}")

    def _chaotic(self) -> bool:
        """Does the original itself, in the state it was fused in, answer differently when its last bits change?"""
        for training in self.modes:
            moved = self._noise(training, lambda: self.made.arguments())
            truth = self.made.model()
            self._mode(truth, training)
            seen = look(truth, *self.made.arguments(), fused=False)
            for name, value in seen.numbers.items():
                if value is not None and value.numel() and moved.get(name, 0.0) > 1e-9 * max(value.abs().max().item(), 1e-9):
                    return True
        return False

    def _mode(self, model: nn.Module, training: bool) -> None:
        model.train(training)
        for held in structure.unregistered(model):  # a plain list of modules: ``train`` does not reach them
            held.train(training)
        for change in self.case["changes"]:
            if change[0] == "eval":
                structure.change(model, *change)

    def _fused(self, validate: bool) -> nn.Module | None:
        """The model fused as the case says, the original untouched."""
        options = dict(self.case["options"])
        first_call = options.pop("first_call", False)
        model = self.made.model()
        if any(change[0] == "eval" for change in self.case["changes"]):
            self._mode(model, True)
        before, random = self._facts(model), torch.get_rng_state()
        args, kwargs = self.made.arguments()
        try:
            fused = fxfuse.optimize(model, *(() if first_call else (args,)), **({} if first_call else {"example_kwargs": kwargs or None}),
                                    validate=validate, **QUICK, **options)  # fmt: skip
            if first_call:
                look(fused, args, kwargs, fused=True, grad=False)
                fxfuse.load_original_state_dict(fused, self.made.model().state_dict())  # buffers as they were
        except Exception as error:
            self._problem("optimize", f"raises {type(error).__name__}: {error}")
            return None
        if not torch.equal(torch.get_rng_state(), random) and not first_call:
            self._problem("optimize", "draws random numbers")
        if not options.get("inplace") and not first_call and self._facts(model) != before:
            self._problem("optimize", "changes the original")
        self._state_bits(fused)
        return fused

    def _as_called(self) -> nn.Module:
        """An original after the calls that ``_fused`` made: buffers of modules in plain lists are in no state dict that puts them back."""
        truth = self.made.model()
        if self.case["options"].get("first_call"):
            if any(change[0] == "eval" for change in self.case["changes"]):
                self._mode(truth, True)
            look(truth, *self.made.arguments(), fused=False, grad=False)
            truth.load_state_dict(self.made.model().state_dict())
        return truth

    def _facts(self, model: nn.Module) -> list[Any]:
        tensors = [(name, id(t), t.requires_grad, t._version) for name, t in [*model.named_parameters(), *model.named_buffers()]]
        return [*tensors, *((name, type(m), m.training, len(m._forward_hooks)) for name, m in model.named_modules())]

    def _pairs(self) -> Iterator[tuple[str, int, int]]:
        """Rows and seeds of the calls: the example, other numbers, other batch sizes."""
        rows = self.case["inputs"]["rows"]
        yield "the example", rows, EXAMPLE
        yield "other data", rows, 1
        for n in (7, 2, 1, 0):
            if n != rows:
                yield f"{n} rows", n, 2 + n

    def _calls(self, fused: nn.Module, validate: bool) -> None:
        """The same calls of both, in both modes."""
        self.fused, self.truth = fused, self._as_called()
        for training in self.modes:
            for model in (fused, self.truth):
                self._mode(model, training)
            for label, rows, seed in self._pairs():
                if validate and label not in ("other data", "7 rows"):
                    continue
                where = f"{'validate' if validate else 'no validation'}, {'train' if training else 'eval'}, {label}"
                self._one(where, training, rows, seed)
                if self.problems:
                    return

    def _one(self, where: str, training: bool, rows: int, seed: int, **how: Any) -> None:
        """One call of both. They go on from equal state."""
        dtype = how.pop("dtype", None)
        change = how.pop("change", lambda inputs: inputs)

        def arguments() -> Any:
            return change(self.made.arguments(rows, seed, dtype))

        before = copy.deepcopy(self.truth.state_dict())
        want = look(self.truth, *arguments(), fused=False, **how)
        got = look(self.fused, *arguments(), fused=True, **how)

        def noise() -> dict[str, float]:
            return self._noise(training, arguments, before, how)

        # A dim of size 1 does not tell in what order strides were; torch's attention has others without grad.
        if self.case["inputs"]["rows"] == 1 or ("without grad" in where and ATTENTION.search(self.made.text)):
            for seen in (got, want):
                seen.facts = {name: fact[:3] if isinstance(fact, tuple) else fact for name, fact in seen.facts.items()}
        for said in compare(got, want, noise, self.narrow):
            self._problem(where, said)
        # One of the two may have updated its buffers before it raised, or both by numbers that they drew.
        if (want.error or DRAWN.search(self.made.text)) and not self.problems:
            self._same_state()

    def _same_state(self) -> None:
        fxfuse.load_original_state_dict(self.fused, self.truth.state_dict())

    def _noise(self, training: bool, arguments: Any, state: Any = None, how: dict[str, Any] | None = None) -> dict[str, float]:
        """How far the original's numbers move when its weights and inputs change by a few roundings."""
        how, found = how or {}, dict[str, float]()

        def one(shake: float, seed: int) -> Seen:
            model = self.made.model()
            if state is not None:
                model.load_state_dict(state)
            generator = torch.Generator().manual_seed(seed)

            def shaken(tensor: Tensor) -> Tensor:
                if not (tensor.is_floating_point() or tensor.is_complex()):
                    return tensor
                # As many as there are in memory: an expanded tensor stays one.
                with torch.no_grad():
                    by = 1 + shake * torch.randn((), generator=generator, dtype=torch.float64).item()
                    return (tensor.detach() * by).requires_grad_(tensor.requires_grad)

            with torch.no_grad():
                for parameter in model.parameters():
                    eps = torch.finfo(parameter.dtype).eps * 8 if shake else 0
                    parameter.mul_((1 + eps * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)).to(parameter.dtype))
            self._mode(model, training)
            args, kwargs = torch.utils._pytree.tree_map_only(Tensor, shaken, arguments())
            return look(model, args, kwargs, fused=False, **how)

        plain = one(0.0, 0)
        for seed in (1, 2, 3):
            for name, moved in distances(plain, one(1e-15, seed)).items():
                found[name] = max(found.get(name, 0.0), moved)
        return found

    def _others(self, fused: nn.Module) -> None:
        """Calls as a user makes them besides: without grad, in other dtypes, without what is optional, writing into what came back."""
        if self.problems:
            return
        rows = self.case["inputs"]["rows"]
        for model in (self.fused, self.truth):
            self._mode(model, False)
        self._one("eval, without grad", False, rows, 3, grad=False)
        for write in (0, -1):
            self._one(f"eval, writing into output {write}", False, rows, 3, write=write)
        other = torch.float32 if self.case["inputs"]["dtype"] == "float64" else torch.float64
        self._one("eval, another dtype", False, rows, 3, dtype=other)
        for label, change in CHANGED.items():
            self._one(f"eval, {label}", False, rows, 3, change=change)

    def _training(self) -> None:
        """Three steps of an optimizer each, then the weights."""
        if self.problems or self.made.random:
            return
        fresh = self.made.model()
        self.truth.load_state_dict(fresh.state_dict())
        fxfuse.load_original_state_dict(self.fused, fresh.state_dict())
        kind = self.case["optimizer"]
        each: list[torch.optim.Optimizer] = []
        for model in (self.fused, self.truth):
            self._mode(model, True)
            weights = [p for p in model.parameters() if p.requires_grad]
            if not weights:
                return
            if kind == "adam":
                each.append(torch.optim.Adam(weights, 1e-3, eps=1e-2))
            else:
                each.append(torch.optim.SGD(weights, 1e-3, momentum=0.9 * (kind == "momentum"), weight_decay=0.1 * (kind == "decay")))
        rows = self.case["inputs"]["rows"]
        for step in range(3):
            self._one(f"training, step {step}", True, rows, 20 + step, scale=0.1)
            if self.problems:
                return
            for optimizer in each:
                optimizer.step()
        self._one("after training", True, rows, 30)

    def _state_bits(self, fused: nn.Module) -> None:
        """What is saved by the original's names is the original's, bit for bit."""
        want, got = self.made.model().state_dict(), fxfuse.original_state_dict(fused)
        if list(want) != list(got):
            self._problem("original_state_dict", f"has {list(got)}, the original {list(want)}")
            return
        for name, tensor in want.items():
            if got[name].dtype != tensor.dtype or (not torch.equal(got[name], tensor) and not bool((got[name] != got[name]).any())):
                self._problem("original_state_dict", f"{name} is another")

    def _state(self) -> None:
        """Every form in which the model's state goes out and comes in."""
        if self.problems:
            return
        rows = self.case["inputs"]["rows"]
        other = self.made.model()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(0.75)
        fused = self.fused
        state = other.state_dict()
        self.truth.load_state_dict(state)
        ways = {
            "load_original_state_dict": lambda: (fxfuse.load_original_state_dict(fused, state), fused)[1],
            "its own state_dict": lambda: _through(fused, fused.state_dict(), self.made.model().state_dict()),
            "load_state_dict by the original's names": lambda: (fused.load_state_dict(state), fused)[1],
            "deepcopy": lambda: copy.deepcopy(fused),
            "unfuse": lambda: fxfuse.unfuse(fused),
        }
        try:
            pickle.dumps(other)
            ways["pickle"] = lambda: pickle.loads(pickle.dumps(fused))
        except Exception:  # not every model of these can be pickled
            pass
        for label, way in ways.items():
            try:
                self.fused = way()
                got = fxfuse.original_state_dict(self.fused)
            except Exception as error:
                self._problem(label, f"raises {type(error).__name__}: {error}")
                return
            for name, tensor in state.items():
                if not torch.equal(got[name], tensor) and not bool((tensor != tensor).any()):
                    self._problem(label, f"{name} is another")
            if label == "unfuse" and type(self.fused) is not type(self.truth):
                self._problem(label, f"a {type(self.fused)}")
            for model in (self.fused, self.truth):
                self._mode(model, False)
            hooked = label in ("deepcopy", "unfuse", "pickle") and any(change[0] == "hook" for change in self.case["changes"])
            self._one(f"after {label}", False, rows, 40, grad=not hooked)  # copies of Parameters have no hooks
            self.fused = fused
            if self.problems:
                return
            self.truth.load_state_dict(state)  # calls update buffers
            fxfuse.load_original_state_dict(fused, state)


def _through(fused: nn.Module, saved: dict[str, Tensor], others: dict[str, Tensor]) -> nn.Module:
    """The fused model with its own state loaded, after it held another."""
    saved = copy.deepcopy(saved)
    fxfuse.load_original_state_dict(fused, others)
    fused.load_state_dict(saved)
    return fused


def _without_optional(inputs: Any) -> Any:
    args, kwargs = inputs
    return args[:1], {name: value for name, value in kwargs.items() if name != "z"}


def _as_keywords(inputs: Any) -> Any:
    args, kwargs = inputs
    return (), {**dict(zip(("h", "z"), args)), **kwargs}


def _flipped(inputs: Any) -> Any:
    """Inputs that need a gradient where the example's need none."""
    return torch.utils._pytree.tree_map_only(
        Tensor, lambda t: t.detach().requires_grad_(not t.requires_grad and t.is_floating_point()), inputs
    )  # fmt: skip


def _extra(inputs: Any) -> Any:
    """One more dim in front."""
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.detach().unsqueeze(0), inputs)


def _reshaped(inputs: Any) -> Any:
    """Columns in another memory layout than the example's."""
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.detach().flip(0).mT.contiguous().mT if t.ndim > 1 else t.detach(), inputs)


CHANGED = {
    "without what is optional": _without_optional, "all by name": _as_keywords, "other flags of grad": _flipped, "one more dim": _extra,
    "another layout": _reshaped,
}  # fmt: skip
