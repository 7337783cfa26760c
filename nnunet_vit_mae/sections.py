"""Sections of settings as frozen dataclasses: read by the types of their defaults, checked, and written for JSON.

Every error names the setting, its value and what it must be.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from nnunet_vit_mae.errors import UserError

LARGEST = 2**32 - 1  # of every number: the largest seed, and far more than any other setting can use


@dataclass(frozen=True, kw_only=True)
class Section:
    """The base of all sections, which check their own values when they are made."""

    section: ClassVar[str]  # its name in messages

    def updated(self, values: Mapping[str, Any], where: str) -> Self:
        """Return this section with other values of some settings.

        Raises `UserError` for an unknown key, a value of the wrong type or one out of range; `where` is what it calls
        the section as a whole.
        """
        if not isinstance(values, Mapping):
            raise UserError(f"{where} in the plans must be an object of settings, but it is {values!r}.")
        known = {setting.name: getattr(self, setting.name) for setting in dataclasses.fields(self)}
        refuse_unknown(values, known, where)
        typed = {key: _typed(value, known[key], f"{self.section}.{key}") for key, value in values.items()}
        return dataclasses.replace(self, **typed)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON would give them back, which has lists where Python has tuples."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}

    def require(self, name: str, holds: bool, expected: str) -> None:
        """Raise `UserError` for the value of a setting unless a condition holds; `expected` says in words which."""
        if not holds:
            raise _refusal(f"{self.section}.{name}", self.to_dict()[name], expected)

    def require_one_of(self, **known: Collection[str]) -> None:
        """Raise `UserError` for a setting that is not one of its known values."""
        for name, choices in known.items():
            self.require(name, getattr(self, name) in choices, f"one of {', '.join(choices)}")

    def require_positive(self, *names: str) -> None:
        """Raise `UserError` for a setting that is not a number above 0."""
        for name in names:
            self.require(name, 0 < getattr(self, name) < math.inf, "a number above 0")

    def require_not_negative(self, *names: str) -> None:
        """Raise `UserError` for a setting below 0."""
        for name in names:
            self.require(name, getattr(self, name) >= 0, "0 or more")

    def require_share(self, *names: str) -> None:
        """Raise `UserError` for a setting that is not a share, which may be 0, but not 1."""
        for name in names:
            self.require(name, 0 <= getattr(self, name) < 1, "a share from 0 up to, but not, 1")


def refuse_unknown(given: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    """Raise `UserError` for keys that are not known; `where` is what it calls their place."""
    if unknown := sorted(set(given) - set(known)):
        raise UserError(f"{where} in the plans has unknown keys: {', '.join(unknown)} (known: {', '.join(known)}).")


def _typed(value: Any, example: Any, name: str) -> Any:
    """Return `value` as the type of `example`; JSON has no tuples, and writes 1.0 as 1."""
    if isinstance(example, tuple) and isinstance(value, list | tuple):
        kinds = (int, float) if example and type(example[0]) is float else (int,)
        if all(type(entry) in kinds and abs(entry) <= LARGEST for entry in value):
            return tuple(map(kinds[-1], value))
    if type(example) is float and type(value) is int and abs(value) <= LARGEST:
        return float(value)
    if type(value) is not type(example):
        numbers = "numbers" if isinstance(example, tuple) and float in map(type, example) else "whole numbers"
        kind = f"a list of {numbers}" if isinstance(example, tuple) else f"of type {type(example).__name__}"
        raise _refusal(name, value, kind)
    if isinstance(value, int | float) and not abs(value) <= LARGEST:  # NaN, too
        raise _refusal(name, value, f"a number of at most {LARGEST:,}")
    return value


def _refusal(name: str, value: object, expected: str) -> UserError:
    return UserError(f"{name} is {value!r}, but it must be {expected}.")
