"""Files that are either complete or absent: everything is written to a temporary file and then renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nnunet_vit_mae.errors import UserError


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, and rename it to `file` when the block ends without an error."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{os.getpid()}.{file.name}")  # some writers choose the format by the suffix
    try:
        yield temporary
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files of processes killed within `replacing`; nothing may be writing to the folder."""
    for file in folder.glob(".[0-9]*.*"):
        file.unlink()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep all other processes out of this block for the same folder, which may be moved and need not exist.

    The lock belongs to the process, on Linux, macOS and Windows, so that a killed process leaves none behind.

    Raises:
        UserError: If another process holds the lock.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"Another process is writing to {folder}: wait until it has finished, or stop it.") from None
    try:
        yield
    finally:
        lock.release()


def link(source: Path, file: Path) -> None:
    """Put a file into another folder, without a copy of its content where the system allows it."""
    source = source.resolve()
    for linked in (file.symlink_to, file.hardlink_to):
        with suppress(OSError, NotImplementedError):
            return linked(source)
    shutil.copyfile(source, file)
    return None


def write_json(content: Any, file: Path) -> None:
    """Write JSON as nnU-Net does: indented, keys in the given order."""
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")


def read_json(file: Path) -> Any:
    """Read JSON; raises `UserError` if the file is missing or is not JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} is missing.") from None
    except IsADirectoryError:
        raise UserError(f"{file} is a folder, but must be a JSON file.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid JSON ({error}).") from None


def make_folder(folder: Path) -> None:
    """Create an output folder; raises `UserError` if that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be created ({error.strerror}): choose another folder with -o.") from None


def refuse_in_use(folder: Path) -> None:
    """Raise `UserError` if `folder` is a file or a folder that is not empty."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} already exists: give a new folder with -o, or remove it.")
