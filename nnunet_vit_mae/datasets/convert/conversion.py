"""Convert studies from DICOM or BIDS to an nnU-Net raw dataset: contrasts by name, on one grid, with pseudonyms.

Cases have running numbers: P0001_1 is the first session of the first patient. Which case belongs to which patient is
written to the `key` only, a file outside the dataset.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from nnunet_vit_mae.datasets.acquisition import KERNEL, OF_CONTRAST, SCANS_TABLE, SLICE_THICKNESS
from nnunet_vit_mae.datasets.contrasts.filling import fill_contrasts
from nnunet_vit_mae.datasets.convert.key import name_cases
from nnunet_vit_mae.datasets.convert.label_values import are_renumbered, numbers_of, place_labels
from nnunet_vit_mae.datasets.convert.one_study import (
    CONVERTED,
    WAITING,
    WHOLE_STUDY,
    ConversionTask,
    ConvertedStudy,
    convert_study,
)
from nnunet_vit_mae.datasets.convert.studies import FoundStudies, Study
from nnunet_vit_mae.datasets.split.splits import alike_names
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.imaging.description import DESCRIPTION
from nnunet_vit_mae.imaging.scans import ENDING
from nnunet_vit_mae.processes.workers import run_each
from nnunet_vit_mae.progress import with_progress
from nnunet_vit_mae.storage.csv_tables import write_records, write_rows
from nnunet_vit_mae.storage.files import make_folder, read_json, write_json

PROBLEMS, UNUSED = "problems.csv", "unused.csv"
CONTENTS = {
    "dataset.json": "nnU-Net's description: channels, labels and number of training cases",
    "imagesTr/": "images of the cases that have labels, one file for each contrast",
    "labelsTr/": "their labels",
    "imagesUn/": "images without labels, for pre-training",
    SCANS_TABLE: "scanner, slice thickness and protocol of each image",
    PROBLEMS: "what could not be converted, and why",
    UNUSED: "what was not used, and why",
    "contrasts.json": "which contrasts of each case are present, and which were filled with zeros",
}
ALL, UNKNOWN = "all", "unknown"  # a problem may concern these instead of a case
UNUSED_SHOWN = 10  # kinds of images not used that are printed
UNUSED_FIELDS = ("case", "image", "reason")


@dataclass(frozen=True)
class Conversion:
    """All converted studies by case, problems of no single case, and the reason why contrasts were not filled.

    `labels` has the number of each value. `unused` counts what was not used, by description and reason. `alike` are
    numbers of patients with similar IDs.
    """

    studies: list[ConvertedStudy]
    labels: Mapping[int, int] = field(default_factory=dict)
    unused: Mapping[tuple[str, str], int] = field(default_factory=dict)
    alike: Sequence[Sequence[str]] = ()
    unfilled: str = ""

    @property
    def problems(self) -> list[str]:
        """Problems of all studies, one clause each."""
        return [f"{study.case} {image}: {reason}" for study in self.studies for image, reason in study.problems.items()]

    def unfinished(self, output: Path) -> str:
        """Return what could not be done and how to proceed, or an empty string."""
        sentences = [self.unfilled] if self.unfilled else []
        if self.problems:
            sentences.append(
                f"Some images could not be converted ({'; '.join(self.problems)}); all others were. The reasons are in "
                f"{output / PROBLEMS}, and the file given with --key tells which case belongs to which patient."
            )
        return " ".join(sentences)


def convert(
    found: FoundStudies,
    contrasts: Sequence[str],
    reference: str | None,
    output: Path,
    key: Path | None,
    label_values: Sequence[int],
    processes: int,
) -> Conversion:
    """Write all studies to the new raw dataset `output`, which the caller holds (`new_folder`).

    An unusable study or image does not stop the others. `label_values` are those that `numbers_of` is given.

    Absent contrasts are filled as by `mae3d_fill_contrasts`. Raises `UserError` if the dataset or the key cannot be
    written, if nothing could be converted, or if labels have values that nnU-Net does not take.
    """
    if key is not None and output.resolve() in key.resolve().parents:
        raise UserError(f"{key} is inside the dataset and would be shared with it: give another folder with --key.")
    numbers_of((), label_values)  # raises an error for values that no label has, before the work
    make_folder(output)
    names = name_cases(found.studies, key)
    tasks = [
        ConversionTask(study, names[study.patient, study.session], list(contrasts), reference, output)
        for study in found.studies
    ]
    done = _converted_before(output, found.studies, names)
    converted = _convert_all(tasks, done, output, processes)
    converted += _of_no_case(converted, contrasts, found.damaged)
    _write_conversion_tables(converted, contrasts, output)
    unused = [(names[study.patient, study.session], *entry) for study in found.studies for entry in study.unused]
    unused += [("", *entry) for entry in found.unused]
    if unused:
        write_rows(UNUSED_FIELDS, unused, output / UNUSED)
    if not any(study.folder for study in converted):
        shutil.rmtree(output / CONVERTED)
        reasons = "; ".join(Conversion(converted).problems[:5])
        raise UserError(f"None of {len(tasks)} studies could be converted ({reasons}): see {output / PROBLEMS}.")
    labels = numbers_of((value for study in converted for value in study.label_values), label_values)
    place_labels(output / WAITING, output / "labelsTr", labels)
    _describe(converted, contrasts, labels, output)
    shutil.rmtree(output / CONVERTED)
    counts = Counter((image, reason) for _, image, reason in unused)
    conversion = Conversion(converted, labels, counts, _alike_patients(names))
    try:
        fill_contrasts(output, is_locked=True)
    except UserError as error:  # nothing has to be converted again
        return replace(conversion, unfilled=f"{str(error).rstrip('.')}, then run mae3d_fill_contrasts.")
    return conversion


def _convert_all(
    tasks: Sequence[ConversionTask], done: Mapping[str, ConvertedStudy], output: Path, processes: int
) -> list[ConvertedStudy]:
    """Convert the studies that are not `done`, note each, and return all of them, sorted by case."""
    by_case = dict(done)
    left = [task for task in tasks if task.case not in done]
    results = run_each(convert_study, left, processes)
    for task, result in with_progress(results, total=len(left), unit="study", desc="converting"):
        lost = ConvertedStudy(task.case, problems={WHOLE_STUDY: "needs more memory than is available: lower -np"})
        by_case[task.case] = result or lost
        if result:
            write_json(asdict(result), output / CONVERTED / f"{task.case}.json")
    return [by_case[case] for case in sorted(by_case)]


def _describe(
    converted: Sequence[ConvertedStudy], contrasts: Sequence[str], labels: Mapping[int, int], output: Path
) -> None:
    """Write `dataset.json`."""
    content = {
        "channel_names": {str(number): name for number, name in enumerate(contrasts)},
        "labels": {"background": 0} | {f"label_{value}": number for value, number in labels.items()},
        "numTraining": sum(study.folder == "imagesTr" for study in converted),
        "file_ending": ENDING,
    }
    write_json(content, output / DESCRIPTION)


def _alike_patients(names: Mapping[tuple[str, str], str]) -> list[list[str]]:
    """Return the numbers of patients whose IDs differ only in case or leading zeros, of the key too."""
    numbers = {patient: case.split("_")[0] for (patient, _), case in names.items()}
    return [[numbers[patient] for patient in group] for group in alike_names(numbers)]


def _converted_before(
    output: Path, studies: Sequence[Study], names: Mapping[tuple[str, str], str]
) -> dict[str, ConvertedStudy]:
    """Return what a conversion of the same studies had done when it was stopped, by case.

    Raises `UserError` if it was of other studies, or with other names for them.
    """
    folder, note = output / CONVERTED, output / CONVERTED / "studies.json"
    files = [file for study in studies for file in study.files]
    states = [(file.stat().st_size, file.stat().st_mtime_ns) if file.exists() else None for file in files]
    # of all studies together, so that nobody can find a patient by trying
    content = {"studies": hashlib.sha256(repr((studies, sorted(names.items()), states)).encode()).hexdigest()}
    done = sorted(folder.glob("P*.json"))
    if not done:
        write_json(content, note)
    elif read_json(note) != content:
        raise UserError(f"{output} is an unfinished conversion of other files, or with another key: remove it.")
    before = (ConvertedStudy(**read_json(file)) for file in done)
    return {study.case: replace(study, label_values=tuple(study.label_values)) for study in before}


def _of_no_case(studies: list[ConvertedStudy], contrasts: Sequence[str], damaged: int) -> list[ConvertedStudy]:
    """Return problems that only show once all studies have been converted."""
    present = {name for study in studies for name in study.row.get("contrasts", "").split(";")}
    zeros = "is in no case, so that this channel is all zeros"
    files = f"{damaged} files cannot be read and belong to no readable series, copy them again: slices may be missing"
    return [
        ConvertedStudy(ALL, problems={name: zeros for name in contrasts if name not in present}),
        ConvertedStudy(UNKNOWN, problems={WHOLE_STUDY: files} if damaged else {}),
    ]


def conversion_report(conversion: Conversion, contrasts: Sequence[str], output: Path, key: Path | None) -> str:
    """Return what the command prints about the new dataset and what its user has to know."""
    folders = [study.folder for study in conversion.studies]
    lines = [
        f"{output} has {folders.count('imagesTr')} cases with labels and {folders.count('imagesUn')} without, with "
        f"contrasts {', '.join(contrasts)}; the scanners are listed in {output / SCANS_TABLE}."
    ]
    by_count = sorted(conversion.unused.items(), key=lambda item: (-item[1], item[0]))
    lines += [f"Not used: {count} x {image}: {reason}." for (image, reason), count in by_count[:UNUSED_SHOWN]]
    if by_count:
        lines.append(f"{output / UNUSED} lists all {sum(conversion.unused.values())} that were not used, by case.")
    if conversion.alike:
        lines.append(
            f"Are these different patients? {'; '.join(map(', '.join, conversion.alike))}: their IDs differ only in "
            "upper and lower case or in leading zeros."
        )
    if are_renumbered(conversion.labels):
        changes = ", ".join(f"{value} is now {number}" for value, number in conversion.labels.items())
        lines.append(f"Labels have new values, because nnU-Net requires 1, 2 and so on: {changes}.")
    if conversion.labels:
        lines.append(
            f"Name the labels in {output / DESCRIPTION} before you plan (they are called "
            f"{', '.join(f'label_{value}' for value in conversion.labels)}): names with left or right turn mirroring "
            "off."
        )
    if key is None:
        lines.append("Nothing records which case belongs to which patient, because --key was not given.")
    return "\n".join(lines)


def _write_conversion_tables(studies: Sequence[ConvertedStudy], contrasts: Sequence[str], output: Path) -> None:
    first = ("case", "patient", "session", "contrasts", "reference", "manufacturer", "model", KERNEL)
    columns = [*first, SLICE_THICKNESS, *(f"{name}_{column}" for name in contrasts for column in OF_CONTRAST)]
    write_records([study.row for study in studies if study.folder], columns, output / SCANS_TABLE)
    problems = ((study.case, *problem) for study in studies for problem in study.problems.items())
    write_rows(("case", "image", "problem"), problems, output / PROBLEMS)
