"""The exception for everything that the user can fix, and the one place that turns it into an exit code."""

import errno
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

NAMES_SHOWN = 3  # names listed in a sentence

WHAT_TO_DO = {
    errno.ENOSPC: "free some space on the disk",
    errno.EDQUOT: "free some space, or ask for a larger quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "change the permissions, or choose another folder",
    errno.EPERM: "change the permissions, or choose another folder",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "end programs that hold many files open",
    errno.ENOMEM: "end other programs, or use fewer processes",
    errno.EIO: "check the disk",
    errno.ENAMETOOLONG: "give a shorter name",
}
WITH_A_FULL_GPU = (
    "use a smaller batch or a smaller network, leave out --cache if it was given, or end other programs on the GPU"
)


class UserError(ValueError):
    """A mistake that the user can fix. The message is one sentence: what is wrong, where, and what to do."""


class WriteError(OSError):
    """The system refuses to write a file of ours, which is as it was before."""


def exit_on_user_error(function: Callable[P, R]) -> Callable[P, R]:
    """Print what the user can fix in one sentence to stderr and exit with code 2, without a traceback.

    That is a `UserError`, what the system refuses (`OSError`, such as a full disk) and the lack of memory, also of a
    GPU's; everything else passes. It wraps our commands and the trainer methods that nnU-Net's own commands call.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            result = function(*args, **kwargs)
            sys.stdout.flush()
            return result
        except UserError as error:
            sentence = str(error)
        except MemoryError as error:
            details = f" ({error})" if str(error) else ""
            sentence = f"There is not enough memory{details}: use fewer processes, a smaller batch, or more memory."
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's, by name, for not all commands import torch
                raise
            sentence = f"The memory of the GPU is full ({_gpu_reason(error)}): {WITH_A_FULL_GPU}."
        except OSError as error:
            if error.errno == errno.EPIPE and _nobody_reads_on():
                sys.exit(1)
            if error.errno is None:  # not from the system, but from a library that reads files
                raise
            sentence = system_error(error)
        print(f"Error: {sentence}", file=sys.stderr)  # noqa: T201
        sys.exit(2)

    return wrapped


def _gpu_reason(error: RuntimeError) -> str:
    """Return what a GPU was asked for and what it has, of torch's many sentences."""
    said = str(error).split(". ")
    return "; ".join(part for part in said if part.startswith(("Tried to allocate", "GPU "))) or said[0]


def _nobody_reads_on() -> bool:
    """Return whether the program that reads standard output, such as `head`, has ended; write no more then."""
    try:
        print(flush=True)  # noqa: T201 (a flush that has failed does not fail again)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter tries again at its end
        return True
    return False


def system_error(error: OSError) -> str:
    """Return a sentence about what the system refused, with what to do.

    >>> system_error(WriteError(errno.ENOSPC, "No space left on device", "case.nii.gz"))
    'case.nii.gz cannot be written (No space left on device), and is as it was; all files written before are whole: \
free some space on the disk, and run the command again.'
    """
    reason = error.strerror or str(error)
    if isinstance(error, WriteError):
        what = f"{error.filename} cannot be written ({reason}), and is as it was; all files written before are whole"
    elif error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        what = f"{error.filename or 'A file'} cannot be written ({reason})"
    elif error.filename:
        what = f"The system refuses {error.filename} ({reason})"
    else:
        what = f"The system refuses a resource, such as shared memory or a process ({reason})"
    return f"{what}: {WHAT_TO_DO.get(error.errno or 0, 'correct this')}, and run the command again."


def reader_reason(error: Exception) -> str:
    """Return why images could not be read, without a full stop.

    SimpleITK's messages start with lines about its own sources. nnU-Net's readers raise an empty error if the files of
    a case do not match.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines[-1:] == ["Reason: No such file or directory"]:  # of a MetaImage whose voxels end too early, too
        return "its voxels are cut off, damaged or missing"
    return (lines or ["its files differ in size or spacing"])[-1].removeprefix("sitk::ERROR: ").rstrip(".")


def first_line(error: Exception) -> str:
    """Return the first line of an error of torch or pickle, whose others are advice, without a full stop.

    >>> first_line(RuntimeError("\\nCannot find a compiler.\\nSet TORCHDYNAMO_VERBOSE=1."))
    'Cannot find a compiler'
    """
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__).rstrip(".")


@contextmanager
def reading(what: object) -> Iterator[None]:
    """Turn whatever an image reader raises in the block into a `UserError` that names `what` and the reason."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 (SimpleITK, nibabel and nnU-Net's readers all have errors of their own)
        raise UserError(f"{what} cannot be read ({reader_reason(error)}): repair or replace it.") from None


def abbreviated(names: Iterable[str], shown: int = NAMES_SHOWN) -> str:
    """List the first few names and say how many more there are.

    >>> abbreviated("abcde")
    'a, b, c and 2 more'
    """
    listed = list(names)
    more = f" and {len(listed) - shown} more" if len(listed) > shown else ""
    return ", ".join(listed[:shown]) + more


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the nearest of the known names as a part of a sentence; nothing if none is near.

    >>> did_you_mean("pretain", ["plan", "pretrain"])
    ' (did you mean pretrain?)'
    >>> did_you_mean("quantify", ["plan"])
    ''
    """
    near = get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""
