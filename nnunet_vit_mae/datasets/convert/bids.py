"""Studies in a BIDS folder (bids-specification.readthedocs.io): sub-*/[ses-*/]TYPE/*_SUFFIX.nii.gz and derivatives."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel

from nnunet_vit_mae.datasets.convert.studies import ContrastPattern, FoundStudies, ImageSource, Scanner, Study
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.imaging.channels import NIFTI, is_hidden, visible_below, without_ending
from nnunet_vit_mae.imaging.stated_geometry import ambiguities_among
from nnunet_vit_mae.presets import canonical_contrast
from nnunet_vit_mae.storage.files import read_json

LABEL_SUFFIXES = ("dseg", "mask", "msk")  # the last is that of the ISLES data, which is not BIDS
NOT_CONTRASTS = (*LABEL_SUFFIXES, "defacemask", "probseg", "sbref")
FIELD_MAPS = "fmap"
KEYS = ("Manufacturer", "ManufacturersModelName", "ConvolutionKernel", "SliceThickness")


def is_bids(folder: Path) -> bool:
    """Return whether a folder has subjects with images."""
    return any(_images_of(subject) for subject in _subjects(folder))


def bids_studies(folder: Path, patterns: Sequence[ContrastPattern], label: str | None) -> FoundStudies:
    """Find the sessions of all subjects, with the images in all their folders (anat, dwi, perf, pet, ct and so on).

    Without patterns, each suffix is a contrast, with POST appended after a contrast agent; field maps and images of
    several volumes are none. Of several images of one contrast (runs, acquisitions), the one that shares most entities
    with the label is used, else the first by name. `label` is a pattern of paths below `folder`; without it, labels are
    `*_dseg`, `*_mask` or `*_msk` in derivatives, except brain masks.

    Raises:
        UserError: If no image matches.
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
        raise UserError(
            f"No image in {folder} {'matches --contrast' if patterns else 'is a contrast'}: compare the patterns with "
            f"the file names{_why_unused(studies)}."
        )
    lost = [file for file in labels if not any(_belongs(file, study.patient, study.session) for study in studies)]
    sources = [source for study in studies for source in (*study.images.values(), study.label) if source is not None]
    ambiguous = ambiguities_among(source.origin for source in sources if isinstance(source.origin, Path))
    return FoundStudies(
        studies,
        unused=tuple((_nameless(file), "is the label of no session") for file in lost),
        warnings=tuple(
            f"{clause}. Cases are placed as SimpleITK reads it: compare the sides with another program."
            for clause in ambiguous
        ),
    )


def _bids_study(
    subject: str, session: str, files: list[Path], patterns: Sequence[ContrastPattern], labels: list[Path]
) -> Study:
    own = [file for file in labels if _belongs(file, subject, session)]
    own = [file for file in own if _suffix(file) == "dseg"] or own  # a segmentation says more than a mask
    label = own[0] if len(own) == 1 else None
    if label:  # first of all the image it was drawn on: the patient may have moved between two runs on one grid
        files = sorted(files, key=lambda file: -len(_entities(file) & _entities(label)))
    images: dict[str, ImageSource] = {}
    unused = []
    for file in files:
        contrasts = [pattern.contrast for pattern in patterns if pattern.fits(file.name)]
        reason = "matches no --contrast" if patterns else _why_no_contrast(file)
        if not patterns and not reason:
            contrasts = [_contrast_of(file)]
        taken = [contrast for contrast in contrasts if contrast in images]
        images |= {contrast: ImageSource(file, _scanner(file)) for contrast in contrasts if contrast not in images}
        if taken == contrasts:
            unused.append((_nameless(file), f"{taken[0]} is another image of the session" if taken else reason))
    problems = {} if images else {"study": f"has no image that {'matches --contrast' if patterns else 'is a contrast'}"}
    if len(own) > 1:
        problems["label"] = f"has {len(own)} labels: choose one with --labels"
    return Study(subject, session, images, ImageSource(label) if label else None, problems, tuple(unused))


def _belongs(label: Path, subject: str, session: str) -> bool:
    return label.name.startswith(f"{subject}_") and _session(label) == session


def _entities(file: Path) -> set[str]:
    """Return the parts of a file name before the suffix, such as run-2."""
    return set(file.name.split("_")[:-1])


def _why_unused(studies: Sequence[Study]) -> str:
    reasons = Counter(reason for study in studies for _, reason in study.unused)
    listed = "; ".join(f"{count} images: {reason}" for reason, count in reasons.most_common(3))
    return f" ({listed})" if listed else ""


def _why_no_contrast(file: Path) -> str:
    """Say why an image is not a contrast unless a pattern asks for it; empty if it is one."""
    if file.parent.name == FIELD_MAPS:
        return "is a field map"
    if (suffix := _suffix(file)) in NOT_CONTRASTS:
        return f"{suffix} is not a contrast"
    try:
        image: Any = nibabel.load(file)
        shape = image.shape
    except Exception:  # noqa: BLE001  the reason is given where images are read
        return ""
    volumes = math.prod(shape[3:])  # the fifth axis is that of vectors
    return f"holds {volumes} volumes" if volumes > 1 else ""


def _nameless(file: Path) -> str:
    """Return the folder and the name of an image without subject and session, which identify the patient."""
    return f"{file.parent.name}/{re.sub(r'(?:sub|ses)-[^_]+_', '', without_ending(file.name, NIFTI))}"


def _subjects(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("sub-*") if path.is_dir())


def _images_of(subject: Path) -> list[Path]:
    return [file for file in visible_below(subject) if _is_nifti(file) and "_" in file.name]


def _find_labels(folder: Path, pattern: str | None) -> list[Path]:
    if pattern:
        try:
            labels = sorted(file for file in folder.glob(pattern) if _is_nifti(file) and not is_hidden(file.name))
        except (NotImplementedError, ValueError):  # an absolute path, or not a pattern
            labels = []
        if not labels:
            raise UserError(f"No file in {folder} matches --labels {pattern}: give a pattern of paths below it.")
        return labels
    labels = [
        file for file in visible_below(folder / "derivatives") if _is_nifti(file) and _suffix(file) in LABEL_SUFFIXES
    ]
    return [file for file in labels if not re.search("desc-brain", file.name, flags=re.IGNORECASE)]


def _is_nifti(file: Path) -> bool:
    return file.name.lower().endswith(NIFTI)


def _suffix(file: Path) -> str:
    last = without_ending(file.name, NIFTI).rsplit("_", 1)[-1]
    return next((suffix for suffix in LABEL_SUFFIXES if last.endswith(f"-{suffix}")), last)


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
    values = [content.get(key) for key in KEYS] if isinstance(content, dict) else []
    return Scanner(*("" if value is None else str(value) for value in values))
