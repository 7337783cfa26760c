"""Files that are either whole or not there: everything is written beside its place and then renamed into it."""

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
    """Give a temporary path to write to, and rename it to `file` when the block ends without an error."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{os.getpid()}.{file.name}")  # the suffix stays: some writers choose a format by it
    try:
        yield temporary
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what processes left behind that were killed within `replacing`; none may be writing to the folder."""
    for file in folder.glob(".[0-9]*.*"):
        file.unlink()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep all other processes out of this block for the same folder, which may be moved or not even be there.

    The lock belongs to the process, on Linux, macOS and Windows: one that was killed leaves none behind. Raises
    `UserError` when another process holds it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"Another process is writing to {folder}: wait for its end, or stop it.") from None
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
    """Write JSON as nnU-Net does (indented, in the order given)."""
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")


def read_json(file: Path) -> Any:
    """Read JSON; raises `UserError` when the file is missing or not JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} is missing.") from None
    except IsADirectoryError:
        raise UserError(f"{file} is a folder, but a JSON file is expected there.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid JSON ({error}).") from None


def make_folder(folder: Path) -> None:
    """Make a folder that is written to; raises `UserError` when that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}): choose another place with -o.") from None


def refuse_in_use(folder: Path) -> None:
    """Raise `UserError` for a folder that has something in it."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} is in use: give a new folder with -o, or remove it.")
