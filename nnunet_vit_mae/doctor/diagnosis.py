"""A diagnosis: one thing that was looked at, how it is, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARNING, ERROR = "ok", "warning", "error"


@dataclass(frozen=True)
class Diagnosis:
    """What was found about a topic; `advice` is a sentence where something can be done."""

    topic: str
    level: str  # OK, WARNING or ERROR
    text: str
    advice: str = ""
