"""The JSON of an exported program, checked: names become source text, and expressions are evaluated, when torch loads it.

Comes in: the parsed JSON. Goes out: nothing, or ``ConvertError``. What torch does with it (2.13): ``target`` is found by attribute from
``torch``, ``operator`` or ``math`` (``torch.os.system`` would be); ``expr_str`` goes through ``sympy.sympify``, which evaluates;
``guards_code`` is put into a function by ``exec``; names of nodes and attributes are printed into the source of a ``torch.fx`` module; the
specs of containers may import any module. So what is allowed is listed here, and all else refused.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any, NoReturn

import torch

from fxfuse.errors import ConvertError, FxfuseError
from fxfuse.private.schemas import HigherOrderOperator
from fxfuse.running.known_functions import known_function

from .archives import TRUST
from .specs import strings

_NAME = re.compile(r"[A-Za-z_][A-Za-z_0-9]*\Z")
_PATH = re.compile(r"[^\"'\\\x00-\x1f\x7f(){};=#`]*\Z")  # of a tensor: keys of a ModuleDict may be any text, within reason
_SYMBOL = re.compile(r"[A-Za-z_0-9]*\Z")
_SPACES = ("aten", "prims", "higher_order")
_NO_OPERATORS = ("from_file", "save", "load")  # these open files
_SYM = tuple("sym_int sym_float sym_not sym_max sym_min sym_ite sym_sum sym_sqrt sym_fresh_size".split())
_FUNCTIONS = frozenset(
    "Symbol Integer Float Rational Add Mul Pow Mod Max Min Abs Eq Ne Gt Ge Lt Le Equality Unequality GreaterThan LessThan "
    "StrictGreaterThan StrictLessThan And Or Not Piecewise ExprCondPair Tuple floor ceiling FloorDiv ModularIndexing Where "
    "PythonMod CleanDiv CeilToInt FloorToInt CeilDiv LShift RShift PowByNatural FloatPow FloatTrueDiv IntTrueDiv TruncToFloat "
    "TruncToInt RoundToInt RoundDecimal ToFloat IsNonOverlappingAndDenseIndicator Identity BitwiseFn_bitwise_and "
    "BitwiseFn_bitwise_or max min abs true false int_oo oo L".split()
)
_METHODS = ("size", "stride", "storage_offset", "shape", "ndim", "dim", "isnan", "inf")
_NODES = (
    *(ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.UAdd, ast.Compare, ast.Eq, ast.NotEq),
    *(ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow),
    *(ast.Call, ast.keyword, ast.Name, ast.Load, ast.Constant, ast.Subscript, ast.Attribute, ast.Tuple, ast.Is, ast.IsNot),
)
# Text that torch keeps as text: where a node came from, and arguments that are strings.
_TEXT = frozenset(("metadata", "as_string", "as_strings", "torch_version"))
_EXPRESSIONS = frozenset(("expr_str",))


def check_program(path: Path, program: Any) -> None:
    """Raise ``ConvertError`` where the program has a name, a function or an expression that torch's own exporter does not write."""
    _walk(path, program, "", "")


def _walk(path: Path, value: Any, key: str, above: str) -> None:
    if key in _TEXT:
        return
    if isinstance(value, dict):
        for name, item in value.items():
            # keys of tables by name (tensors, symbols) are names themselves
            _need(path, _PATH, name, "a name")
            _walk(path, item, name, key)
    elif isinstance(value, list):
        for item in value:
            _walk(path, item, key, above)
    elif isinstance(value, str):
        _text(path, value, key, above)


def _text(path: Path, text: str, key: str, above: str) -> None:
    if key == "target":
        _check_target(path, text)
    elif key in _EXPRESSIONS:
        _check_expression(path, text, methods=False)
    elif key == "guards_code":
        _check_expression(path, text, methods=True)
    elif key in ("in_spec", "out_spec"):
        check_spec(path, text)
    elif key in ("name", "as_name", "graph_name"):
        if text and not _NAME.match(text):
            _need(path, _PATH, text, "a name")
            _refuse(path, f"the name {text[:80]!r}")
    else:
        _need(path, _PATH, text, "a name")


def _check_target(path: Path, target: str) -> None:
    parts = target.split(".")
    if not all(map(_NAME.match, parts)):
        _refuse(path, f"a call of {target[:80]!r}")
    allowed = False
    if parts[:2] == ["torch", "ops"] and len(parts) in (4, 5) and parts[2] in _SPACES and parts[3] not in _NO_OPERATORS:
        if parts[2] == "higher_order":
            allowed = isinstance(getattr(torch.ops.higher_order, parts[3], None), HigherOrderOperator) and len(parts) == 4
        else:
            allowed = _known("torch.ops", f"{parts[2]}::{'.'.join(parts[3:])}")
    elif parts[0] == "torch" and len(parts) == 2:
        allowed = parts[1] in _SYM or (parts[1].startswith("_sym_") and parts[1][1:] in _SYM)
    elif parts[0] in ("_operator", "math") and len(parts) == 2:
        allowed = parts[1] not in ("attrgetter", "methodcaller", "setitem", "delitem") and _known(parts[0], parts[1])
    if not allowed:
        _refuse(path, f"a call of {target[:80]!r}")


def _known(module: str, name: str) -> bool:
    try:
        known_function(module, name)
    except FxfuseError:
        return False
    return True


def _check_expression(path: Path, text: str, *, methods: bool) -> None:
    if len(text) > 10_000 or any(sign in text for sign in '"\\\n\r`;{}@'):
        _refuse(path, f"the expression {text[:80]!r}")
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError):
        _refuse(path, f"the expression {text[:80]!r}")
    text_in = _PATH if methods else _SYMBOL  # sympy evaluates strings inside of expressions too
    for node in ast.walk(tree):
        bad = not isinstance(node, _NODES)
        if isinstance(node, ast.Attribute):
            bad = not methods or node.attr not in _METHODS
        elif isinstance(node, ast.Call):
            bad = not isinstance(node.func, ast.Name if not methods else ast.Name | ast.Attribute)
            bad = bad or (isinstance(node.func, ast.Name) and node.func.id not in _FUNCTIONS)
        elif isinstance(node, ast.Name):
            bad = not (node.id in _FUNCTIONS or node.id in ("math", "True", "False") or re.fullmatch(r"[a-z]+\d+", node.id))
        elif isinstance(node, ast.Subscript):
            bad = not methods
        elif isinstance(node, ast.Constant):
            constant = node.value
            bad = not (text_in.match(constant) if isinstance(constant, str) else isinstance(constant, int | float | None))
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):  # 9**9**9
            bad = not isinstance(node.right, ast.Constant) or not isinstance(node.right.value, int) or abs(node.right.value) > 64
        if bad:
            _refuse(path, f"the expression {text[:80]!r}")


def check_spec(path: Path, text: str) -> None:
    """Containers of the call and of the result: see ``specs``."""
    if not text:
        return
    protocol = json.loads(text)
    if not isinstance(protocol, list) or len(protocol) != 2:
        _refuse(path, "a container of an unknown form")
    for key in strings(path, protocol[1]):
        _need(path, _PATH, key, "a key")


def _need(path: Path, allowed: re.Pattern[str], text: str, what: str) -> None:
    if len(text) > 2_000 or not allowed.match(text):
        _refuse(path, f"{what} that is no name, {text[:80]!r}")


def _refuse(path: Path, what: str) -> NoReturn:
    raise ConvertError(f"{path}: its program has {what}, which could run code; {TRUST}")
