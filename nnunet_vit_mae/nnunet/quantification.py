"""A table of volumes for routine use, with a row for each case and label of a folder of scans.

The segmentations are kept beside the table, so that a stopped run can be continued; a note of the model is kept with
them, so that no table mixes two models. A scan that cannot be read gets a row with the reason and does not stop the
others.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_vit_mae.calibration.record import CALIBRATION_RECORD
from nnunet_vit_mae.errors import UserError, abbreviated, reader_reason
from nnunet_vit_mae.evaluation.clinical import find_cutoffs, group_names, group_of
from nnunet_vit_mae.imaging.channels import IMAGE_ENDINGS, visible_files
from nnunet_vit_mae.imaging.volumes import Geometry, ScanError, read_geometry, refuse_unusable, without_warnings_of_itk
from nnunet_vit_mae.nnunet.calibrated import read_calibration_of
from nnunet_vit_mae.nnunet.models import Model, model_hash
from nnunet_vit_mae.nnunet.plans import Plan, classes_of
from nnunet_vit_mae.nnunet.predicted_members import remove_lone_maps
from nnunet_vit_mae.nnunet.prediction import PredictionCase, find_prediction_cases, predict_cases, remove_outdated
from nnunet_vit_mae.nnunet.preprocessing import resampled_problem
from nnunet_vit_mae.nnunet.training_range import TrainingRange, read_training_range, volumes_in, warnings_of
from nnunet_vit_mae.nnunet.uncertainty import LabelColumns, predict_with_uncertainty, read_uncertainty
from nnunet_vit_mae.nnunet.volume_tables import (
    MODEL_NOTE,
    OTHER_MODEL,
    Part,
    join_parts,
    refuse_other_content,
    refuse_other_table,
    segmentations_beside,
    write_part,
)
from nnunet_vit_mae.progress import with_progress
from nnunet_vit_mae.storage.files import locked, write_json
from nnunet_vit_mae.storage.layout import CALIBRATED
from nnunet_vit_mae.units import rounded_mm3

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scans:
    """The scans of one part: a folder named as nnU-Net expects, its cases, and why others could not be read."""

    folder: Path
    cases: Sequence[PredictionCase]
    names: Sequence[str]  # of the cases of all parts
    unreadable: Mapping[str, str] = field(default_factory=dict)
    converted: bool = False  # a moment ago, so that their age says nothing about the scans


def find_scans_to_quantify(model: Model, images: Path, part: Part = Part()) -> Scans:
    """Find the scans of a part in a folder that is named as nnU-Net expects; raises `UserError` if it has none.

    The log names images with another ending, which nnU-Net does not see.
    """
    cases = find_prediction_cases(model.plan, images, all_usable=False)  # the table says which ones are not
    ending, files = model.plan.file_ending, [file.name for file in visible_files(images)]
    if others := [name for name in files if name.lower().endswith(IMAGE_ENDINGS) and not name.endswith(ending)]:
        logger.warning(
            "%d images in %s do not end with %s and are left out (%s): convert or rename them.",
            len(others),
            images,
            ending,
            abbreviated(others),
        )
    return Scans(images, cases[part.number :: part.of], [case.name for case in cases])


def quantify(
    model: Model,
    scans: Scans,
    table: Path,
    part: Part = Part(),
    *,
    cutoffs: Sequence[float] | None = None,
    device: str = "cuda",
    level: float | None = None,
) -> list[Path]:
    """Predict the scans of a part and write the table; the part that ends last joins the tables of all parts.

    Tables of parts that another model has made, or of other cases or options, are not joined, and the log names them.

    Segmentations are written to `TABLE_segmentations` beside the table. With a `level`, maps of uncertainty are written
    to `TABLE_uncertainty`.

    Args:
        model: The model to predict with; see `find_model`.
        scans: The scans to predict; see `find_scans_to_quantify`.
        table: The CSV file to write.
        part: Which of several parts of the cases to predict here.
        cutoffs: Volumes in mm3 between risk groups, ascending; None: quartiles of the labelled cases that are not held
            out for testing.
        device: `cuda` or `cpu`.
        level: Coverage of the intervals of volumes, such as 0.9, which come with the expected Dice; None: neither.

    Returns:
        The tables that were written.

    Raises:
        UserError: For segmentations of another model there, if another process writes the table, if its name is that of
            another table, and if the prediction fails.

    Example:
        >>> from nnunet_vit_mae import find_model
        >>> model = find_model("901", trainer="nnUNetTrainerBaseline")
        >>> scans = find_scans_to_quantify(model, Path("images").resolve())
        >>> tables = quantify(model, scans, Path("volumes.csv").resolve(), device="cpu")
        >>> [table.name for table in tables]
        ['volumes.csv']
    """
    refuse_other_table(table)
    work, note = segmentations_beside(table), {"model": model_hash(model)}
    with locked(part.table(table)):
        refuse_other_content(work, note, OTHER_MODEL)
        thresholds = thresholds_of(model)  # refuses a bad record before anything is predicted
        uncertainty = None if level is None else read_uncertainty(model)
        training = read_training_range(model)
        write_json(note, work / MODEL_NOTE)
        geometries, problems = _read_geometries(model.plan, scans)
        readable = [case for case in scans.cases if case.name in geometries]
        if not scans.converted:
            remove_outdated(model.plan, scans.cases, work)  # also of those that cannot be predicted any more
        maps = table.with_name(f"{table.stem}_uncertainty")
        remove_lone_maps(model, work, maps)
        more: Mapping[str, LabelColumns] = {}
        if uncertainty is not None and level is not None:
            more = predict_with_uncertainty(model, uncertainty, readable, work, maps, device=device, level=level)
        else:
            places = {"links": work / f"images_{part.name}", "log": work / f"log_part{part.number}.txt"}
            predict_cases(model, scans.folder, [case.name for case in readable], work, **places, device=device)
        groups = {label: _RiskGroups.of(cutoffs, training.volumes.get(label)) for label in thresholds}
        rows: list[dict[str, Any]] = []
        for case, geometry in with_progress(geometries.items(), unit="case", desc="measuring"):
            of_case = _case_rows(model, case, geometry, work, training, thresholds, groups)
            rows += [row | more.get(case, {}).get(row["label"], {}) for row in of_case]
        for case, problem in problems.items():
            rows += [{"case": case, "label": label, "warnings": problem} for label in thresholds]
        made_from = note | {"cases": list(scans.names), "cutoffs": cutoffs and list(cutoffs), "level": level}
        write_part(rows, table, part, made_from)
    if problems:
        logger.warning(
            "%d of %d cases have no volume (%s): the column of warnings in %s says why.",
            len(problems),
            len(problems) + len(geometries),
            abbreviated(sorted(problems)),
            part.table(table).name,
        )
    if part.of > 1 and join_parts(table, part.of, made_from):
        return [part.table(table), table]
    return [part.table(table)]


def thresholds_of(model: Model) -> dict[str, float]:
    """Return the threshold of each label: the calibrated one, or nnU-Net's 0.5."""
    if model.checkpoint == CALIBRATED:
        record = read_calibration_of(model)
        thresholds = record.content["thresholds"]
        if {*thresholds} != {*classes_of(model.plan).names}:
            raise UserError(
                f"{record.folder / CALIBRATION_RECORD} has other labels than the model: calibrate it again."
            )
        return thresholds
    return dict.fromkeys(classes_of(model.plan).names, 0.5)


def _read_geometries(plan: Plan, scans: Scans) -> tuple[dict[str, Geometry], dict[str, str]]:
    """Return the geometry of each case that can be predicted, and why others cannot, by name."""
    geometries, problems = {}, dict(scans.unreadable)
    for case in with_progress(scans.cases, unit="case", desc="checking"):
        try:
            with without_warnings_of_itk():
                geometries[case.name] = _read_geometry(plan, case)
        except ScanError as error:
            problems[case.name] = str(error)
    return geometries, problems


def _read_geometry(plan: Plan, case: PredictionCase) -> Geometry:
    """Return the geometry of a case; raises `ScanError` if it cannot be predicted."""
    geometries = []
    for image in case.images:
        try:
            geometries.append(read_geometry(image))
        except Exception as error:  # noqa: BLE001 (each reader has errors of its own; the reason goes into the table)
            raise ScanError(f"{image.name} cannot be read ({reader_reason(error)})") from None
        if difference := geometries[0].difference(geometries[-1]):
            raise ScanError(f"{image.name} and {case.images[0].name} differ in {difference}")
    try:
        refuse_unusable(case.images, geometries[0])
    except ScanError:
        raise
    except Exception as error:  # noqa: BLE001 (a header alone does not tell that voxels can be read)
        raise ScanError(f"{case.images[0].name} or another channel cannot be read ({reader_reason(error)})") from None
    if problem := resampled_problem(plan, geometries[0].size[::-1], geometries[0].spacing[::-1]):
        raise ScanError(problem)
    return geometries[0]


@dataclass(frozen=True)
class _RiskGroups:
    """The risk groups of a label, if any."""

    cutoffs: Sequence[float]  # mm3, ascending
    names: Sequence[str]

    @classmethod
    def of(cls, given: Sequence[float] | None, training: np.ndarray | None) -> _RiskGroups:
        """Return those between given cutoffs, or else between the quartiles of the training volumes."""
        cutoffs = given or ([] if training is None else find_cutoffs(training, None)[0])
        return cls(cutoffs, group_names(cutoffs, bool(given)) if cutoffs else [""])

    def name(self, volume: float) -> str:
        """Return the group of a volume in mm3; empty if there are no groups."""
        return self.names[int(group_of(np.array(volume), self.cutoffs))]


def _case_rows(
    model: Model,
    case: str,
    geometry: Geometry,
    work: Path,
    training: TrainingRange,
    thresholds: Mapping[str, float],
    groups: Mapping[str, _RiskGroups],
) -> list[dict[str, Any]]:
    """Return a row for each label of a case."""
    volumes = volumes_in(work / f"{case}{model.plan.file_ending}", classes_of(model.plan))
    warnings = warnings_of(geometry, volumes, training)
    return [
        {
            "case": case,
            "label": label,
            "volume_mm3": rounded_mm3(volume),
            "risk_group": groups[label].name(volume),
            "threshold": round(thresholds[label], 6),
            "slice_thickness_mm": round(max(geometry.spacing), 4),
            "warnings": "; ".join(warnings[label]),
        }
        for label, volume in volumes.items()
    ]
