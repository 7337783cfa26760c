"""A diagnosis: one thing that was looked at, how it is, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARNING, ERROR = "ok", "warning", "error"
UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclass(frozen=True)
class Diagnosis:
    """What was found about a topic; `advice` is a sentence where something can be done."""

    topic: str
    level: str  # OK, WARNING or ERROR
    text: str
    advice: str = ""


def size_text(size: float) -> str:
    """Format a number of bytes.

    >>> size_text(64000), size_text(8_500_000_000)
    ('64 kB', '8.5 GB')
    """
    unit = 0
    while size >= 1000 and unit < len(UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:.3g} {UNITS[unit]}"
