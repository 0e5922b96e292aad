"""OUT on a command line: written under a temporary name beside it, and renamed when it is known to be right.

Comes in: the path that the user gave. Goes out: a path to write to. What stood at OUT stays until the new file or folder is complete;
whatever ends the command before that (an exception, Ctrl-C, SIGTERM, a full disk) leaves OUT as it was, and nothing beside it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fxfuse.errors import ConvertError

from . import codes
from .failure import CommandError, said

FILES = (".aoti.pt2", ".pt2", ".onnx", ".safetensors")
# Endings that people try, and which would otherwise name a folder.
_NO_FOLDERS = set(".pt .pth .bin .ckpt .pkl .pb .tflite .h5 .json .zip .npz .trt .engine .onx .py .so".split())
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def ending(out: Path) -> str:
    """The ending that says what to write; empty for a folder.

    >>> ending(Path("net.aoti.pt2")), ending(Path("runs/v1.2"))
    ('.aoti.pt2', '')
    """
    return next((each for each in FILES if out.name.lower().endswith(each)), "")


def check_out(out: Path, endings: tuple[str, ...] | None = None, *, owned: str = "", parts: tuple[str, ...] = ()) -> None:
    """Raise ``CommandError`` where OUT cannot be written, before anything expensive is done.

    ``endings``: what a file must end in; None: any of ``FILES``, or a folder. ``owned``: the name of a file that tells folders of
    ours from other people's, which are not replaced. ``parts``: names of files in folders of ours, which are not replaced one by one.
    """
    wanted = ending(out) if endings is None else next((each for each in endings if out.name.lower().endswith(each)), "")
    if endings is not None and not wanted:
        raise CommandError(f"-o {out} must end in {' or '.join(endings)}", codes.USAGE)
    if not wanted and out.suffix.lower() in _NO_FOLDERS:
        raise CommandError(f"-o {out}: {out.suffix} is not written: end it in {', '.join(FILES)}, or name a folder", codes.USAGE)
    parent = out.absolute().parent
    if not out.name or out.name in (".", ".."):
        raise CommandError(f"-o {out}: name a new folder or a file", codes.USAGE)
    if not parent.exists():
        raise CommandError(f"the folder {parent} does not exist: make it first (mkdir -p {parent})", codes.OUTPUT)
    if not parent.is_dir():
        raise CommandError(f"{parent} is no folder: choose another -o", codes.OUTPUT)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CommandError(f"no permission to write in {parent}: choose another -o", codes.OUTPUT)
    if owned and (parent / owned).is_file() and out.name in parts:
        raise CommandError(f"-o {out} would replace a part of a folder that fxfuse wrote: choose another -o", codes.OUTPUT)
    if wanted and out.is_dir():
        raise CommandError(f"{out} is a folder: remove it, or choose another -o", codes.OUTPUT)
    if wanted and out.exists() and not out.is_file():
        raise CommandError(f"{out} is a pipe or a device, which no file takes the place of: choose another -o", codes.OUTPUT)
    if not wanted and out.exists():
        if not out.is_dir():
            how = f"add an ending ({', '.join(FILES)}) or choose another -o"
            raise CommandError(f"{out} is a file, and a folder would be written: {how}", codes.OUTPUT)
        if any(out.iterdir()) and not (owned and (out / owned).is_file()):
            raise CommandError(f"{out} holds other files, which would be lost: choose another -o", codes.OUTPUT)


def check_apart(out: Path, **given: str | None) -> None:
    """Raise ``CommandError`` where OUT is what the command reads, and would be lost. ``given``: by name of the option."""
    for name, path in given.items():
        if path and out.exists() and os.path.exists(path) and out.samefile(path):
            what = "SOURCE" if name == "source" else f"the --{name} file"
            raise CommandError(f"-o {out} is {what} itself, which would be lost: choose another -o", codes.OUTPUT)


def check_room(out: Path, size: int) -> None:
    """Raise ``CommandError`` where the disk has no room for ``size`` bytes and a little more, before minutes of work."""
    free = shutil.disk_usage(out.absolute().parent).free
    if free < size * 1.1 + (1 << 20):
        raise CommandError(f"{out} needs about {size:,} bytes, and the disk has {free:,}: make room, or choose another -o", codes.OUTPUT)


@contextlib.contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A path of the same name in a temporary folder beside OUT. On leaving, it becomes OUT; on an exception, it goes.

    Files that were written next to it (the weights of a large ONNX file) come along. Raises ``CommandError`` where the disk is full
    or writing is not allowed.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.absolute().parent))
    except OSError as error:
        raise CommandError(_cannot(out, error), codes.OUTPUT) from None
    try:
        try:
            yield folder / out.name
            left = _left_behind(folder, out)
            _move(folder, out)
            if left is not None:
                left.unlink(missing_ok=True)
        except ConvertError as error:  # says what is wrong with the file that it was given
            raise type(error)(str(error).replace(str(folder / out.name), str(out))) from None
        except OSError as error:
            raise CommandError(_cannot(out, error), codes.OUTPUT) from None
        except RuntimeError as error:  # torch's zip writer says no more than where it stopped
            if _is_full(folder) or "PytorchStreamWriter" in str(error) or "inline_container" in str(error):
                raise CommandError(f"{out} cannot be written, the disk is full or a limit was reached: make room", codes.OUTPUT) from None
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _left_behind(folder: Path, out: Path) -> Path | None:
    """The weights beside the ONNX file that stands at OUT, where they are its own and the new file has none."""
    data = out.with_name(f"{out.name}.data")
    if ending(out) != ".onnx" or not (out.is_file() and data.is_file()) or (folder / data.name).exists():
        return None
    return data if data.name.encode() in out.read_bytes() else None


def _move(folder: Path, out: Path) -> None:
    """All that was written to its place: first what lies beside OUT. What stood there waits in ``folder`` until the last is done."""
    made = [*sorted(path for path in folder.iterdir() if path.name != out.name), folder / out.name]
    aside = Path(tempfile.mkdtemp(dir=folder))
    places = [out.absolute().parent / path.name for path in made]
    try:
        for path, place in zip(made, places, strict=True):
            if place.exists() and (len(made) > 1 or place.is_dir()):  # one file takes another's place at once
                os.replace(place, aside / place.name)
            os.replace(path, place)
    except BaseException:
        for path, place in zip(made, places, strict=True):
            if not path.exists():
                os.replace(place, path)
            if (aside / place.name).exists():
                os.replace(aside / place.name, place)
        raise


def _is_full(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return shutil.disk_usage(folder).free < 1 << 16
    return False


def _cannot(out: Path, error: OSError) -> str:
    if error.errno in _FULL:
        return f"{out} cannot be written, the disk is full or a limit was reached ({error.strerror}): make room"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{out} cannot be written ({error.strerror}): choose another -o"
    return f"{out} cannot be written: {said(error)}"
