"""Bytes and volumes as people read them. A GiB is 2^30 bytes, as memory is made and as `--shm-size 8g` means it."""

from __future__ import annotations

import math

MIB, GIB = 2**20, 2**30
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


def rounded_mm3(volume: float) -> float:
    """Round a volume for a table: to 3 decimals, below 1 mm3 to 6 digits, for voxels of 0.05 mm have 0.000125 mm3.

    >>> rounded_mm3(1234.5678), rounded_mm3(0.000421875), rounded_mm3(0)
    (1234.568, 0.000421875, 0)
    """
    return round(volume, 5 - math.floor(math.log10(volume)) if 0 < volume < 1 else 3)
