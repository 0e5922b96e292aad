"""The README's support table, from the rules: which ops, joins and forks are covered.

Comes in: the register of rules. Goes out: Markdown. ``python -m fxfuse.passes.rules.table README.md`` writes it between the two
markers there.
"""

from __future__ import annotations

import sys

from . import FAMILIES
from .base import RULES

BEGIN, END = "<!-- rules: begin -->", "<!-- rules: end -->"
# How a person writes what only the passes call by such a name; None: nobody does.
_WRITTEN = {
    "sum_of": "`sum`, `+`", "prod_of": "`*`", "min_of": "`torch.minimum` chains", "max_of": "`torch.maximum` chains",
    "select": "`x[:, i]`, `select`, `unbind`", "slice_along": "`x[:, a:b]`, `narrow`, `split`, `chunk`", "as_slot": "`out[:, i] = y`",
    "item": "outputs by index or name", "size": None, "size_add": None, "size_sub": None, "size_mul": None,
}  # fmt: skip


def table() -> str:
    """One row per family of rules; joins and forks first.

    >>> "`linear`" in table()
    True
    """
    rows = sorted((_kind_order(family), _row(family)) for family in FAMILIES)
    lines = ["| | What is covered | Ops |", "|---|---|---|", *(row for _, row in rows if row)]
    rest = "every op whose schema is tagged pointwise; any other op that `torch.vmap` can batch runs as one call of it"
    return "\n".join([*lines, f"| ops | All others | {rest} |"])


def written(readme: str) -> str:
    """The text of README with the table as it is now. Raises ``ValueError`` where the markers are missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no {BEGIN} and {END} in the text")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def _kind(family: object) -> str:
    return str(getattr(family, "KIND", "ops"))


def _kind_order(family: object) -> tuple[int, str]:
    return ("joins", "forks", "ops").index(_kind(family)), str(getattr(family, "__name__", ""))


def _row(family: object) -> str:
    name = getattr(family, "__name__", "")
    names = [op for op, rule in RULES.items() if rule.vectorize.__module__ == name]
    ops = [text for text in (_WRITTEN.get(op, f"`{op}`") for op in names) if text]
    title = (getattr(family, "__doc__", None) or "").split("\n\n")[0].replace("\n", " ").partition(". ")[0].rstrip(".")
    title = title.replace("|", "/").replace("``", "`")
    return f"| {_kind(family)} | {title} | {', '.join(ops)} |" if ops else ""


if __name__ == "__main__":
    if len(sys.argv) > 1:
        with open(sys.argv[1], encoding="utf-8") as file:
            text = file.read()
        with open(sys.argv[1], "w", encoding="utf-8") as file:
            file.write(written(text))
    else:
        print(table())
