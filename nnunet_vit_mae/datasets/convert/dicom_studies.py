"""Studies in a tree of DICOM files, by patient and date; of several series of one contrast, one is chosen."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path

from nnunet_vit_mae.datasets.convert.studies import ContrastPattern, FoundStudies, ImageSource, Scanner, Study
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.imaging.dicom import DicomSeries, find_series, header_problem
from nnunet_vit_mae.imaging.dicom_volumes import volumes_of

LABEL = "label"
# patient IDs that anonymisation leaves behind, without punctuation: many people have the same one
PLACEHOLDER = re.compile(
    r"|anon[^0-9]*|de?identified|0+|(.)\1{2,}|n[ao]|none?|null|nil|nan|noid|unknown|unbekannt|undefined|unnamed|"
    r"test|default|dummy|removed|redacted|deleted|hidden|private|pat|patient|patientid|subject|id|name|nn|xx|johndoe|"
    r"janedoe|0?12345(6(7(89?0?)?)?)?"
)


def dicom_studies(folder: Path, patterns: Sequence[ContrastPattern], label: str | None) -> FoundStudies:
    """Find the studies in a tree of DICOM files, by patient and date.

    A series that holds several volumes is divided, and a pattern has to choose one of them. Of several series of one
    contrast that are volumes, the one with the most slices is used, which has the thinnest slices; derived and captured
    ones are used only if there is no other. `label` is the pattern of series that hold the label.

    Raises:
        UserError: If there are no images, or none that matches.
    """
    found, damaged = find_series(folder, progress=True)
    all_series = [volume for series in found for volume in volumes_of(series)]
    images = [series for series in all_series if not series.passed_over]
    _refuse_without_images(folder, all_series, images, damaged)
    if not patterns:
        raise UserError(
            "Give the series of each contrast with --contrast NAME=PATTERN; the series descriptions in "
            f"{folder} are: {', '.join(_descriptions(images)[:40])}."
        )
    patients, warnings = _patients(images)
    grouped: dict[tuple[str, str], list[DicomSeries]] = defaultdict(list)
    for series in sorted(images, key=lambda series: (series.tag("StudyDate"), series.tag("StudyTime"))):
        grouped[patients[series.person, series.tag("StudyInstanceUID")], series.tag("StudyInstanceUID")].append(series)
    no_case = []
    for series in all_series:
        if series.passed_over:
            session = series.tag("StudyInstanceUID")
            patient = patients.get((series.person, session), "")
            if (patient, session) in grouped:
                grouped[patient, session].append(series)
            else:
                no_case.append((series.kind, series.passed_over))
    # sorted by patient; the studies of a patient stay in the order of time
    studies = [_dicom_study(*key, grouped[key], patterns, label) for key in sorted(grouped, key=lambda key: key[0])]
    _refuse_without_match(folder, studies, {pattern.contrast for pattern in patterns}, label)
    return FoundStudies(studies, damaged, tuple(no_case), tuple(warnings))


def _refuse_without_images(
    folder: Path, all_series: Sequence[DicomSeries], images: Sequence[DicomSeries], damaged: int
) -> None:
    if not images and damaged:
        raise UserError(f"None of {damaged} DICOM files in {folder} can be read: copy them again.")
    if not images:
        others = ", ".join(sorted({f"{series.kind} {series.passed_over}" for series in all_series}))
        raise UserError(
            f"There are no DICOM images in {folder}{f' ({others})' if others else ''}: give the folder that holds them "
            "with -i."
        )


def _descriptions(images: Sequence[DicomSeries]) -> list[str]:
    """Return the different descriptions, at most three of the volumes of one series, of which there may be hundreds."""
    volumes: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for one in images:
        volumes[one.identity if one.volume else (one.description,)].append(one.description or "(none)")
    listed = {text for texts in volumes.values() for text in ([*texts[:2], texts[-1]] if len(texts) > 3 else texts)}
    return sorted(listed)


def _refuse_without_match(
    folder: Path, studies: Sequence[Study], contrasts: Collection[str], label: str | None
) -> None:
    if not any(study.images for study in studies):
        reasons = (
            f" alone ({why})" for study in studies for image, why in study.problems.items() if image in contrasts
        )
        raise UserError(
            f"No series in {folder} matches --contrast{next(reasons, '')}: compare the patterns with the series "
            "descriptions, which are listed if --contrast is left out."
        )
    if label and not any(study.label for study in studies):
        reason = next((f" (the label {study.problems[LABEL]})" for study in studies if LABEL in study.problems), "")
        raise UserError(
            f"No series in {folder} matches --labels {label} and can be read{reason}: compare it with the series "
            "descriptions, which are listed if --contrast is left out."
        )


def _dicom_study(
    patient: str, session: str, all_series: list[DicomSeries], patterns: Sequence[ContrastPattern], label: str | None
) -> Study:
    usable = [series for series in all_series if not series.passed_over]
    label_pattern = ContrastPattern(LABEL, label) if label else None
    labels, parts = _apart([one for one in usable if label_pattern and _fits(label_pattern, one)])
    problems = {LABEL: f"is {_one_of(parts[0], parts, '--labels ')}"} if parts and not labels else {}
    images: dict[str, DicomSeries] = {}
    reasons = {id(series): series.passed_over or "matches no --contrast" for series in all_series}
    for contrast in dict.fromkeys(pattern.contrast for pattern in patterns):
        of_contrast = [pattern for pattern in patterns if pattern.contrast == contrast]
        matching, parts = _apart(
            [one for one in usable if one not in labels and any(_fits(pattern, one) for pattern in of_contrast)]
        )
        reasons |= {id(one): f"is {_one_of(one, parts, f'--contrast {contrast}=')}" for one in parts}
        if matching:
            images[contrast] = _best(matching)
            reasons |= {id(one): _why_not(one, images[contrast], contrast) for one in matching}
        elif parts:
            problems[contrast] = reasons[id(parts[0])]
    if not images and not {*problems} - {LABEL}:
        problems["study"] = "has no series that matches --contrast"
    if label_pattern and not labels and LABEL not in problems:
        objects = [one for one in all_series if one.passed_over and _fits(label_pattern, one)]
        if objects:
            problems[LABEL] = f"is a {objects[0].kind}, not a series of images: convert it to one, or to NIfTI and BIDS"
    best_label = _best(labels) if labels else None
    reasons |= {id(one): "another series is the label" for one in labels}
    used = [id(one) for one in (*images.values(), best_label) if one is not None]
    unused = tuple((one.kind, reasons[id(one)]) for one in all_series if id(one) not in used)
    sources = {contrast: _image_source(series) for contrast, series in images.items()}
    return Study(patient, session, sources, _image_source(best_label) if best_label else None, problems, unused)


def _fits(pattern: ContrastPattern, series: DicomSeries) -> bool:
    """Return whether a pattern fits the description, also that of the series if this is one of its volumes."""
    return pattern.fits(series.description) or pattern.fits(series.tag("SeriesDescription"))


def _apart(matching: Sequence[DicomSeries]) -> tuple[list[DicomSeries], list[DicomSeries]]:
    """Return the series from which one can be chosen, and volumes that match together with others of their series."""
    counts = Counter(one.identity for one in matching if one.volume)
    several = [one for one in matching if counts[one.identity] > 1]
    return [one for one in matching if one not in several], several


def _one_of(volume: DicomSeries, several: Sequence[DicomSeries], flag: str) -> str:
    """Say which volumes of its series match besides a volume, and how to choose one."""
    of_series = [one.volume for one in several if one.identity == volume.identity]
    return (
        f"one of {len(of_series)} volumes in a series, ({of_series[0]}) to ({of_series[-1]}): choose one, for instance "
        f"with {flag}'*({of_series[-1]})'"
    )


def _best(all_series: list[DicomSeries]) -> DicomSeries:
    """Return the first of the series with the most slices, if possible one that is not derived and is a volume."""
    return max(all_series, key=lambda series: (not series.is_derived, not header_problem(series), len(series.frames)))


def _why_not(series: DicomSeries, best: DicomSeries, contrast: str) -> str:
    if series.is_derived and not best.is_derived:
        return f"is derived, and {contrast} has a series that is not"
    if (problem := header_problem(series)) and not header_problem(best):
        return f"{contrast} has a series that is a volume, while this one {problem}"
    more = len(best.frames) > len(series.frames)
    return f"{contrast} has {'a series with more slices' if more else 'an earlier series with as many slices'}"


def _image_source(series: DicomSeries) -> ImageSource:
    tags = ("Manufacturer", "ManufacturerModelName", "ConvolutionKernel", "SliceThickness")
    return ImageSource(series, Scanner(*(series.tag(tag).replace("\\", " ") for tag in tags)))


# ---------- people


def _patients(images: Sequence[DicomSeries]) -> tuple[dict[tuple[tuple[str, str, str], str], str], list[str]]:
    """Tell people apart: return the patient of each person (ID, date of birth, sex) and study, and warnings.

    A study without a patient ID, or with one that stands for nobody, is a patient of its own. People with one ID who
    differ in date of birth or sex are different patients.
    """
    studies = {(series.person, series.tag("StudyInstanceUID")) for series in images}
    people: dict[str, set[tuple[str, str, str]]] = defaultdict(set)
    for person, _ in studies:
        people[person[0]].add(person)
    patients, nobody = {}, Counter()
    for person, study in studies:
        number, birth, sex = person
        if is_placeholder(number):
            patients[person, study] = study
            nobody[number] += 1
        elif _differ(people[number]):
            patients[person, study] = f"{number} born {birth} {sex}"
        else:
            patients[person, study] = number
    shared = sum(len(of_one) for number, of_one in people.items() if _differ(of_one) and not is_placeholder(number))
    warnings = []
    if many := sum(count for count in nobody.values() if count > 1):
        warnings.append(
            f"{many} studies share a patient ID that stands for nobody, such as ANONYMOUS, or have none: each counts as"
            " a patient of its own, so compare their cases with --key before they are split."
        )
    if shared:
        warnings.append(
            f"{shared} people share a patient ID with others, but differ in date of birth or sex: each counts as a "
            "patient of their own."
        )
    return patients, warnings


def is_placeholder(number: str) -> bool:
    """Return whether a patient ID stands for nobody.

    Example:
        >>> [is_placeholder(number) for number in ("ANONYMOUS", "0000", "N/A", "", "ANON0012", "4711")]
        [True, True, True, True, False, False]
    """
    return PLACEHOLDER.fullmatch(re.sub(r"[\W_]", "", number.casefold())) is not None


def _differ(people: set[tuple[str, str, str]]) -> bool:
    """Return whether people with one ID differ in what is known of their date of birth or sex."""
    known = ({person[part] for person in people} - {""} for part in (1, 2))
    return any(len(values) > 1 for values in known)
