"""Files that are whole or not there, and errors that end a command without a traceback."""

import errno
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_vit_mae.errors import WHAT_TO_DO, UserError, WriteError, exit_on_user_error
from nnunet_vit_mae.storage.files import (
    file_hash,
    inside,
    link,
    locked,
    read_json,
    remove_unfinished,
    replacing,
    set_aside,
    write_json,
)
from nnunet_vit_mae.storage.unfinished import new_folder

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


# ---------- replacing


@pytest.mark.parametrize("name", ["y" * 248 + ".nii.gz", "ü" * 124 + ".nii.gz"])
def test_a_name_may_be_as_long_as_the_file_system_allows(name, tmp_path):
    with replacing(tmp_path / name) as temporary:
        assert temporary.name.endswith(".nii.gz")
        temporary.write_text("new")
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_file_is_replaced_when_the_block_ends(tmp_path):
    file = tmp_path / "plans.json"
    file.write_text("old")
    with replacing(file) as temporary:
        temporary.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    assert list(tmp_path.iterdir()) == [file]


def write_half(file: Path, error: Callable[[], BaseException]) -> None:
    with replacing(file) as temporary:
        temporary.write_text("half of the n")
        raise error()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_block_that_raises_leaves_the_old_file_and_no_other(tmp_path, error):
    file = tmp_path / "plans.json"
    file.write_text("old")
    with pytest.raises(error):
        write_half(file, error)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_block_that_raises_makes_no_file(tmp_path):
    with pytest.raises(RuntimeError):
        write_half(tmp_path / "plans.json", RuntimeError)
    assert list(tmp_path.iterdir()) == []


def test_a_block_that_raises_before_it_writes_leaves_the_old_file(tmp_path):
    file = tmp_path / "plans.json"
    file.write_text("old")
    with pytest.raises(RuntimeError, match="too early"), replacing(file):
        raise RuntimeError("too early")
    assert file.read_text() == "old"


def test_the_temporary_file_lies_beside_the_file_with_its_suffix(tmp_path):
    file = tmp_path / "encoder.safetensors"
    with replacing(file) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".safetensors"
        assert temporary != file
        temporary.touch()


def test_processes_of_one_number_on_two_machines_write_apart(tmp_path):
    file = tmp_path / "plans.json"
    with replacing(file) as one, replacing(file) as other:
        one.write_text("one")
        other.write_text("other")
    assert file.read_text() == "one"
    assert list(tmp_path.iterdir()) == [file]


def test_what_a_killed_process_leaves_is_removed(tmp_path):
    with replacing(tmp_path / "plans.json") as temporary:
        temporary.write_text("half of the n")
        (tmp_path / "kept.json").touch()
        remove_unfinished(tmp_path)
        assert [file.name for file in tmp_path.iterdir()] == ["kept.json"]
        temporary.touch()


def test_hidden_files_of_the_user_stay(tmp_path):
    """Only the names that are written here are temporary files."""
    for name in (".2024-notes.txt", ".7z.rc", ".1_12345678"):
        (tmp_path / name).touch()
    (tmp_path / ".0_old.d").mkdir()
    before = sorted(tmp_path.iterdir())
    remove_unfinished(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_a_link_is_not_written_through(tmp_path):
    """A copy in place of a link would go over the file behind it."""
    for name in ("one", "other"):
        (tmp_path / name).write_text(name)
    link(tmp_path / "one", tmp_path / "link")
    with pytest.raises(FileExistsError):
        link(tmp_path / "other", tmp_path / "link")
    assert (tmp_path / "one").read_text() == "one"


@pytest.mark.parametrize("refusal", [OSError(errno.EPERM, "no links here"), NotImplementedError()])
def test_a_file_is_copied_where_there_are_no_links(tmp_path, monkeypatch, refusal):
    for way in ("symlink_to", "hardlink_to"):
        monkeypatch.setattr(Path, way, Mock(side_effect=refusal))
    (tmp_path / "one").write_text("one")
    link(tmp_path / "one", tmp_path / "copy")
    assert (tmp_path / "copy").read_text() == "one"
    assert not (tmp_path / "copy").is_symlink()


@pytest.mark.parametrize("name", ["case.nii.gz", "plans.json", "fold_0"])
def test_what_is_set_aside_keeps_its_ending(tmp_path, name):
    (tmp_path / name).touch()
    start, _, ending = name.partition(".")
    moved = set_aside(tmp_path / name, tmp_path / "aside")
    assert list((tmp_path / "aside").iterdir()) == [moved]
    assert moved.name.startswith(f"{start}_until_")
    assert moved.name.partition(".")[2] == ending


def test_folders_on_the_way_are_made(tmp_path):
    with replacing(tmp_path / "a" / "b" / "plans.json") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "a" / "b" / "plans.json").read_text() == "new"


def test_others_may_read_a_file_whatever_the_library_chose(tmp_path):
    before = os.umask(0o022)
    try:
        with replacing(tmp_path / "encoder.safetensors") as temporary:
            temporary.write_text("new")
            temporary.chmod(0o600)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "encoder.safetensors").stat().st_mode) == 0o644


def test_the_content_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(str(Path(f"/proc/self/fd/{number}").readlink())))
    with replacing(tmp_path / "plans.json") as temporary:
        temporary.write_text("new")
    assert synced == [str(temporary), str(tmp_path)]


def test_a_refused_write_names_the_file_and_leaves_it(tmp_path):
    file = tmp_path / "plans.json"
    file.write_text("old")
    with pytest.raises(WriteError, match="No space left") as caught:
        write_half(file, partial(OSError, errno.ENOSPC, "No space left on device"))
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(file)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_missing_source_is_not_called_a_refused_write(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, replacing(tmp_path / "copy.json") as temporary:
        shutil.copyfile(tmp_path / "source.json", temporary)
    assert caught.value.filename == str(tmp_path / "source.json")


# ---------- output folders


def test_the_current_folder_can_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "report").mkdir()
    monkeypatch.chdir(tmp_path / "report")
    with new_folder(Path(), {}):
        Path("index.html").touch()
        with pytest.raises(UserError, match="Another process is writing to"), locked(tmp_path / "report"):
            pytest.fail("two at a time")
    with pytest.raises(UserError, match="already exists: give a new folder"), new_folder(Path(), {}):
        pytest.fail("a finished folder is written again")
    assert [file.name for file in (tmp_path / "report").iterdir()] == ["index.html"]


@pytest.mark.parametrize("refusal", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock")])
def test_a_file_system_without_locks_stops_no_command(tmp_path, monkeypatch, caplog, refusal):
    """NFS without its lock service, for instance; the package of locks raises either."""
    monkeypatch.setattr("nnunet_vit_mae.storage.files.FileLock.acquire", Mock(side_effect=refusal))
    with locked(tmp_path / "fold_0"):
        assert f"The file system of {tmp_path / 'fold_0'} has no locks ({refusal})" in caplog.text
    refused = OSError(errno.EACCES, "Permission denied")
    monkeypatch.setattr("nnunet_vit_mae.storage.files.FileLock.acquire", Mock(side_effect=refused))
    with pytest.raises(PermissionError), locked(tmp_path / "fold_0"):
        pytest.fail("a folder that cannot be written")


@pytest.mark.parametrize("call", [lambda path: {"images": path}, lambda path: {"predictions": {"ViT": path}}])
def test_an_unfinished_folder_is_not_gone_on_with_from_a_relative_path_elsewhere(tmp_path, monkeypatch, call):
    """The same words mean other data there."""
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def stopped() -> None:
        with new_folder(tmp_path / "report", call(Path("scans"))):
            (tmp_path / "report" / "case_of_here.png").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        stopped()
    monkeypatch.chdir(tmp_path / "there")
    with (
        pytest.raises(UserError, match="by a call with other arguments"),
        new_folder(tmp_path / "report", call(Path("scans"))),
    ):
        pytest.fail("two cohorts in one report")
    with new_folder(tmp_path / "report", call(Path("../here/scans"))):
        pass


# ---------- names from files


@pytest.mark.parametrize("name", ["case_1", "case 1", "..case", "Fälle", ".hidden", "a..b"])
def test_a_name_becomes_a_path_below_its_root(tmp_path, name):
    assert inside(tmp_path, "imagesTr", name, source="qc.csv") == tmp_path / "imagesTr" / name


@pytest.mark.parametrize("name", ["..", ".", "", "../other", "/etc", "a/b", "a/../../b", "..\\b", "a\0b", None, 3])
def test_a_name_that_leads_elsewhere_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=r"qc\.csv holds .* which is not the name of a file"):
        inside(tmp_path, "imagesTr", name, source="qc.csv")


# ---------- hashes


def test_a_files_hash_is_the_sha_256_of_its_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert file_hash(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# ---------- JSON


@settings(max_examples=40)
@given(content=json_values)
def test_json_comes_back_as_it_was_written(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "round_trip.json"
    write_json(content, file)
    assert read_json(file) == content


def test_json_keeps_the_order_and_is_indented_as_nnunet_does(tmp_path):
    write_json({"b": 1, "a": [2]}, tmp_path / "plans.json")
    assert (tmp_path / "plans.json").read_text() == '{\n    "b": 1,\n    "a": [\n        2\n    ]\n}\n'


def test_content_that_json_cannot_hold_leaves_the_old_file(tmp_path):
    file = tmp_path / "plans.json"
    write_json({"kept": True}, file)
    with pytest.raises(TypeError):
        write_json({"bad": object()}, file)
    assert read_json(file) == {"kept": True}
    assert list(tmp_path.iterdir()) == [file]


def test_missing_json_is_named(tmp_path):
    file = tmp_path / "plans.json"
    with pytest.raises(UserError, match="is missing") as caught:
        read_json(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", '{"a": 1,}', "[1] 2", "plans"])
def test_invalid_json_is_named(tmp_path, text):
    file = tmp_path / "plans.json"
    file.write_text(text)
    with pytest.raises(UserError, match="not valid JSON") as caught:
        read_json(file)
    assert str(file) in str(caught.value)


# ---------- errors


def test_a_user_error_ends_with_code_2_and_one_line_on_stderr(capsys):
    @exit_on_user_error
    def command() -> None:
        raise UserError("the plans have no token: run mae3d_plan.")

    with pytest.raises(SystemExit) as caught:
        command()
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", "Error: the plans have no token: run mae3d_plan.\n")


def test_a_process_shows_no_traceback_of_a_user_error():
    program = (
        "from nnunet_vit_mae.errors import *\n"
        "def command():\n"
        "    try: 1 / 0\n"
        "    except ZeroDivisionError: raise UserError('fix this.')\n"
        "exit_on_user_error(command)()"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout, process.stderr) == (2, "", "Error: fix this.\n")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EIO])
def test_what_the_system_refuses_ends_with_code_2_and_one_line(number, capsys):
    @exit_on_user_error
    def command() -> None:
        raise OSError(number, os.strerror(number), "case.nii.gz")

    with pytest.raises(SystemExit) as caught:
        command()
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("Error: ")
    assert "case.nii.gz" in message
    assert f"({os.strerror(number)}): {WHAT_TO_DO[number]}" in message
    assert message.count("\n") == 1


def test_a_refused_write_says_what_is_kept(tmp_path, capsys):
    with pytest.raises(SystemExit):
        exit_on_user_error(write_half)(tmp_path / "plans.json", partial(OSError, errno.EDQUOT, "Disk quota exceeded"))
    message = capsys.readouterr().err
    assert f"{tmp_path / 'plans.json'} cannot be written (Disk quota exceeded), and is as it was" in message
    assert "larger quota" in message


def test_too_little_memory_ends_with_code_2(capsys):
    with pytest.raises(SystemExit) as caught:
        exit_on_user_error(np.empty)((2**20, 2**20, 2**10))
    assert caught.value.code == 2
    assert "not enough memory (Unable to allocate" in capsys.readouterr().err


def test_a_full_gpu_ends_with_code_2_and_says_what_it_has(capsys):
    import torch

    def step() -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 3.81 GiB of which 12.62 MiB "
            "is free. Including non-PyTorch memory, this process has 3.70 GiB memory in use. Of the allocated memory "
            "3.50 GiB is allocated by PyTorch, and 10.00 MiB is reserved by PyTorch but unallocated."
        )

    with pytest.raises(SystemExit) as caught:
        exit_on_user_error(step)()
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(
        "Error: The memory of the GPU is full (Tried to allocate 2.00 GiB; GPU 0 has a total capacity of 3.81 GiB of "
        "which 12.62 MiB is free): use a smaller batch"
    )


@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyError, KeyboardInterrupt])
def test_other_errors_pass(error, capsys):
    @exit_on_user_error
    def command() -> None:
        raise error("a bug")

    with pytest.raises(error, match="a bug"):
        command()
    assert capsys.readouterr().err == ""


def test_arguments_results_and_names_pass():
    @exit_on_user_error
    def divided(number: int, *, by: int) -> tuple[int, int]:
        """Divide."""
        return divmod(number, by)

    assert divided(17, by=5) == (3, 2)
    assert (divided.__name__, divided.__doc__) == ("divided", "Divide.")
