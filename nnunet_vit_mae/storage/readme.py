"""The `README.txt` of an output folder: which command wrote it, when, and what each file in it is."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from nnunet_vit_mae import __version__
from nnunet_vit_mae.storage.files import write_file

README = "README.txt"
BEGINNING = "Written by nnunet-vit-mae "
HIDDEN = "..."


def write_readme(folder: Path, contents: Mapping[str, str], *, private: Iterable[Path | None] = ()) -> None:
    """Write `README.txt` with the command that runs, unless somebody else's file has this name.

    Args:
        folder: The folder.
        contents: What there is in it, or may be, by name; folders end with a slash.
        private: Paths whose names may identify people; dots stand for them in the command.
    """
    file = folder / README
    if file.exists() and not file.read_text(encoding="utf-8", errors="replace").startswith(BEGINNING):
        return
    width = max(map(len, contents))
    lines = [
        f"{BEGINNING}{__version__} on {datetime.now():%Y-%m-%d}, by the command",
        "",
        f"    {typed_command(sys.argv, private)}",
        "",
        *(f"{name:{width}}  {meaning}" for name, meaning in contents.items()),
    ]
    write_file("\n".join(lines) + "\n", file)


def typed_command(arguments: Sequence[str], private: Iterable[Path | None] = ()) -> str:
    """Return a command as it was typed, without the place of the program.

    >>> typed_command(["/opt/bin/mae3d_check", "-d", "501", "-o", "a folder"])
    "mae3d_check -d 501 -o 'a folder'"
    >>> typed_command(["mae3d_convert", "-i", "/scans/jane", "--key=k.csv"], [Path("/scans/jane"), Path("k.csv")])
    'mae3d_convert -i ... --key=...'
    """
    program, *rest = arguments
    names = {path for path in private if path is not None}
    shown = []
    for argument in rest:
        flag, sign, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
        shown.append(f"{flag}{sign}{HIDDEN}" if value and Path(value) in names else argument)
    return shlex.join([Path(program).name, *shown])
