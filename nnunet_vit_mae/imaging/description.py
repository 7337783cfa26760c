"""`dataset.json`, which describes a dataset: its channels, its labels and the ending of its files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.imaging.channels import NIFTI
from nnunet_vit_mae.storage.entries import checked_entries
from nnunet_vit_mae.storage.files import read_json

DESCRIPTION = "dataset.json"
LARGEST_LABEL = 2**16 - 1  # nnU-Net writes segmentations with 16 bits at most
REORIENTING = "WithReorient"  # at the end of the names of nnU-Net's readers that turn all images to the same axes
EXAMPLES = {
    "labels": '"labels": {"background": 0, "tumour": 1}',
    "channel_names": '"channel_names": {"0": "T1", "1": "FLAIR"}',
    "file_ending": '"file_ending": ".nii.gz"',
}


def _file_ending(text: str) -> str:
    if not re.fullmatch(r"(\.[A-Za-z0-9]+)+", text):
        raise ValueError("an ending such as .nii.gz")
    return text


def _channels_by_number(names: dict[str, str]) -> dict[str, str]:
    if not names or set(names) != {str(number) for number in range(len(names))}:
        raise ValueError('an object with the keys "0", "1" and so on')
    return names


LabelValue = Annotated[int, Field(ge=0, le=LARGEST_LABEL)]
LabelValues = Annotated[
    tuple[LabelValue, ...],
    Field(min_length=1),
    BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else (value,)),
]
Channels = Annotated[dict[str, str], AfterValidator(_channels_by_number)]


@dataclass(frozen=True)
class Description:
    """The entries of a `dataset.json` that this package reads; None for those that it leaves out."""

    content: Mapping[str, Any]  # all of it, as nnU-Net takes it
    source: str
    labels: dict[str, LabelValues] | None = None
    channel_names: Channels | None = None
    modality: Channels | None = None  # what nnU-Net v1 called the channels
    file_ending: Annotated[str, AfterValidator(_file_ending)] | None = None
    regions_class_order: tuple[LabelValue, ...] | None = None
    overwrite_image_reader_writer: str | None = None
    licence: str | None = None
    license: str | None = None

    @property
    def ending(self) -> str:
        """Ending of the files of images: that of nnU-Net v1 where the entry is left out, as it did."""
        return self.file_ending or NIFTI[0]

    @property
    def reoriented(self) -> bool:
        """Return whether the reader that it names turns all images to the same axes; nnU-Net's others do not."""
        return (self.overwrite_image_reader_writer or "").endswith(REORIENTING)

    @property
    def channels(self) -> list[str]:
        """Names of the channels in the order of their numbers. Raises `UserError` if there are none."""
        names = self.channel_names or self.modality or self.needed("channel_names")
        return [names[str(number)] for number in range(len(names))]

    def needed(self, entry: str) -> Any:
        """Return an entry. Raises `UserError` if the file leaves it out."""
        value = getattr(self, entry)
        if value is None:
            raise UserError(f"{self.source} has no {entry}: add it, for instance {EXAMPLES[entry]}.")
        return value


def read_description(file: Path) -> Description:
    """Read a `dataset.json`. Raises `UserError` if it is missing, or if an entry has the wrong type."""
    return describe(read_json(file), str(file))


def describe(content: Any, source: str) -> Description:
    """Return the content of a `dataset.json`; `source` is what errors call it."""
    advice = "correct it, as nnU-Net's documentation describes it"
    entries = {**content, "content": content, "source": source} if isinstance(content, dict) else content
    return checked_entries(Description, entries, source, advice)
