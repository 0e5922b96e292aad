"""The work of ``fxfuse convert``: fuse, write, load again, compare, rename.

Comes in: a model and an example call. Goes out: OUT, which is what was verified; what was written, the report, the verdict in words.
Order: the model's answers to fresh calls are kept; it is fused, written under a temporary name, and let go; what was written is loaded
again and gives the same answers; then it becomes OUT.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import fxfuse
from fxfuse import convert as files
from fxfuse.convert import Written
from fxfuse.convert.folder import WEIGHTS
from fxfuse.convert.manifest import original_of
from fxfuse.convert.packed import TensorFile, read_manifest
from fxfuse.models import inputs as fresh
from fxfuse.models.determinism import same_bits
from fxfuse.weights.lane import by_original_name
from fxfuse.weights.large import LARGE, weight_bytes

from . import codes
from .compare import Expected, compare, expected, fresh_calls
from .exported import Exported
from .failure import CommandError
from .freed import give_back_memory
from .fusing import fuse
from .options import Asked
from .output import check_room, replacing
from .prepare import Subject, set_mode
from .screen import Stage


def write(subject: Subject, asked: Asked, out: Path, static: bool, stage: Stage) -> tuple[Written, fxfuse.Report, str]:
    """Fuse, write, load again, compare, rename. Returns what was written, the report on the fused model and the verdict in words."""
    stage("running the original")
    call = subject.call
    static = static or (isinstance(subject.model, Exported) and subject.model.static)
    calls = fresh_calls(call, seed=asked.seed, other_batches=not static)
    wanted = expected(subject.model, calls, seed=asked.seed)
    if not wanted[0].answers:
        raise CommandError(f"{subject.name} returns no tensor and no number: there is nothing to write, or to compare")
    if len(wanted) < 3 and not static and len(calls) > 2:  # the source itself is for one batch size
        static = True
    if not static and fresh.batch_size(*call) == 1:  # torch.export takes a size of 1 for a constant
        call = fresh.resample(*call, batch=4, seed=asked.seed)
    check_room(out, weight_bytes(subject.model))
    stage("fusing")
    large = weight_bytes(subject.model) > LARGE
    fused = fuse(subject, asked, inplace=large)
    set_mode(fused, asked.mode == "train")
    report = fxfuse.report(fused)
    if large:
        give_back_memory()
    with replacing(out) as temporary:
        written = files.write(fused, None, call, temporary, static=static, progress=stage)
        stage("loading it again")
        if written.kind == "safetensors":
            return written, report, _same_weights(temporary, fused, fused if large else subject.model)
        if written.kind == "folder":
            _same_weights(temporary / WEIGHTS, fused, fused if large else subject.model)
        if large and written.kind in ("aoti", "onnx"):
            _let_go(fused, wanted)
        subject.model = fused = nn.Module()  # what was written shall stand alone, and a large model is not there twice
        if large:
            give_back_memory()
        again = files.load(temporary, allow_pickle=written.kind == "aoti")  # ours, of this moment
        stage("comparing")
        result = compare(wanted, again, seed=asked.seed)
        if not result.ok:
            values_agree = all(row.ok for row in result.rows if row.name != "the call")
            hint = "; --static writes one batch size" if values_agree and not static else ""
            if written.kind == "onnx" and asked.mode == "train":
                hint = "; onnxruntime draws its own dropout, which cannot be compared: leave --mode train out, or write a .pt2"
            raise CommandError(f"{out} was not written: what was loaded again is {result.sentence()}{hint}", codes.DIFFERENT)
    return written, report, result.sentence()


def _let_go(model: nn.Module, wanted: list[Expected]) -> None:
    """Free the weights' memory under whoever holds them, as torch's compiler and its ONNX exporter do. ``wanted`` may be views of them."""
    kept = {leaf.untyped_storage().data_ptr() for each in wanted for leaf in each.answers.values() if isinstance(leaf, torch.Tensor)}
    for parameter in model.parameters():
        storage = parameter.untyped_storage()
        if storage.resizable() and storage.data_ptr() not in kept:
            storage.resize_(0)


def _same_weights(path: Path, fused: nn.Module, original: nn.Module) -> str:
    """Packed weights hold no program to run: bit for bit, the file holds the packs, and these by its recipes the original's checkpoint.

    The file is read in parts, and lanes are views of the packs: nothing is in memory twice.
    """
    packs = fused.state_dict()
    manifest = read_manifest(path)
    rows = {name: len(pack) if pack.ndim else 1 for name, pack in packs.items() if name not in manifest["same"]}
    wrong: list[str] = []
    for name, start, part in TensorFile(path).parts():
        pack = packs.get(name)
        own = pack[start : start + len(part)] if pack is not None and part.ndim else pack
        if own is None or not same_bits(part, own.cpu()):
            wrong.append(name)
        else:
            rows[name] -= len(part) if part.ndim else 1
    with by_original_name():
        wanted = {name: tensor for name, tensor in original.state_dict().items() if isinstance(tensor, torch.Tensor)}
    found = original_of(manifest, packs)
    wrong += [name for name, tensor in wanted.items() if name not in found or not same_bits(found[name], tensor)]
    wrong += [*(name for name, missing in rows.items() if missing), *sorted(found.keys() - wanted.keys())]
    if wrong:
        raise CommandError(f"{path.name} was not written: read again, {', '.join(dict.fromkeys(wrong))} differ", codes.DIFFERENT)
    return f"equal: {len(wanted)} tensors of the checkpoint, bit for bit"
