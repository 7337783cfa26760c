"""One exception for everything that the user can mend, and the one place that turns it into an exit code."""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

NAMES_SHOWN = 3  # names that a sentence lists


class UserError(ValueError):
    """A mistake that the user can mend. The message is one sentence: what is wrong, where, and what to do."""


def exit_on_user_error(function: Callable[P, R]) -> Callable[P, R]:
    """Print a `UserError` to stderr and exit with code 2, without a traceback; let everything else through.

    Our commands are wrapped by this, and so are the methods that nnU-Net's own commands call on our trainers.
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
    """Why images could not be read, without the full stop: SimpleITK starts with lines about its own sources.

    nnU-Net's readers raise an error without a word when the files of a case do not fit each other.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or ["its files differ in size or spacing"])[-1].removeprefix("sitk::ERROR: ").rstrip(".")


@contextmanager
def reading(what: object) -> Iterator[None]:
    """Turn whatever an image reader raises in the block into a `UserError` that names `what` and gives the reason."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 (SimpleITK, nibabel and nnU-Net's readers all have errors of their own)
        raise UserError(f"{what} cannot be read ({reader_reason(error)}): repair or replace it.") from None


def abbreviated(names: Iterable[str]) -> str:
    """The first few, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - NAMES_SHOWN} more" if len(listed) > NAMES_SHOWN else ""
    return ", ".join(listed[:NAMES_SHOWN]) + more
