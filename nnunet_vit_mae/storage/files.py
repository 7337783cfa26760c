"""Files that are either complete or absent: everything is written to a temporary file and then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from filelock import FileLock, Timeout

from nnunet_vit_mae.errors import UserError, WriteError

logger = logging.getLogger(__name__)

UNTIL = "_until_"  # in the names of what was set aside
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
LONGEST_NAME = 255  # bytes of a file's name on nearly all file systems


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, and rename it to `file` when the block ends without an error.

    The content is on the disk before the name is, so that no crash leaves a file that is not whole; whoever may read
    new files of this user may read it.

    Raises:
        WriteError: If the system refuses to write; `file` is then as it was before.
    """
    # some writers choose the format by the suffix; a number of a process is unique on its machine only
    start = f".{os.getpid()}_{secrets.token_hex(4)}."
    end = os.fsencode(file.name)[-(LONGEST_NAME - len(start)) :].decode(errors="ignore")
    temporary = file.with_name(start + end)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        mode = _mode_of_new_file(temporary)
        yield temporary
        if stat.S_IMODE(temporary.stat().st_mode) != mode:
            temporary.chmod(mode)  # some libraries write files that only their owner can read
        _sync(temporary)
        temporary.replace(file)
        _sync(file.parent)
    except Exception as error:
        if refusal := _refusal(error, file, temporary):
            raise refusal from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _mode_of_new_file(file: Path) -> int:
    """Return the permissions that a new file gets here, which leaves none behind."""
    file.touch()
    try:
        return stat.S_IMODE(file.stat().st_mode)
    finally:
        file.unlink()


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync no folders
            raise
    finally:
        os.close(descriptor)


def read_back_otherwise(temporary: Path) -> OSError:
    """Return the error for a file that a library has written without one, and that does not read back as written."""
    return _reason_not_to_grow(temporary) or OSError(
        errno.EIO, "it does not read back as it was written", str(temporary)
    )


def _refusal(error: Exception, file: Path, temporary: Path) -> WriteError | None:
    """Return what the system has refused, if that is why a file was not written.

    Libraries that write files themselves report a full disk with errors of their own.
    """
    reason = _reason_not_to_grow(temporary) if temporary.exists() else None
    if isinstance(error, OSError) and error.errno:  # writing to an open file names none
        reason = error if error.filename in (None, str(temporary), str(file.parent)) else None
    return WriteError(reason.errno, reason.strerror, str(file)) if reason else None


def _reason_not_to_grow(file: Path) -> OSError | None:
    """Return why the system does not let a file grow: a full disk, a quota, or a limit on the size of files."""
    try:
        with file.open("ab") as stream:
            stream.write(bytes(2**20))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        return error
    return None


def inside(root: Path, *names: object, source: object) -> Path:
    """Return the path of names below a folder; each is one part of it, such as the name of a case.

    Every name that was read from a file becomes a path here. Symbolic links below `root` are followed as ever.

    Args:
        root: The folder.
        names: One name for each level below it.
        source: The file that the names are from, for the message.

    Raises:
        UserError: If a name leads elsewhere, or is not valid.

    Example:
        >>> inside(Path("raw"), "imagesTr", "case_1.nii.gz", source="qc.csv").as_posix()
        'raw/imagesTr/case_1.nii.gz'
    """
    path = root
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0") or Path(name).name != name:
            raise UserError(
                f"{source} holds {name!r}, which is not the name of a file or folder in {root}: correct it."
            )
        path /= name
    return path


def remove_unfinished(folder: Path, name: str = "*") -> None:
    """Remove the temporary files of processes killed within `replacing`, which nothing may be writing.

    `name` is that of the file that they were to become.
    """
    for file in folder.glob(f".[0-9]*_{'[0-9a-f]' * 8}.{name}"):  # and no other hidden file, which may be the user's
        file.unlink()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep all other processes out of this block for the same folder, which may be moved and need not exist.

    The lock belongs to the process, on Linux, macOS and Windows, so that a killed process leaves none behind. Some
    network file systems have no locks: there the log asks the user to take care of that.

    Raises:
        UserError: If another process holds the lock.
    """
    place = folder.resolve()  # "." has no name
    place.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(place.with_name(f".{place.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"Another process is writing to {folder}: wait until it has finished, or stop it.") from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in WITHOUT_LOCKS:
            raise
        logger.warning(
            "The file system of %s has no locks (%s): let no other process write to it at the same time.", folder, error
        )
    try:
        yield
    finally:
        lock.release()


def link(source: Path, file: Path) -> None:
    """Put a file into another folder, without a copy of its content where the system allows it."""
    source = source.resolve()
    for linked in (file.symlink_to, file.hardlink_to):
        try:
            return linked(source)
        except FileExistsError:  # a copy would go through a link that is there, and over the file behind it
            raise
        except (OSError, NotImplementedError):
            continue
    shutil.copyfile(source, file)
    return None


def write_file(content: str | bytes, file: Path) -> None:
    """Write bytes, or text in UTF-8; the file is complete or absent."""
    with replacing(file) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(content: Any, file: Path) -> None:
    """Write JSON as nnU-Net does: indented, keys in the given order."""
    write_file(json.dumps(content, indent=4) + "\n", file)


def set_aside(path: Path, folder: Path | None = None) -> Path:
    """Rename a file or folder so that another can take its name; returns the new path, such as `fold_0_until_DATE`.

    It stays in its folder, unless another one is given.
    """
    ending = "" if path.is_dir() else ".nii.gz" if path.name.endswith(".nii.gz") else path.suffix
    name = f"{path.name.removesuffix(ending)}{UNTIL}{datetime.now():%Y-%m-%d_%H-%M-%S-%f}{ending}"
    folder = folder or path.parent
    folder.mkdir(exist_ok=True)
    return path.rename(folder / name)


def short_hash(text: str, digits: int) -> str:
    """Return the first hexadecimal digits of the SHA-256 of a text: they tell contents apart, and names stay short."""
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def file_hash(file: Path) -> str:
    """Return the SHA-256 of a file, as plans record it."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def without_paths(content: Any) -> Any:
    """Return the content of JSON with file names in place of absolute paths.

    >>> without_paths({"encoder": {"file": "/home/me/encoder.safetensors"}, "share": "1/2"})
    {'encoder': {'file': 'encoder.safetensors'}, 'share': '1/2'}
    """
    if isinstance(content, dict):
        return {without_paths(key): without_paths(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_paths(value) for value in content]
    if isinstance(content, str):
        for kind in (PurePosixPath, PureWindowsPath):
            if kind(content).is_absolute():
                return kind(content).name
    return content


def read_json(file: Path) -> Any:
    """Read JSON; raises `UserError` if the file is missing or is not JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} is missing.") from None
    except IsADirectoryError:
        raise UserError(f"{file} is a folder, but must be a JSON file.") from None
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, endless numbers, endless brackets
        raise UserError(f"{file} is not valid JSON ({error}): correct it, or write it again.") from None


def make_folder(folder: Path) -> None:
    """Create an output folder; raises `UserError` if that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be created ({error.strerror}): choose another folder with -o.") from None


def refuse_in_use(folder: Path, flag: str = "-o") -> None:
    """Raise `UserError` if `folder`, which the user gave with a flag, is a file or a folder that is not empty."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} already exists: give a new folder with {flag}, or remove it.")
