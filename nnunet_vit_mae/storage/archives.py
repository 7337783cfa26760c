"""Archives: zip files whose members have checksums and are not compressed, so that none holds more than one sees.

An archive may come from anybody. Whatever is wrong with it is found before a byte of it is used.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.storage.files import replacing

MANIFEST = "manifest.json"
FORMAT = "nnunet-vit-mae model 1"
MOST_MEMBERS = 1000
LARGEST_TEXT = 2**26  # bytes of a JSON member
ENCRYPTED = 0x1
DATE = (1980, 1, 1, 0, 0, 0)  # the earliest that zip knows: equal members give equal archives


def write_archive(members: Iterable[tuple[str, bytes]], file: Path) -> None:
    """Write an archive of members, name and content; the file is complete or absent."""
    hashes = {}
    with replacing(file) as temporary, ZipFile(temporary, "w", ZIP_STORED) as archive:
        for name, content in members:
            hashes[name] = hashlib.sha256(content).hexdigest()
            archive.writestr(_entry(name), content)
        archive.writestr(_entry(MANIFEST), json_content({"format": FORMAT, "sha256": hashes}))


def json_content(content: Any) -> bytes:
    """Return the content of a JSON member."""
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def _entry(name: str) -> ZipInfo:
    entry = ZipInfo(name, DATE)
    entry.external_attr = (stat.S_IFREG | 0o644) << 16
    return entry


@dataclass(frozen=True)
class Archive:
    """An open archive whose list of members has been checked; `read` checks the content of one."""

    file: Path
    opened: ZipFile
    hashes: dict[str, str]

    @property
    def names(self) -> set[str]:
        """Names of the members."""
        return set(self.hashes)

    def read(self, name: str) -> bytes:
        """Return the content of a member. Raises `UserError` if it is missing or does not have its checksum."""
        if name not in self.hashes:
            raise UserError(f"{self.file} has no {name}: export the model again.")
        content = _content(self.file, self.opened, name)
        if hashlib.sha256(content).hexdigest() != self.hashes[name]:
            raise UserError(f"{self.file} is damaged, because {name} does not have its checksum: copy it again.")
        return content

    def read_json(self, name: str) -> Any:
        """Return the content of a JSON member. Raises `UserError` as `read` does, and if it is not JSON."""
        return _parsed(self.file, name, self.read(name))


@contextmanager
def open_archive(file: Path, names: re.Pattern[str]) -> Iterator[Archive]:
    """Open an archive for reading.

    Args:
        file: The archive.
        names: What the names of its members must match.

    Raises:
        UserError: If the file is missing or not such an archive, or if a member has another name, occurs twice, is a
            link or a folder, is compressed or encrypted, or is not in the list of checksums.
    """
    if not file.is_file():
        raise UserError(f"{file} is missing, or is not a file: give an archive of mae3d_export.")
    try:
        opened = ZipFile(file)
    except (BadZipFile, OSError, ValueError, NotImplementedError, struct.error, IndexError) as error:
        raise UserError(f"{file} is damaged or not a zip file ({error}): give an archive of mae3d_export.") from None
    with opened:
        _refuse_members(file, opened.infolist(), names)
        if MANIFEST not in opened.namelist():
            raise UserError(f"{file} has no {MANIFEST}, so it was not written by mae3d_export: export the model again.")
        manifest = _parsed(file, MANIFEST, _content(file, opened, MANIFEST))
        hashes = manifest.get("sha256") if isinstance(manifest, dict) else None
        if not isinstance(hashes, dict) or manifest.get("format") != FORMAT:
            raise UserError(f"{file} is not in the format {FORMAT!r}: export the model again with this version.")
        if {*hashes} != {*opened.namelist()} - {MANIFEST}:
            raise UserError(f"{file} is damaged, because its members are not those in {MANIFEST}: copy it again.")
        yield Archive(file, opened, hashes)


def _refuse_members(file: Path, entries: list[ZipInfo], names: re.Pattern[str]) -> None:
    problem = f"has {len(entries)} members" if len(entries) > MOST_MEMBERS else None
    seen: set[str] = set()
    for entry in entries:
        problem = problem or _problem_of(entry, names, seen)
        seen.add(entry.filename)
    if sum(entry.file_size for entry in entries) > file.stat().st_size:  # members that share their bytes
        problem = problem or "has members that are larger than itself"
    if problem:
        raise UserError(f"{file} {problem}, so it was not written by mae3d_export: give an archive that was.")


def _problem_of(entry: ZipInfo, names: re.Pattern[str], seen: set[str]) -> str | None:
    name = entry.filename
    if name != entry.orig_filename or (name != MANIFEST and not names.fullmatch(name)):
        return f"has a member {entry.orig_filename[:80]!r}"
    problems = {
        "twice": name in seen,
        "that is a link or no file": stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG),
        "that is compressed": entry.compress_type != ZIP_STORED or entry.file_size != entry.compress_size,
        "that is encrypted": bool(entry.flag_bits & ENCRYPTED),
        f"of {entry.file_size} bytes": name.endswith(".json") and entry.file_size > LARGEST_TEXT,
    }
    return next((f"has a member {name} {problem}" for problem, found in problems.items() if found), None)


def _content(file: Path, opened: ZipFile, name: str) -> bytes:
    try:
        return opened.read(name)
    except (BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError, struct.error) as error:
        raise UserError(f"{file} is damaged in {name} ({error}): copy it again.") from None


def _parsed(file: Path, name: str, content: bytes) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        return json.loads(content.decode(), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged, because {name} is not valid JSON ({error}): export it again.") from None
