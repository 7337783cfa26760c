"""DICOM in and DICOM out: a table of volumes, and a segmentation and a report of each study for the PACS."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from highdicom import UID

from nnunet_vit_mae import __version__
from nnunet_vit_mae.errors import abbreviated
from nnunet_vit_mae.imaging.dicom import DicomSeries
from nnunet_vit_mae.imaging.dicom_codes import LabelCodes
from nnunet_vit_mae.imaging.dicom_report import report_of
from nnunet_vit_mae.imaging.dicom_segmentation import (
    Algorithm,
    DicomOutputError,
    Segment,
    read_source,
    segmentation_of,
    write_dicom_file,
)
from nnunet_vit_mae.imaging.labels import read_mask
from nnunet_vit_mae.imaging.volumes import without_warnings_of_itk
from nnunet_vit_mae.nnunet.dicom_scans import DicomInput, convert_cases, find_study_cases, write_study_table
from nnunet_vit_mae.nnunet.models import Model, model_hash
from nnunet_vit_mae.nnunet.plans import classes_of
from nnunet_vit_mae.nnunet.quantification import quantify, thresholds_of
from nnunet_vit_mae.nnunet.training_range import volumes_in
from nnunet_vit_mae.nnunet.volume_tables import (
    MODEL_NOTE,
    OTHER_MODEL,
    Part,
    refuse_other_content,
    refuse_other_table,
    segmentations_beside,
)
from nnunet_vit_mae.progress import with_progress
from nnunet_vit_mae.storage.files import locked, short_hash, write_json

SEGMENTATION, REPORT, STUDIES = "segmentation.dcm", "report.dcm", "studies.csv"


@dataclass(frozen=True)
class DicomResult:
    """The tables that were written, the folder of DICOM files beside them, and what is missing there, by case."""

    tables: list[Path]
    folder: Path
    problems: dict[str, str]
    damaged: int  # files that belong to no readable series

    @property
    def unfinished(self) -> str:
        """What could not be done, or an empty string."""
        parts = []
        if self.problems:
            reasons = abbreviated(f"{case} {reason}" for case, reason in self.problems.items())
            parts.append(f"some cases have volumes, but no DICOM files ({reasons})")
        if self.damaged:
            parts.append(f"{self.damaged} files cannot be read and belong to no readable series, copy them again")
        sentence = "; ".join(parts)
        return f"{sentence[:1].upper()}{sentence[1:]}." if parts else ""


def quantify_dicom(
    model: Model,
    source: DicomInput,
    table: Path,
    part: Part,
    *,
    codes: Mapping[str, LabelCodes],
    cutoffs: Sequence[float] | None,
    device: str,
    level: float | None = None,
) -> DicomResult:
    """Quantify the studies of a part, and write segmentation and report of each to `TABLE_dicom` beside the table.

    A case whose report is there already is left as it is. One for which no DICOM can be written does not stop the
    others.

    Args:
        model: The model.
        source: The studies.
        table: The table to write, see `quantify`.
        part: The part of the studies, sorted by case.
        codes: What each label of the model shows.
        cutoffs: Volumes between risk groups.
        device: Where to predict.
        level: Of the interval that each volume gets, see `quantify`; None: no intervals and no expected Dice.

    Returns:
        What was written, and what could not be.

    Raises:
        UserError: If the studies do not fit the model, for files of another model there, and as `quantify` does.
    """
    refuse_other_table(table)
    identity, work = model_hash(model), segmentations_beside(table)
    output = table.with_name(f"{table.stem}_dicom")
    note = {"model": identity, "codes": short_hash(repr(sorted(codes.items())), 12)}
    # all of this before images are converted, which takes long
    refuse_other_content(work, {"model": identity}, OTHER_MODEL)
    refuse_other_content(output, note, "DICOM files of another model or with other codes")
    thresholds = thresholds_of(model)
    cases, damaged = find_study_cases(model, source)
    write_json(note, output / MODEL_NOTE)
    write_study_table(model, cases, output / STUDIES)
    with _folder_of_images(part.table(table)) as folder:
        converted = convert_cases(model, cases, part, folder)
        tables = quantify(model, converted.scans, table, part, cutoffs=cutoffs, device=device, level=level)
    writer = _CaseWriter(model, codes, thresholds, _algorithm(model, identity))
    problems = {}
    for case, series in with_progress(converted.series.items(), unit="case", desc="writing DICOM"):
        segmentation = work / f"{case}{model.plan.file_ending}"
        if segmentation.is_file() and not (output / case / REPORT).is_file():  # without one, the table says why
            try:
                writer.write(series, segmentation, output / case)
            except DicomOutputError as error:
                problems[case] = str(error)
    return DicomResult(tables, output, problems, damaged)


@contextmanager
def _folder_of_images(table: Path) -> Iterator[Path]:
    """Hold a folder beside a table for images of patients, which go when the block ends.

    A call that is killed leaves them behind; the next one for this table removes them.
    """
    folder = table.with_name(f".{table.stem}_images")
    with locked(folder):
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder)


@dataclass(frozen=True)
class _CaseWriter:
    """What all cases have in common."""

    model: Model
    codes: Mapping[str, LabelCodes]
    thresholds: Mapping[str, float]
    algorithm: Algorithm

    def write(self, series: DicomSeries, segmentation: Path, folder: Path) -> None:
        """Write the DICOM segmentation of a case, unless nothing was found, and then its report.

        Raises `DicomOutputError` if the series allows none.
        """
        source, segments = read_source(series), self._segments(segmentation)
        dataset = segmentation_of(source, segments, self.algorithm)
        report = report_of(source, segments, dataset, self.algorithm)
        if dataset is not None:
            write_dicom_file(dataset, folder / SEGMENTATION)
        write_dicom_file(report, folder / REPORT)

    def _segments(self, segmentation: Path) -> list[Segment]:
        classes = classes_of(self.model.plan)
        volumes = volumes_in(segmentation, classes)
        with without_warnings_of_itk():
            labels = read_mask(segmentation)
        return [
            Segment(name, self.codes[name], self.thresholds[name], np.isin(labels, values), volumes[name], UID())
            for name, values in zip(classes.names, classes.values, strict=True)
        ]


def _algorithm(model: Model, identity: str) -> Algorithm:
    parameters = {
        "trainer": model.trainer,
        "plans": model.plan.plans_name,
        "configuration": model.plan.name,
        "folds": " ".join(model.folds),
        "checkpoint": model.checkpoint,
        "model": identity,
    }
    return Algorithm("nnunet-vit-mae", __version__, identity, parameters)
