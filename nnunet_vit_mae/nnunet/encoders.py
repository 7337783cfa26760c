"""The encoder that plans start from: one of ours, or a checkpoint of another project, converted beside the plans."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.foreign.checkpoints import is_foreign
from nnunet_vit_mae.foreign.conversion import Target, convert_checkpoint
from nnunet_vit_mae.hub import download, is_address
from nnunet_vit_mae.nnunet.plans import Plan
from nnunet_vit_mae.storage.files import file_hash, write_file
from nnunet_vit_mae.weights import Card, encoder_content, read_encoder


@dataclass(frozen=True, kw_only=True)
class Start:
    """An encoder from elsewhere; `converted` is the content of its file, if that is still to be written."""

    place: str  # as plans record it: an absolute path, or an address on the hub with a commit
    tensors: dict[str, Tensor]
    card: Card
    sha256: str
    converted: bytes = b""

    def write_if_converted(self) -> None:
        """Write the file of an encoder that was converted."""
        if self.converted:
            write_file(self.converted, Path(self.place))


def find_encoder(
    source: Plan,
    place: Path | str | None,
    *,
    name: str = "",
    token: Sequence[int] | None = None,
    token_order: str | None = None,
) -> Start | None:
    """Return an encoder from elsewhere, or that of the plans, if there is one.

    Args:
        source: The plans to start from.
        place: A file, which is an encoder of ours or a checkpoint of another project, or the address of an encoder of
            ours on the hub; None: what the plans name.
        name: Of the plans to write, and so of a converted encoder.
        token: Voxels of a token (z y x), if they were given.
        token_order: Of a checkpoint of nnssl, if it was given.

    Raises:
        UserError: The file is missing, damaged or not one that can be used, or the hub cannot be reached.
    """
    if place is not None and not is_address(place) and is_foreign(Path(place)):
        file = Path(place)
        configuration = source.configuration
        target = Target(
            patch_size=source.patch_size, spacing=configuration.spacing, token=token, token_order=token_order
        )
        tensors, card = convert_checkpoint(file, target)
        content = encoder_content(tensors, card)
        converted = (source.dataset.preprocessed / "encoders" / f"{name}__{source.name}.safetensors").resolve()
        digest = hashlib.sha256(content).hexdigest()
        return Start(place=str(converted), tensors=tensors, card=card, sha256=digest, converted=content)
    if token_order is not None:
        raise UserError("--token_order is for a checkpoint of nnssl, which --encoder must name.")
    if place is None:
        place = source.settings.encoder.file or None
    if place is None:
        return None
    file, pinned = download(str(place)) if is_address(place) else (Path(place), str(Path(place).resolve()))
    tensors, card = read_encoder(file)
    return Start(place=pinned, tensors=tensors, card=card, sha256=file_hash(file))
