"""The channels of a raw dataset, and `contrasts.json`: which contrasts of each case are real."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.imaging.channels import IMAGE_ENDINGS
from nnunet_vit_mae.imaging.description import DESCRIPTION, read_description
from nnunet_vit_mae.storage.entries import read_entries
from nnunet_vit_mae.storage.files import write_json

CONTRAST_RECORD = "contrasts.json"


@dataclass(frozen=True)
class Channels:
    """Names of the contrasts in the order of their channels, and the ending of image files."""

    names: list[str]
    ending: str

    @property
    def headings(self) -> list[str]:
        """Names for a reader, each with its number if several channels share it, as nnU-Net allows.

        Example:
            >>> Channels(["T1", "noNorm", "noNorm"], ".nii.gz").headings
            ['T1', 'noNorm (0001)', 'noNorm (0002)']
        """
        shared = {name for name, count in Counter(self.names).items() if count > 1}
        return [f"{name} ({number:04d})" if name in shared else name for number, name in enumerate(self.names)]


@dataclass(frozen=True)
class Contrasts:
    """Names of a case's contrasts, in the order of the channels: acquired, filled here, and given as all zeros."""

    present: list[str] = field(default_factory=list)
    filled: list[str] = field(default_factory=list)
    blank: list[str] = field(default_factory=list)


ContrastRecord = dict[str, dict[str, Contrasts]]  # by folder, then by case, both sorted


def read_channels(raw: Path) -> Channels:
    """Read the channels from dataset.json; raises `UserError` if it does not describe channels that can be filled."""
    file = raw / DESCRIPTION
    description = read_description(file)
    names, ending = description.channels, description.needed("file_ending")
    if "dataset" in description.content:
        raise UserError(f"{file} lists its files under dataset: move the images to imagesTr and remove the list.")
    if ending not in IMAGE_ENDINGS:
        raise UserError(
            f"file_ending in {file} is {ending}, but must be a format with spacing and origin: "
            f"{', '.join(IMAGE_ENDINGS)}."
        )
    return Channels(names, ending)


def read_contrasts(raw: Path) -> ContrastRecord:
    """Read the record of an earlier call, empty if there is none; raises `UserError` if the file is something else."""
    file = raw / CONTRAST_RECORD
    if not file.exists():
        return {}
    return read_entries(ContrastRecord, file, "remove it, and mae3d_fill_contrasts writes a new one")


def write_contrasts(record: ContrastRecord, raw: Path) -> None:
    """Write the record of a dataset."""
    content = {
        folder: {name: asdict(contrasts) for name, contrasts in cases.items()} for folder, cases in record.items()
    }
    write_json(content, raw / CONTRAST_RECORD)
