"""``.onnx``: by torch.onnx's exporter of torch.export programs; run by onnxruntime.

Comes in: a fused model; a path. Goes out: the file (weights of more than 100 MB beside it), checked by onnxruntime; a callable that
takes what the model takes. The file's metadata say how a call is taken apart into its inputs.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.errors import ConvertError
from fxfuse.private.pytree import tree_flatten

from .onnx_graph import copies_as_views
from .onnx_results import name_results, with_constants, without_constants
from .packages import need
from .program import Example, export, silent
from .structure import flattened, put_together, structure_of

_KEY = "fxfuse"
# Bytes of weights that go to a file beside the model: protobuf holds less than 2 GiB, and writes what it holds from a second copy.
_LARGE = 100_000_000
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def write_onnx(model: nn.Module, example: Example, path: Path, *, static: bool) -> list[str]:
    """Write the model, and let onnxruntime read it (a large one: when it is loaded)."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        need(package, "writing .onnx")
    notes: list[str] = []
    program = copies_as_views(export(model, example, static=static, notes=notes))
    signature = _signature(program)
    signature["returned"] = without_constants(program)
    held = [value for value in (*program.state_dict.values(), *program.constants.values()) if isinstance(value, Tensor)]
    large = sum(value.numel() * value.element_size() for value in held) > _LARGE
    with silent():
        try:
            made = torch.onnx.export(program, (), dynamo=True, verbose=False, optimize=True)
            assert made is not None
            name_results(made.model, signature["out"], signature["returned"])
            made.model.metadata_props[_KEY] = json.dumps(signature)
            made.save(path, external_data=large)
        except (OSError, MemoryError):
            raise
        except Exception as error:
            raise ConvertError(f"torch.onnx cannot export the model ({_reason(error)[:300]}): write a .pt2") from error
    del made, program
    if not large:  # else it waits for ``load``: onnxruntime's copy beside the model is what the memory may not hold
        load_onnx(path)
    return [*notes, f"weights in {path.name}.data"] if large else notes


def _reason(error: BaseException) -> str:
    """What the exporter stumbled over: it is what its own error, which gives advice to developers of torch, came from."""
    while error.__cause__ is not None:
        error = error.__cause__
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {_COLOUR.sub('', first)}"


def _signature(program: torch.export.ExportedProgram) -> dict[str, Any]:
    """How a call is taken apart: its containers, and of each leaf None for a tensor, else its name and the value that is in the file."""
    spec = program.call_spec
    given: list[Any] = []
    for argument in _user_inputs(program):
        constant = isinstance(argument, torch.export.graph_signature.ConstantArgument)
        plain = constant and isinstance(argument.value, bool | int | float | str | None)
        given.append([argument.name, argument.value] if plain else [argument.name] if constant else None)
    return {"in": structure_of(spec.in_spec), "given": given, "out": structure_of(spec.out_spec)}


def _user_inputs(program: torch.export.ExportedProgram) -> list[Any]:
    kinds = torch.export.graph_signature.InputKind
    return [each.arg for each in program.graph_signature.input_specs if each.kind in (kinds.USER_INPUT,)]


class OnnxModel:
    """An ONNX file as a callable of tensors, by onnxruntime on the CPU; without gradients."""

    def __init__(self, session: Any, signature: Any) -> None:
        self.session, self.signature = session, signature
        self.inputs = {each.name: each.type for each in session.get_inputs()}
        self.outputs = [each.name for each in session.get_outputs()]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model's forward takes and gives."""
        tensors = self._inputs(args, kwargs)
        given = {name: value.detach().cpu().contiguous().numpy() for name, value in zip(self.inputs, tensors, strict=True)}
        results: list[Any] = [torch.from_numpy(value) for value in self.session.run(None, given)]
        if self.signature is not None and "returned" in self.signature:
            results = with_constants(results, self.signature["returned"])
        if self.signature is None or self.signature["out"] is None:
            return results[0] if len(results) == 1 else tuple(results)
        return put_together(self.signature["out"], results)

    def _inputs(self, args: Any, kwargs: Any) -> list[Tensor]:
        if self.signature is None or self.signature["in"] is None:
            leaves, _ = tree_flatten((args, kwargs))
        else:
            leaves = flattened(self.signature["in"], (args, kwargs))
            for leaf, given in zip(leaves, self.signature["given"], strict=True):
                if given is not None and len(given) == 2 and leaf != given[1]:
                    raise ConvertError(f"the ONNX model was written for {given[0]}={given[1]!r}, {leaf!r} came: write it again for that")
        found = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if len(found) != len(self.inputs):
            raise ConvertError(f"the ONNX model takes {len(self.inputs)} tensors ({', '.join(self.inputs)}), {len(found)} came")
        return found


def load_onnx(path: Path) -> OnnxModel:
    """The file as a callable. Raises ``ConvertError`` for a file that onnxruntime does not read."""
    runtime = need("onnxruntime", "running .onnx")
    need("numpy", "running .onnx")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    beside = path.with_name(f"{path.name}.data")
    if beside.is_file() and beside.stat().st_size > _LARGE:
        options.add_session_config_entry("session.disable_prepacking", "1")  # no second copy of the weights
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        text = session.get_modelmeta().custom_metadata_map.get(_KEY)
        return OnnxModel(session, None if text is None else json.loads(text))
    except MemoryError:
        raise
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        advice = ": onnxruntime lacks it in float64 or bfloat16, write the model in float32" if "NOT_IMPLEMENTED" in reason else ""
        raise ConvertError(f"{path} is no ONNX model that onnxruntime runs ({type(error).__name__}: {reason[:300]}){advice}") from error
