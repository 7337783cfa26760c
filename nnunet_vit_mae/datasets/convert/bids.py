"""Studies in a BIDS folder (bids-specification.readthedocs.io): sub-*/[ses-*/]anat/*_SUFFIX.nii.gz and derivatives."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunet_vit_mae.datasets.convert.studies import ContrastPattern, ImageSource, Scanner, Study
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.files import read_json
from nnunet_vit_mae.imaging.channels import NIFTI, without_ending
from nnunet_vit_mae.presets import canonical_contrast

LABEL_SUFFIXES = ("dseg", "mask")
NOT_CONTRASTS = (*LABEL_SUFFIXES, "defacemask", "probseg")
KEYS = ("Manufacturer", "ManufacturersModelName", "ConvolutionKernel", "SliceThickness")


def is_bids(folder: Path) -> bool:
    """Return whether a folder has subjects with images in the places that BIDS defines."""
    return any(_images_of(subject) for subject in _subjects(folder))


def bids_studies(folder: Path, patterns: Sequence[ContrastPattern], label: str | None) -> list[Study]:
    """Find the sessions of all subjects.

    Without patterns, each suffix is a contrast, with POST appended after a contrast agent. Of several images of one
    contrast (runs, acquisitions), the first by name is used. `label` is a pattern of paths below `folder`; without it,
    labels are `*_dseg` or `*_mask` in derivatives, except brain masks. Raises `UserError` if no image matches.
    """
    studies = []
    labels = _find_labels(folder, label)
    for subject in _subjects(folder):
        by_session: dict[str, list[Path]] = {}
        for file in _images_of(subject):
            by_session.setdefault(_session(file), []).append(file)
        studies += [
            _bids_study(subject.name, session, files, patterns, labels) for session, files in sorted(by_session.items())
        ]
    if not any(study.images for study in studies):
        raise UserError(f"No image in {folder} matches --contrast: compare the patterns with the file names.")
    return studies


def _bids_study(
    subject: str, session: str, files: list[Path], patterns: Sequence[ContrastPattern], labels: list[Path]
) -> Study:
    images: dict[str, ImageSource] = {}
    for file in files:
        if patterns:
            contrasts = [pattern.contrast for pattern in patterns if pattern.fits(file.name)]
        else:
            contrasts = [_contrast_of(file)]
        for contrast in contrasts:
            images.setdefault(contrast, ImageSource(file, _scanner(file)))
    own = [file for file in labels if file.name.startswith(f"{subject}_") and _session(file) == session]
    own = [file for file in own if _suffix(file) == "dseg"] or own  # a segmentation says more than a mask
    problems = {} if images else {"study": "has no image that matches --contrast"}
    if len(own) > 1:
        problems["label"] = f"has {len(own)} labels: choose one with --labels"
    return Study(subject, session, images, ImageSource(own[0]) if len(own) == 1 else None, problems)


def _subjects(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("sub-*") if path.is_dir())


def _images_of(subject: Path) -> list[Path]:
    files = [*subject.glob("anat/*"), *subject.glob("ses-*/anat/*"), *subject.glob("ct/*"), *subject.glob("ses-*/ct/*")]
    return sorted(file for file in files if _is_nifti(file) and "_" in file.name and _suffix(file) not in NOT_CONTRASTS)


def _find_labels(folder: Path, pattern: str | None) -> list[Path]:
    if pattern:
        try:
            labels = sorted(file for file in folder.glob(pattern) if _is_nifti(file))
        except (NotImplementedError, ValueError):  # an absolute path, or not a pattern
            labels = []
        if not labels:
            raise UserError(f"No file in {folder} matches --labels {pattern}: give a pattern of paths below it.")
        return labels
    labels = sorted(
        file for file in folder.glob("derivatives/**/*") if _is_nifti(file) and _suffix(file) in LABEL_SUFFIXES
    )
    return [file for file in labels if not re.search("desc-brain", file.name, flags=re.IGNORECASE)]


def _is_nifti(file: Path) -> bool:
    return file.name.lower().endswith(NIFTI)


def _suffix(file: Path) -> str:
    return without_ending(file.name, NIFTI).rsplit("_", 1)[-1]


def _session(file: Path) -> str:
    """Return the session from the file name, else from the folder."""
    match = re.search(r"_(ses-[^_]+)_", file.name) or re.search(r"/sub-[^/]+/(ses-[^/]+)/", file.as_posix())
    return match[1] if match else ""


def _contrast_of(file: Path) -> str:
    """Return the canonical contrast of a file's suffix."""
    contrast = canonical_contrast(_suffix(file))
    return f"{contrast}POST" if "_ce-" in file.name else contrast


def _scanner(file: Path) -> Scanner:
    """Read the scanner from the JSON file beside an image; an invalid file counts as empty."""
    sidecar = file.with_name(f"{without_ending(file.name, NIFTI)}.json")
    try:
        content: Any = read_json(sidecar) if sidecar.exists() else {}
    except UserError:
        content = {}
    return Scanner(*(str(content.get(key, "")) for key in KEYS)) if isinstance(content, dict) else Scanner()
