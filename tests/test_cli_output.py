"""OUT: written beside, moved when all is right; what stood there comes back when anything fails."""

import os
import stat

import pytest

pytest.importorskip("click")

from fxfuse.cli.failure import CommandError
from fxfuse.cli.output import replacing
from fxfuse.errors import ConvertError


def contents(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def write(path, text, as_folder):
    if as_folder:
        path.mkdir()
        (path / "weights").write_text(text)
        (path / text).write_text(text)
    else:
        path.write_text(text)
        path.with_name(f"{path.name}.data").write_text(text)


@pytest.mark.parametrize("as_folder", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_out_takes_its_place_with_what_lies_beside(as_folder, before, tmp_path):
    if before:
        write(tmp_path / "net", "old", as_folder)
    with replacing(tmp_path / "net") as temporary:
        write(temporary, "new", as_folder)
    names = ["net/weights", "net/new"] if as_folder else ["net", "net.data"]
    assert contents(tmp_path) == dict.fromkeys(names, "new")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
@pytest.mark.parametrize("as_folder", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_whatever_move_fails_all_is_as_before(as_folder, before, error, tmp_path, monkeypatch):
    if before:
        write(tmp_path / "net", "old", as_folder)
    found = contents(tmp_path)
    real, failed = os.replace, 0
    for number in range(10):
        calls = []

        def replace(source, target, number=number, calls=calls):
            calls.append(source)
            if len(calls) == number + 1:
                raise error
            real(source, target)

        monkeypatch.setattr(os, "replace", replace)
        try:
            with replacing(tmp_path / "net") as temporary:
                write(temporary, "new", as_folder)
        except (CommandError, KeyboardInterrupt):
            failed += 1
            assert contents(tmp_path) == found
            assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
        else:
            break
    assert failed == (1 + before if as_folder else 2 * (1 + before))


def test_a_message_names_out_and_not_the_temporary_file(tmp_path):
    with pytest.raises(ConvertError) as caught, replacing(tmp_path / "net.onnx") as temporary:
        raise ConvertError(f"{temporary} is no ONNX model")
    assert str(caught.value) == f"{tmp_path / 'net.onnx'} is no ONNX model"


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_safetensors_have_the_rights_that_new_files_have(mask, tmp_path):
    pytest.importorskip("safetensors")
    import torch

    from fxfuse.convert.packed import save_tensors

    before = os.umask(mask)
    try:
        save_tensors({"x": torch.arange(3)}, tmp_path / "x.safetensors", {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("own", [True, False])
def test_the_weights_of_the_onnx_file_that_stood_there_go_with_it(own, tmp_path):
    out, data = tmp_path / "net.onnx", tmp_path / "net.onnx.data"
    out.write_bytes(b"location net.onnx.data" if own else b"weights inside")
    data.write_bytes(b"weights")
    with replacing(out) as temporary:
        temporary.write_bytes(b"new")
    assert out.read_bytes() == b"new"
    assert data.exists() is not own
