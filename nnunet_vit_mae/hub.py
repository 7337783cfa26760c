"""Encoders on the Hugging Face hub: `hf:owner/name@revision`, in place of a file.

A download stays in the hub's own cache, and an address with a commit names the same file for ever. `HF_ENDPOINT`,
`HF_TOKEN`, `HF_HUB_OFFLINE` and the other variables of huggingface_hub hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nnunet_vit_mae.errors import UserError, reader_reason

WEIGHTS = "model.safetensors"
PREFIX = "hf:"
REPOSITORY = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
ADDRESS = re.compile(rf"{PREFIX}({REPOSITORY})(?:@([A-Za-z0-9][\w./-]*))?", re.ASCII)
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token"


def local_file(place: Path | str) -> Path:
    """Return the file of an encoder; one of the hub is downloaded, unless it was before. Raises as `download`."""
    return download(str(place))[0] if is_address(place) else Path(place)


def is_address(place: Path | str) -> bool:
    """Return whether a place is on the hub.

    >>> is_address("hf:owner/encoder@main"), is_address("encoder.safetensors")
    (True, False)
    """
    return str(place).startswith(PREFIX)


def download(address: str) -> tuple[Path, str]:
    """Return the file of an encoder on the hub, and its address with the commit in place of a branch or tag.

    A file that was downloaded before is found without a network if the address has the commit.

    Raises:
        UserError: If the address is not valid, the hub does not have it or cannot be reached, or a token is needed.
    """
    match = ADDRESS.fullmatch(address)
    if match is None:
        raise UserError(f"{address} is not an address on the hub: write hf:owner/name, or hf:owner/name@revision.")
    repository, revision = match.groups()
    from huggingface_hub import hf_hub_download

    otherwise = f"copy {WEIGHTS} here and give its path"
    with _answers_in_words(f"The encoder {address} cannot be downloaded", otherwise):
        file = Path(hf_hub_download(repository, WEIGHTS, revision=revision))
    commit = file.parent.name  # the hub's cache has a folder for each commit
    return file, f"{PREFIX}{repository}@{commit}"


def push(folder: Path, files: Sequence[str], repository: str, *, public: bool) -> str:
    """Write files of a folder to a repository of the hub in one commit; returns the address of the encoder there.

    A new repository is private, unless it is to be `public`; an existing one keeps its visibility.
    Raises `UserError` if the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    what = f"{folder} is written, but cannot be pushed to {repository}"
    with _answers_in_words(what, "run the same command on a machine that has one"):
        hub = HfApi()
        hub.create_repo(repository, private=not public, exist_ok=True)
        message = "Share an encoder of nnunet-vit-mae"
        commit = hub.upload_folder(
            repo_id=repository, folder_path=folder, allow_patterns=list(files), commit_message=message
        )
    return f"{PREFIX}{repository}@{commit.oid}"


@contextmanager
def _answers_in_words(what: str, otherwise: str) -> Iterator[None]:
    """Turn the errors of huggingface_hub into a `UserError` that begins with `what`; a full disk stays as it is.

    `otherwise` is what to do without a network.
    """
    from huggingface_hub import errors

    reach = "the hub cannot be reached: this needs a network (unset HF_HUB_OFFLINE, check HF_ENDPOINT)"
    try:
        yield
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise UserError(f"{what}, because {reach}; otherwise {otherwise}.") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{what}, because the hub knows no such repository; if it is private, {LOG_IN}.") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{what}, because the repository has no such revision: check what follows the @.") from None
    except errors.EntryNotFoundError:
        raise UserError(f"{what}, because the repository has no {WEIGHTS}: check its name.") from None
    except errors.LocalTokenNotFoundError:
        raise UserError(f"{what}, because there is no token: {LOG_IN} that may write.") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        advice = f"{LOG_IN} that may do this" if status in (401, 403) else "try again later"
        raise UserError(f"{what}, because the hub answered with status {status}: {advice}.") from None
    except Exception as error:  # the HTTP library of huggingface_hub has errors of its own, and has changed twice
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise
        raise UserError(f"{what} ({reader_reason(error)}), because {reach}; otherwise {otherwise}.") from None
