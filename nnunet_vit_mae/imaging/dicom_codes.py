"""Codes of labels for DICOM: what a segment shows, in terms of a coding scheme such as SNOMED CT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field

from nnunet_vit_mae.errors import UserError, did_you_mean
from nnunet_vit_mae.storage.entries import read_entries

Text = Annotated[str, Field(min_length=1, max_length=64)]  # as long as DICOM allows
ShortText = Annotated[str, Field(min_length=1, max_length=16)]


@dataclass(frozen=True)
class DicomCode:
    """A coded concept: its value, the scheme that defines it (SCT is SNOMED CT), and its meaning in words."""

    value: ShortText
    scheme: ShortText
    meaning: Text


TISSUE = DicomCode("85756007", "SCT", "Tissue")  # what 3D Slicer writes where nobody chose a code either


@dataclass(frozen=True)
class LabelCodes:
    """What a label shows: its category (DICOM CID 7150), its type (CID 7151 and others), and where it lies."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")  # a typing error would leave the default in its place

    category: DicomCode = TISSUE
    type: DicomCode = TISSUE
    region: DicomCode | None = None


def read_label_codes(file: Path | None, labels: Sequence[str]) -> dict[str, LabelCodes]:
    """Read the codes of labels from a JSON file, which may leave out some labels, and entries of a label.

    Args:
        file: The file, with an entry for each label; None gives the default codes.
        labels: All labels of the model.

    Returns:
        The codes of each label.

    Raises:
        UserError: If the file holds anything else, or a label that the model does not have.
    """
    given = read_entries(dict[str, LabelCodes], file, "see docs/howto.md for an example") if file else {}
    for label in given:
        if label not in labels:
            raise UserError(
                f"{file} has codes for {label}{did_you_mean(label, labels)}, but the model segments "
                f"{', '.join(labels)}: correct the name."
            )
    return {label: given.get(label, LabelCodes()) for label in labels}
