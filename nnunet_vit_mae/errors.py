"""The exception for everything that the user can fix, and the one place that turns it into an exit code."""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

NAMES_SHOWN = 3  # names listed in a sentence


class UserError(ValueError):
    """A mistake that the user can fix. The message is one sentence: what is wrong, where, and what to do."""


def exit_on_user_error(function: Callable[P, R]) -> Callable[P, R]:
    """Print a `UserError` to stderr and exit with code 2, without a traceback; let everything else through.

    It wraps our commands and the trainer methods that nnU-Net's own commands call.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except UserError as error:
            print(f"Error: {error}", file=sys.stderr)  # noqa: T201
            sys.exit(2)

    return wrapped


def reader_reason(error: Exception) -> str:
    """Return why images could not be read, without a full stop.

    SimpleITK's messages start with lines about its own sources. nnU-Net's readers raise an empty error if the files of
    a case do not match.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or ["its files differ in size or spacing"])[-1].removeprefix("sitk::ERROR: ").rstrip(".")


@contextmanager
def reading(what: object) -> Iterator[None]:
    """Turn whatever an image reader raises in the block into a `UserError` that names `what` and the reason."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 (SimpleITK, nibabel and nnU-Net's readers all have errors of their own)
        raise UserError(f"{what} cannot be read ({reader_reason(error)}): repair or replace it.") from None


def abbreviated(names: Iterable[str]) -> str:
    """List the first few names and say how many more there are.

    >>> abbreviated("abcde")
    'a, b, c and 2 more'
    """
    listed = list(names)
    more = f" and {len(listed) - NAMES_SHOWN} more" if len(listed) > NAMES_SHOWN else ""
    return ", ".join(listed[:NAMES_SHOWN]) + more
