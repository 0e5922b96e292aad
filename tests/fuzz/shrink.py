"""Make a failing case small: drop what can be dropped while it still fails in the same way."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Iterator
from typing import Any

from .compare import Outcome, check

PLAIN: dict[str, Any] = {
    "before": [], "after": [], "again": None, "changes": [], "options": {}, "optimizer": "sgd", "seed": 0,
    "inputs.dtype": "float64", "inputs.layout": "plain", "inputs.container": "", "inputs.keywords": False, "inputs.optional": False,
    "inputs.grad": True, "inputs.rows": 4, "loop.lanes": 2, "loop.shape": [2], "loop.fork": "shared", "loop.join": "stack",
    "loop.style": "for", "loop.odd": None, "loop.chain": False,
}  # fmt: skip


def signature(outcome: Outcome) -> str:
    """What two failures of one cause have in common: the first problem without its numbers and names."""
    if not outcome.problems:
        return ""
    text = re.sub(r"'[^']*'|\"[^\"]*\"|[\w.]*\d[\w.]*|\[[^\]]*\]|\([^)]*\)", "", outcome.problems[0].partition("bug report")[0])
    return re.sub(r"(gradient of|buffer) .*?:", r"\1:", re.sub(r"\s+", " ", text))[:160]


def shrink(case: dict[str, Any], budget: float = 60.0) -> dict[str, Any]:
    """The smallest case found within ``budget`` seconds that fails as this one does."""
    start, wanted = time.monotonic(), signature(check(case))
    best, again = case, True
    while again:
        again = False
        for smaller in _smaller(best):
            if time.monotonic() - start > budget:
                return best
            if signature(check(smaller)) == wanted:
                best, again = smaller, True
                break
    return best


def _smaller(case: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for path, value in PLAIN.items():
        other = copy.deepcopy(case)
        owner = other
        *parents, last = path.split(".")
        for parent in parents:
            owner = owner[parent]
        if owner[last] != value:
            owner[last] = copy.deepcopy(value)
            yield other
    for path in _lists(case):
        found = _at(case, path)
        for index in range(len(found)):
            other = copy.deepcopy(case)
            del _at(other, path)[index]
            yield other
    for path in _loops(case["loop"], ("loop",)):
        for key, value in {name.partition(".")[2]: value for name, value in PLAIN.items() if name.startswith("loop.")}.items():
            if _at(case, path)[key] != value:
                other = copy.deepcopy(case)
                _at(other, path)[key] = value
                yield other
    for path in _lists(case):
        for index, step in enumerate(_at(case, path)):
            for inner in [item for item in step if isinstance(item, list) and item and isinstance(item[0], list)]:
                other = copy.deepcopy(case)
                _at(other, path)[index : index + 1] = inner
                yield other
    for path in _lists(case):
        for index, step in enumerate(_at(case, path)):
            if list(step) != ["linear", 2]:
                other = copy.deepcopy(case)
                _at(other, path)[index] = ["linear", 2]
                yield other


def _at(case: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        case = case[key]
    return case


def _lists(case: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Where lists of steps (or changes) are."""
    found: list[tuple[Any, ...]] = [("before",), ("after",), ("changes",)]

    def steps(value: Any, path: tuple[Any, ...]) -> None:
        found.append(path)
        for index, step in enumerate(value):
            for place, item in enumerate(step):
                if isinstance(item, dict):
                    steps(item["body"], (*path, index, place, "body"))
                elif isinstance(item, list) and item and isinstance(item[0], list):
                    steps(item, (*path, index, place))

    steps(case["loop"]["body"], ("loop", "body"))
    return found


def _loops(loop: dict[str, Any], path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Where loops inside of loops are."""
    for index, step in enumerate(loop["body"]):
        for place, item in enumerate(step):
            if isinstance(item, dict):
                inner = (*path, "body", index, place)
                yield inner
                yield from _loops(item, inner)
