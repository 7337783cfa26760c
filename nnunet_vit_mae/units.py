"""Numbers of bytes as people read them. A GiB is 2^30 bytes, as memory is made and as `--shm-size 8g` means it."""

from __future__ import annotations

GIB = 2**30
PREFIXES = ("", "Ki", "Mi", "Gi", "Ti")


def size_text(size: float) -> str:
    """Format a number of bytes.

    >>> size_text(64 * 2**20), size_text(8_500_000_000)
    ('64 MiB', '7.9 GiB')
    """
    power = 0
    while round(size, 1) >= 1024 and power < len(PREFIXES) - 1:
        size, power = size / 1024, power + 1
    return f"{round(size, 1):g} {PREFIXES[power]}B"
