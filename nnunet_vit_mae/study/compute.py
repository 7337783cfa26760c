"""What the steps of a study took, as Snakemake has measured it."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from nnunet_vit_mae.units import MIB


@dataclass(frozen=True)
class Compute:
    """What a step took."""

    seconds: float
    cpu_seconds: float
    memory_bytes: float  # largest at once, of all its processes, without that of a GPU


def read_compute(file: Path) -> Compute | None:
    """Read Snakemake's benchmark file; None if there is none."""
    if not file.is_file():
        return None
    rows = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines(), delimiter="\t"))
    if not rows:
        return None
    seconds, cpu_seconds, mebibytes = (_number(rows[-1].get(column)) for column in ("s", "cpu_time", "max_rss"))
    return Compute(seconds, cpu_seconds, mebibytes * MIB)


def _number(text: str | None) -> float:
    try:
        return float(text or 0)
    except ValueError:  # NA, of a step that was too short to measure
        return 0.0


def duration_text(seconds: float) -> str:
    """Format a time.

    >>> duration_text(50), duration_text(4000), duration_text(200000)
    ('1 min', '1 h 7 min', '2 d 7 h')
    """
    minutes = max(1, round(seconds / 60)) if seconds else 0
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
