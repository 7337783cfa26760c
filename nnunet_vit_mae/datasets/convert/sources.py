"""What to convert: studies in a DICOM or BIDS folder, and the contrasts among them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nnunet_vit_mae.datasets.convert.bids import bids_studies, is_bids
from nnunet_vit_mae.datasets.convert.dicom_studies import dicom_studies
from nnunet_vit_mae.datasets.convert.studies import ContrastPattern, FoundStudies, Study
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.presets import canonical_contrast


def parse_patterns(texts: Sequence[str]) -> list[ContrastPattern]:
    """Parse the values of `--contrast`, such as T1=*t1*sag*; raises `UserError` for anything else."""
    patterns = []
    for text in texts:
        name, equals, pattern = text.partition("=")
        if not (name and equals and pattern):
            raise UserError(f"--contrast {text} is not NAME=PATTERN: write for instance T1='*t1*sag*'.")
        if ";" in name:
            raise UserError(
                f"--contrast {text} has a semicolon in the name, which divides names in tables: leave it out."
            )
        patterns.append(ContrastPattern(canonical_contrast(name), pattern))
    return patterns


def find_studies(source: Path, patterns: Sequence[ContrastPattern], labels: str | None) -> FoundStudies:
    """Find the studies in a folder; raises `UserError` if it has no images."""
    if is_bids(source):
        return bids_studies(source, patterns, labels)
    return dicom_studies(source, patterns, labels)


def contrast_order(patterns: Sequence[ContrastPattern], studies: Sequence[Study]) -> list[str]:
    """Return the contrasts in the order of the patterns; without patterns, the most frequent one comes first."""
    if patterns:
        return list(dict.fromkeys(pattern.contrast for pattern in patterns))
    names = [name for study in studies for name in study.images]
    return sorted(set(names), key=lambda name: (-names.count(name), name))


def parse_reference(name: str | None, contrasts: Sequence[str]) -> str | None:
    """Return the contrast that `--reference` names; raises `UserError` if there is no such contrast."""
    reference = canonical_contrast(name) if name else None
    if reference and reference not in contrasts:
        raise UserError(f"--reference {name} is none of the contrasts {', '.join(contrasts)}: choose one of them.")
    return reference
