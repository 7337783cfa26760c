"""A table of volumes for routine use, with a row for each case and label of a folder of scans.

The segmentations are kept beside the table, so that a stopped run can be continued; a note of the model is kept with
them, so that no table mixes two models. A scan that cannot be read gets a row with the reason and does not stop the
others.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nnunet_vit_mae.calibration.record import CALIBRATION_RECORD
from nnunet_vit_mae.errors import UserError, abbreviated, reader_reason
from nnunet_vit_mae.evaluation.clinical import find_cutoffs, group_names, group_of
from nnunet_vit_mae.imaging.channels import IMAGE_ENDINGS, visible_files
from nnunet_vit_mae.imaging.volumes import Geometry, ScanError, read_geometry, refuse_unusable, without_warnings_of_itk
from nnunet_vit_mae.nnunet.calibrated import read_calibration_of
from nnunet_vit_mae.nnunet.models import Model, model_hash
from nnunet_vit_mae.nnunet.plans import Plan, classes_of
from nnunet_vit_mae.nnunet.prediction import PredictionCase, find_prediction_cases, predict_cases, remove_outdated
from nnunet_vit_mae.nnunet.preprocessing import resampled_problem
from nnunet_vit_mae.nnunet.training_range import TrainingRange, read_training_range, volumes_in, warnings_of
from nnunet_vit_mae.nnunet.uncertainty import (
    LabelColumns,
    predict_with_uncertainty,
    read_uncertainty,
    remove_lone_maps,
)
from nnunet_vit_mae.progress import with_progress
from nnunet_vit_mae.storage.csv_tables import read_cells, read_frame, write_frame
from nnunet_vit_mae.storage.entries import read_entries
from nnunet_vit_mae.storage.files import locked, read_json, set_aside, write_json
from nnunet_vit_mae.storage.layout import CALIBRATED
from nnunet_vit_mae.units import rounded_mm3

logger = logging.getLogger(__name__)

MODEL_NOTE = "model.json"
OTHER_MODEL = "segmentations of another model"
COLUMNS = (  # of a table
    *("case", "label", "volume_mm3", "risk_group", "threshold", "slice_thickness_mm", "warnings"),
    *("volume_low_mm3", "volume_high_mm3", "expected_dice", "model"),
)


@dataclass(frozen=True)
class Part:
    """One of several processes among which the cases are divided, as nnU-Net divides them."""

    number: int = 0
    of: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.of:
            raise UserError(
                f"-part_id {self.number} is not one of the parts 0 to {self.of - 1} of -num_parts {self.of}."
            )

    def table(self, table: Path) -> Path:
        """Return the file for the rows of this part."""
        return table if self.of == 1 else table.with_name(f"{table.stem}_part{self.number}of{self.of}{table.suffix}")

    def note(self, table: Path) -> Path:
        """Return the file that says which cases and options the table of this part belongs to."""
        return segmentations_beside(table) / f".part{self.number}of{self.of}.json"


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
    ending, files = model.plan.dataset_json["file_ending"], [file.name for file in visible_files(images)]
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
    work, identity = segmentations_beside(table), model_hash(model)
    with locked(part.table(table)):
        note = {"model": identity}
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
            places = {
                "links": work / f"images_part{part.number}of{part.of}",
                "log": work / f"log_part{part.number}.txt",
            }
            predict_cases(model, scans.folder, [case.name for case in readable], work, **places, device=device)
        groups = {label: _RiskGroups.of(cutoffs, training.volumes.get(label)) for label in thresholds}
        rows: list[dict[str, Any]] = []
        for case, geometry in with_progress(geometries.items(), unit="case", desc="measuring"):
            of_case = _case_rows(model, case, geometry, work, training, thresholds, groups)
            rows += [row | more.get(case, {}).get(row["label"], {}) for row in of_case]
        for case, problem in problems.items():
            rows += [{"case": case, "label": label, "warnings": problem} for label in thresholds]
        # with more parts than cases, a part has no rows
        frame = pd.DataFrame(rows, columns=None if rows else ["case", "label", "warnings"])
        frame = frame.sort_values("case", kind="stable").assign(model=identity)
        described = note | {"cases": list(scans.names), "cutoffs": cutoffs and list(cutoffs), "level": level}
        keep_earlier(part.table(table), scans.names, COLUMNS)
        write_frame(frame, part.table(table))
        if problems:
            logger.warning(
                "%d of %d cases have no volume (%s): the column of warnings in %s says why.",
                len(problems),
                len(problems) + len(geometries),
                abbreviated(sorted(problems)),
                part.table(table).name,
            )
        write_json(described, part.note(table))
    if part.of > 1 and _join_parts(table, part.of, described):
        return [part.table(table), table]
    return [part.table(table)]


def _join_parts(table: Path, of: int, described: Mapping[str, Any]) -> bool:
    """Join the tables of all parts, if all are there and of one model, the same cases and the same options.

    Returns whether they were joined.
    """
    parts = [Part(number, of) for number in range(of)]
    if not all(part.table(table).is_file() for part in parts):
        return False
    notes = {part: read_json(part.note(table)) if part.note(table).is_file() else None for part in parts}
    if others := [part.table(table).name for part, note in notes.items() if note != described]:
        logger.warning(
            "%s: made with another model, for other cases or with other options than this part, and not joined into "
            "%s: run these parts again.",
            ", ".join(others),
            table.name,
        )
        return False
    frames = [read_frame(part.table(table), dtype=str, na_filter=False) for part in parts]
    keep_earlier(table, described["cases"], COLUMNS)
    write_frame(pd.concat(frames).sort_values("case", kind="stable"), table)
    return True


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


def refuse_other_table(table: Path) -> None:
    """Raise `UserError` if a table cannot be written by that name, or if there is one that is not of this command."""
    if table.is_dir() or table.suffix != ".csv":
        raise UserError(f"-o {table} is not a file name that ends in .csv: name the table to write.")
    if table.is_file() and not {"case", "label", "warnings", "model"} <= {*(read_cells(table) or [[]])[0]}:
        raise UserError(f"{table} is there already, and is not a table of mae3d_quantify: give another -o.")


def keep_earlier(table: Path, cases: Collection[str], columns: Collection[str]) -> None:
    """Move a table aside if the next one will lack cases of it, whose scans are gone, or columns that somebody added.

    Args:
        table: The table, which need not exist.
        cases: Of the next table.
        columns: That the next table may have.
    """
    header, *rows = (read_cells(table) if table.is_file() else []) or [[]]
    known = {row[header.index("case")] for row in rows} if "case" in header else set()
    more = known - {*cases, ""} or {*header} - {*columns, ""}
    if more:
        with suppress(FileNotFoundError):  # another part has moved it
            logger.warning(
                "%s has cases or columns that the new table will lack (%s), and was moved to %s.",
                table,
                abbreviated(sorted(more)),
                set_aside(table),
            )


def segmentations_beside(table: Path) -> Path:
    """Return the folder of the segmentations from which a table is made."""
    return table.with_name(f"{table.stem}_segmentations")


def refuse_other_content(folder: Path, note: Mapping[str, str], other: str) -> None:
    """Raise `UserError` for a folder that was written with another note in it, or without one; `other` is its content.

    The note says with which model the content was made. Names that begin with a dot do not count: another part may be
    writing its note.
    """
    content = [entry for entry in folder.iterdir() if not entry.name.startswith(".")] if folder.exists() else []
    # The note is looked for after its folder, so that one that appears meanwhile is not taken for other content.
    file = folder / MODEL_NOTE
    if file.is_file() and read_entries(dict[str, str], file, "remove that folder") != note:
        raise UserError(f"{folder} holds {other}: give another -o, or remove that folder.")
    if content and not file.is_file():
        raise UserError(f"{folder} is not empty: give another -o, or remove that folder.")


def _read_geometries(plan: Plan, scans: Scans) -> tuple[dict[str, Geometry], dict[str, str]]:
    """Return the geometry of each case that can be predicted, and why others cannot, by name."""
    geometries, problems = {}, dict(scans.unreadable)
    for case in with_progress(scans.cases, unit="case", desc="checking"):
        try:
            geometries[case.name] = _read_geometry(plan, case)
        except ScanError as error:
            problems[case.name] = str(error)
    return geometries, problems


def _read_geometry(plan: Plan, case: PredictionCase) -> Geometry:
    """Return the geometry of a case; raises `ScanError` if it cannot be predicted."""
    geometries = []
    for image in case.images:
        try:
            with without_warnings_of_itk():
                geometries.append(read_geometry(image))
        except Exception as error:  # noqa: BLE001 (each reader has errors of its own; the reason goes into the table)
            raise ScanError(f"{image.name} cannot be read ({reader_reason(error)})") from None
        if difference := geometries[0].difference(geometries[-1]):
            raise ScanError(f"{image.name} and {case.images[0].name} differ in {difference}")
    try:
        with without_warnings_of_itk():
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
    volumes = volumes_in(work / f"{case}{model.plan.dataset_json['file_ending']}", classes_of(model.plan))
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
