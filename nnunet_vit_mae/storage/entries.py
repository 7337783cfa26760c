"""What JSON files hold, checked against a dataclass: an error names the file, the entry and what was expected there.

Pydantic checks, since its errors name the whole path to an entry, keys of dictionaries included, and blosc2 brings it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from reprlib import Repr
from typing import Annotated, Any, TypeVar

from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.storage.files import read_json

T = TypeVar("T")

EXPECTED = {  # by pydantic's type of error, in the words of this package
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "dict_type": "an object",
    "mapping_type": "an object",
    "dataclass_type": "an object",
    "list_type": "a list",
    "tuple_type": "a list",
    "string_too_short": "text of {min_length} or more characters",
    "string_too_long": "text of {max_length} characters at most",
    "unexpected_keyword_argument": "left out, because there is no entry of that name",
    "greater_than": "above {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than_equal": "at most {le}",
    "too_short": "a list of {min_length} or more",
    "too_long": "a list of {max_length} at most",
    "value_error": "{error}",
}

Whole = Annotated[int, Field(gt=0, le=10**9)]  # a number of something
Length = Annotated[FiniteFloat, Field(gt=0)]  # mm


def read_entries(kind: type[T] | Any, file: Path, advice: str) -> T:
    """Read a JSON file as `kind`, a dataclass or another type that pydantic knows; other entries are ignored.

    `advice` ends the sentence of a `UserError`, which is raised when the file is missing, is not JSON, or does not
    hold what it should.
    """
    return checked_entries(kind, read_json(file), str(file), advice)


def checked_entries(kind: type[T], content: Any, source: str, advice: str) -> T:
    """Return `content`, as `json` gives it, as `kind`. Raises `UserError`, which calls the content `source`."""
    try:
        return entries_as(kind, content)
    except ValueError as error:
        raise UserError(f"{source} cannot be used, because {error}: {advice}.") from None


def entries_as(kind: type[T], content: Any) -> T:
    """Return `content`, as `json` gives it, as `kind`. Raises `ValueError` with a clause, for a sentence about it."""
    try:
        return _adapter(kind).validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        raise ValueError(_reason(error)) from None
    except RecursionError as error:
        raise ValueError(str(error)) from None


@cache
def _adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind)


def _reason(error: ValidationError) -> str:
    """Return the first thing that is wrong as a clause."""
    first = error.errors(include_url=False)[0]
    place, context = _place(first["loc"]), first.get("ctx", {})
    if first["type"] == "missing":
        return f"it has no {place}"
    value = _short(first["input"])
    known = EXPECTED.get(first["type"])  # pydantic's own words may hold braces
    expected = known.format(**context) if known else first["msg"].removeprefix("Input should be ")
    return f"{place or 'its content'} is {value}, but it must be {expected}"


def _place(location: Sequence[str | int]) -> str:
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location if part != "[key]"]
    return "".join(parts).removeprefix(".")


def _short(value: object) -> str:
    shortener = Repr()
    shortener.maxstring = shortener.maxother = shortener.maxlong = 40
    return shortener.repr(value)
