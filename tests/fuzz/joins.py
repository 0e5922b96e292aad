"""How the lanes' results come together: lines before the loop, in it (the lane's result is ``y``), and after it, which leave it in ``h``.

``{i}`` is the lane, ``{g}`` how many, ``{t}`` the first size of a result's rows, ``{rest}`` its other sizes, ``{x}`` a tensor that
the lanes were given.
"""

from __future__ import annotations

from typing import NamedTuple

from .source import Shape


class Join(NamedTuple):
    """Where there is no ``before``, results are collected in the list ``ys``; ``h`` still is the lanes' input."""

    after: str
    before: str = ""
    inside: str = ""
    shape: str = "same"  # of the result: see ``joined_shape``


JOINS = {
    "cat": Join("h = torch.cat(ys, 1)", shape="wide"),
    "stack": Join("h = torch.stack(ys, 1)", shape="stacked"),
    "sum": Join("h = sum(ys)"),
    "cat_last": Join("h = torch.cat(ys, dim=-1)", shape="last"),
    "stack_last": Join("h = torch.stack(ys, dim=-1)", shape="behind"),
    "mean": Join("h = sum(ys) / len(ys)"),
    "stack_mean": Join("h = torch.stack(ys).mean(0)"),
    "stack_max": Join("h = torch.stack(ys, -1).amax(-1)"),
    "accumulated": Join("h = total", "total = 0", "total = total + y"),
    "added": Join("h = total", "total = {x}.new_zeros({x}.shape[0], {t}{rest})", "total += y"),
    "weighted": Join("h = total", "total = 0.0", "total = total + 0.5 ** {i} * y"),
    "subtracted": Join("h = total", "total = 0", "total = y - total"),
    "prod": Join("h = math.prod(ys)"),
    "maximum": Join("h = functools.reduce(torch.maximum, ys)"),
    "minimum": Join("h = functools.reduce(torch.minimum, ys)"),
    "written": Join("h = out", "out = {x}.new_zeros({x}.shape[0], {g}, {t}{rest})", "out[:, {i}] = y", shape="stacked"),
    "filled": Join(
        "h = out", "out = torch.empty({x}.shape[0], {g} * {t}{rest}, dtype={x}.dtype)", "out[:, {i} * {t} : ({i} + 1) * {t}] = y", "wide"
    ),
    "strided": Join("h = out", "out = torch.ones({x}.shape[0], {g} * {t}{rest}, dtype={x}.dtype)", "out[:, {i} :: {g}] = y", shape="wide"),
    "partly": Join("h = out", "out = {x}.new_zeros({x}.shape[0], {g} + 2, {t}{rest})", "out[:, {i} + 1] = y", shape="more"),
    "added_into": Join("h = out", "out = {x}.new_ones({x}.shape[0], {g}, {t}{rest})", "out[:, {i}] += y", shape="stacked"),
    "growing": Join("h = out", "out = {x}.new_zeros({x}.shape[0], 0{rest})", "out = torch.cat([out, y], 1)", shape="wide"),
    "interleaved": Join("h = torch.stack(ys, 2).flatten(1, 2)", shape="wide"),
    "ratio": Join("h = ys[0] / (1 + sum(y.abs() for y in ys[1:]))"),
    "softmax": Join("h = (torch.stack(ys, 1).softmax(1) * torch.stack(ys, 1)).sum(1)"),
    "some": Join("h = ys[0] * ys[-1]"),
    "last": Join("h = ys[-1]"),
    "reversed": Join("h = torch.cat(ys[::-1], 1)", shape="wide"),
    "twice": Join("h = torch.cat([*ys, sum(ys)], 1)", shape="more_wide"),
    "hstack": Join("h = torch.hstack(ys) * 2", shape="wide"),
    "std": Join("h = torch.stack(ys, 0).std(0, unbiased=False)"),
    "pairs": Join("h = sum(a * b for k, a in enumerate(ys) for b in ys[k + 1 :])"),
    # only where nothing follows: no tensor, or no rows in front
    "list": Join("h = ys", shape="other"),
    "tuple": Join("h = tuple(ys)", shape="other"),
    "dict": Join('h = {f"y{k}": y for k, y in enumerate(ys)}', shape="other"),
    "nested": Join('h = {"all": ys, "total": [sum(ys), (ys[0], None)]}', shape="other"),
    "record": Join('h = Record((f"y{k}", y) for k, y in enumerate(ys))', shape="other"),
    "dataclass": Join("h = Out(ys[0], ys[1:])", shape="other"),
    "pair": Join("h = Pair(torch.stack(ys), ys[0])", shape="other"),
    "parts": Join("h = torch.stack(ys).unbind(0)", shape="other"),
    "cat_rows": Join("h = torch.cat(ys)", shape="other"),
    "stack_rows": Join("h = torch.stack(ys)", shape="other"),
    "with_input": Join("h = ({x}, ys, {x}[..., :1])", shape="other"),
    "rows_of_input": Join("h = ({x}.transpose(1, -1).reshape(-1), ys, {x}[:, 0].contiguous())", shape="other"),
    "beside_input": Join("h = [y.mean() + {x} for y in ys]", shape="other"),
    "turned": Join("h = (ys, ys[0].transpose(0, -1).reshape(-1), [y.mT.contiguous() for y in ys])", shape="other"),
    "squared": Join("h = [y.square().mean() for y in ys]", shape="other"),
}  # fmt: skip

TENSORS = [name for name, join in JOINS.items() if join.shape != "other"]


def joined_shape(join: Join, shape: Shape, lanes: int) -> Shape:
    """The rows of the joined tensor."""
    first, rest = shape[0], shape[1:]
    return {
        "same": shape, "wide": (lanes * first, *rest), "more_wide": ((lanes + 1) * first, *rest), "stacked": (lanes, *shape),
        "more": (lanes + 2, *shape), "last": (*shape[:-1], lanes * shape[-1]), "behind": (*shape, lanes), "other": shape,
    }[join.shape]  # fmt: skip
