"""Studies in a BIDS folder (bids-specification.readthedocs.io): sub-*/[ses-*/]anat/*_SUFFIX.nii.gz and derivatives."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunet_vit_mae.datasets.convert.studies import Pattern, Scanner, Source, Study
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.files import read_json
from nnunet_vit_mae.imaging.channels import NIFTI
from nnunet_vit_mae.presets import canonical_contrast

LABEL_SUFFIXES = ("dseg", "mask")
NO_CONTRASTS = (*LABEL_SUFFIXES, "defacemask", "probseg")
KEYS = ("Manufacturer", "ManufacturersModelName", "ConvolutionKernel", "SliceThickness")


def is_bids(folder: Path) -> bool:
    """Whether there are subjects with images that are named as BIDS wants them."""
    return any(_images(subject) for subject in _subjects(folder))


def bids_studies(folder: Path, patterns: Sequence[Pattern], label: str | None) -> list[Study]:
    """Sessions of all subjects; without patterns each suffix is a contrast, after a contrast agent with POST added.

    Of several images of one contrast (runs, acquisitions) the first by name is taken. `label` is a pattern of paths
    below `folder`, else labels are `*_dseg` or `*_mask` in derivatives, but no masks of the brain.
    """
    studies = []
    labels = _labels(folder, label)
    for subject in _subjects(folder):
        by_session: dict[str, list[Path]] = {}
        for file in _images(subject):
            by_session.setdefault(_session(file), []).append(file)
        studies += [
            _study(subject.name, session, files, patterns, labels) for session, files in sorted(by_session.items())
        ]
    if not any(study.images for study in studies):
        raise UserError(f"No image in {folder} fits --contrast: compare the patterns with the names of the files.")
    return studies


def _study(subject: str, session: str, files: list[Path], patterns: Sequence[Pattern], labels: list[Path]) -> Study:
    images: dict[str, Source] = {}
    for file in files:
        names = [one.contrast for one in patterns if one.fits(file.name)] if patterns else [_contrast(file)]
        for name in names:
            images.setdefault(name, Source(file, _scanner(file)))
    own = [file for file in labels if file.name.startswith(f"{subject}_") and _session(file) == session]
    own = [file for file in own if _suffix(file) == "dseg"] or own  # a segmentation says more than a mask
    problems = {} if images else {"study": "has no image that fits --contrast"}
    if len(own) > 1:
        problems["label"] = f"has {len(own)} labels: choose one with --labels"
    return Study(subject, session, images, Source(own[0]) if len(own) == 1 else None, problems)


def _subjects(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("sub-*") if path.is_dir())


def _images(subject: Path) -> list[Path]:
    files = [*subject.glob("anat/*"), *subject.glob("ses-*/anat/*"), *subject.glob("ct/*"), *subject.glob("ses-*/ct/*")]
    return sorted(file for file in files if _is_nifti(file) and "_" in file.name and _suffix(file) not in NO_CONTRASTS)


def _labels(folder: Path, pattern: str | None) -> list[Path]:
    if pattern:
        try:
            found = sorted(file for file in folder.glob(pattern) if _is_nifti(file))
        except (NotImplementedError, ValueError):  # an absolute path, or no pattern
            found = []
        if not found:
            raise UserError(f"No file in {folder} fits --labels {pattern}: give a pattern of paths below that folder.")
        return found
    found = sorted(
        file for file in folder.glob("derivatives/**/*") if _is_nifti(file) and _suffix(file) in LABEL_SUFFIXES
    )
    return [file for file in found if not re.search("desc-brain", file.name, flags=re.IGNORECASE)]


def _is_nifti(file: Path) -> bool:
    return file.name.lower().endswith(NIFTI)


def _stem(file: Path) -> str:
    return file.name[: file.name.lower().rindex(".nii")]


def _suffix(file: Path) -> str:
    return _stem(file).rsplit("_", 1)[-1]


def _session(file: Path) -> str:
    """As the name says it, else the folder."""
    match = re.search(r"_(ses-[^_]+)_", file.name) or re.search(r"/sub-[^/]+/(ses-[^/]+)/", file.as_posix())
    return match[1] if match else ""


def _contrast(file: Path) -> str:
    """The suffix as all that match contrasts call it."""
    return canonical_contrast(_suffix(file)) + ("POST" if "_ce-" in file.name else "")


def _scanner(file: Path) -> Scanner:
    """Of the JSON file beside an image; a file that is no JSON says nothing."""
    sidecar = file.with_name(f"{_stem(file)}.json")
    try:
        content: Any = read_json(sidecar) if sidecar.exists() else {}
    except UserError:
        content = {}
    return Scanner(*(str(content.get(key, "")) for key in KEYS)) if isinstance(content, dict) else Scanner()
