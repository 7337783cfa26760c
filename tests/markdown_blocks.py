"""Blocks of code in the documentation, and the commands in them."""

import re
import shlex
from pathlib import Path

BLOCK = re.compile(r"^```([\w{}]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = ""  # the language of blocks with commands, whose fence names none


def blocks_of(page: Path) -> list[tuple[str, str]]:
    """Language and text of each block."""
    return BLOCK.findall(page.read_text())


def prose_of(page: Path) -> str:
    return BLOCK.sub("", page.read_text())


def commands_in(block: str) -> list[list[str]]:
    """Our commands and nnU-Net's in a block of shell lines, each as its words."""
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars="&;|()")
        words.whitespace_split = True
        inside = False
        for word in words:
            if inside and not set(word) <= set("&;|()"):
                found[-1].append(word)
            else:
                inside = re.match(r"(mae3d|nnUNetv2)_", word) is not None
                found += [[word]] if inside else []
    return found
