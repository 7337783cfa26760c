"""New output folders: the same call goes on in one that it has left unfinished, and no other call does."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.storage.files import locked, make_folder, read_json, refuse_in_use, remove_unfinished, write_json

MARK = ".unfinished.json"
AS_ONE_LIKES = ("processes", "device")  # may differ when a call is repeated, for they change no result


@contextmanager
def new_folder(folder: Path, call: Mapping[str, Any]) -> Iterator[None]:
    """Hold a new output folder until the block has ended.

    A block that is stopped, or raises, leaves a mark in the folder, if it has written to it.

    Args:
        folder: The folder, which may exist if it is empty.
        call: All arguments of the call.

    Raises:
        UserError: If the folder holds anything else, if a call with other arguments has left it unfinished, or if
            another process is writing to it.
    """
    mark, content = folder / MARK, {"arguments": _checksum(call)}
    make_folder(folder.parent)
    with locked(folder):
        if mark.is_file():
            if read_json(mark) != content:
                raise UserError(
                    f"{folder} was left unfinished by a call with other arguments: give these, or a new folder with "
                    "-o, or remove it."
                )
            for inner in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
                remove_unfinished(inner)
        else:
            for half_written in folder.glob(f".[0-9]*{MARK}"):
                half_written.unlink()
            refuse_in_use(folder)
            make_folder(folder)
            write_json(content, mark)
        try:
            yield
        except BaseException:
            if not mark.is_file() or any(path != mark for path in folder.iterdir()):
                raise
            mark.unlink()
            with suppress(OSError):
                folder.rmdir()
            raise
        mark.unlink()


def _checksum(call: Mapping[str, Any]) -> str:
    """Return a checksum from which no path can be read."""
    arguments = sorted((name, repr(_absolute(value))) for name, value in call.items() if name not in AS_ONE_LIKES)
    return hashlib.sha256(repr(arguments).encode()).hexdigest()


def _absolute(value: Any) -> Any:
    """Return an argument with paths that mean the same in every folder where the command is typed."""
    if isinstance(value, Mapping):
        return {key: _absolute(inner) for key, inner in value.items()}
    return value.resolve() if isinstance(value, Path) else value
