"""Compare predictions with reference segmentations, and write tables, statistics, figures and a report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_vit_mae.calibration.record import CALIBRATION_RECORD, CalibrationRecord, read_calibration
from nnunet_vit_mae.cli.arguments import parser_for, positive_float, positive_int, refuse_not_ascending, whole_number
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.evaluation.results import EvaluationOptions
from nnunet_vit_mae.processes.signals import command
from nnunet_vit_mae.storage.unfinished import new_folder

if TYPE_CHECKING:
    from nnunet_vit_mae.evaluation.cases import EvaluationSet


@command()
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `mae3d_evaluate`."""
    args = _parser().parse_args(argv)
    predictions = _paths_by_name(args.predictions, "-p")
    records = _paths_by_model(args.calibrations, "--calibration", list(predictions))
    calibrations = {name: read_calibration(path) for name, path in records.items()}
    tables = _paths_by_model(args.expected, "--uncertainty", list(predictions))
    models = _paths_by_model(args.model_folders, "--model_folder", list(predictions))
    refuse_not_ascending("--cutoffs", args.cutoffs)
    refuse_not_ascending("--thickness_bins", args.thickness_bins)
    call = {"predictions": predictions, "calibrations": records, "expected": tables, "model_folders": models}
    with new_folder(args.output, vars(args) | call):
        _evaluate(args, predictions, calibrations, tables, models)
    print(f"Wrote index.html, cases.csv, summary.json and figures to {args.output}.")


def _parser() -> argparse.ArgumentParser:
    parser = parser_for(
        "mae3d_evaluate", __doc__, "-r labelsTs -p ViT=predictions_vit -p nnU-Net=predictions_unet -o report"
    )
    add = parser.add_argument
    add("-r", dest="references", required=True, type=Path, metavar="FOLDER", help="folder of reference segmentations")
    add(
        "-p",
        dest="predictions",
        required=True,
        action="append",
        metavar="NAME=FOLDER",
        help="folder of a model's predictions; repeat for each model; without NAME the model gets the folder's name",
    )
    add("-i", dest="images", type=Path, metavar="FOLDER", help="folder of images, for slice thickness and figures")
    help_ = "table with slice_thickness_mm and patients (otherwise scans.csv of the dataset)"
    add("--csv", type=Path, metavar="FILE", help=help_)
    add("--patient", metavar="COLUMN", help="column of the table with patients (default: patient, if there is one)")
    add("-o", dest="output", required=True, type=Path, metavar="FOLDER", help="new folder for the report")
    group = {"type": positive_float, "nargs": "+"}
    add("--cutoffs", **group, metavar="MM3", help="cutoffs between risk groups (default: quartiles of the reference)")
    add("--thickness_bins", **group, metavar="MM", help="slice thicknesses between bins (default: quartiles)")
    usual = EvaluationOptions()
    help_ = "tolerance of the surface Dice"
    add("--tolerance", type=positive_float, default=usual.tolerance_mm, metavar="MM", help=help_)
    help_ = "smallest component that counts as a lesion"
    add("--min_lesion_voxels", type=positive_int, default=usual.min_lesion_voxels, metavar="N", help=help_)
    add("--resamples", type=positive_int, default=usual.resamples, metavar="N", help="number of bootstrap resamples")
    add("--seed", type=whole_number, default=usual.seed, metavar="N", help="random seed of the bootstrap")
    add(
        "--calibration",
        dest="calibrations",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help=f"calibration of a model: its {CALIBRATION_RECORD}, written by mae3d_calibrate, or the folder with it",
    )
    add(
        "--uncertainty",
        dest="expected",
        action="append",
        default=[],
        metavar="NAME=TABLE.csv",
        help="table of mae3d_quantify --uncertainty of a model, to list the cases to look at first",
    )
    add(
        "--model_folder",
        dest="model_folders",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="nnU-Net's folder of a model (TRAINER__PLANS__CONFIGURATION), for Dice by token and model size",
    )
    add(
        "-np",
        dest="processes",
        type=positive_int,
        metavar="N",
        help="number of processes (default: one for every 20 cases, up to 4)",
    )
    return parser


def _evaluate(
    args: argparse.Namespace,
    predictions: dict[str, Path],
    calibrations: dict[str, CalibrationRecord],
    tables: dict[str, Path],
    models: dict[str, Path],
) -> None:
    from nnunet_vit_mae.evaluation.by_token import read_trained_vit
    from nnunet_vit_mae.evaluation.cases import find_evaluation_set
    from nnunet_vit_mae.evaluation.expected import read_expected, with_expected
    from nnunet_vit_mae.evaluation.headline import headline_text
    from nnunet_vit_mae.evaluation.report import write_report
    from nnunet_vit_mae.evaluation.summary import evaluate, write_tables

    options = EvaluationOptions(
        tolerance_mm=args.tolerance,
        min_lesion_voxels=args.min_lesion_voxels,
        cutoffs_mm3=tuple(args.cutoffs) if args.cutoffs else None,
        thickness_bins_mm=tuple(args.thickness_bins) if args.thickness_bins else None,
        resamples=args.resamples,
        seed=args.seed,
    )
    expected = {name: read_expected(file) for name, file in tables.items()}
    vits = {name: read_trained_vit(folder) for name, folder in models.items()}
    evaluation_set = _with_scans(find_evaluation_set(args.references, predictions, args.images), args)
    evaluation = with_expected(evaluate(evaluation_set, options, args.processes), expected)
    write_tables(evaluation, args.output)
    print(headline_text(evaluation), flush=True)
    write_report(evaluation, evaluation_set, calibrations, args.output, vits)


def _with_scans(evaluation_set: EvaluationSet, args: argparse.Namespace) -> EvaluationSet:
    """Return the set with the slice thickness and the patient of each case, as far as a table of scans has them."""
    from nnunet_vit_mae.datasets.acquisition import (
        PATIENT,
        SLICE_THICKNESS,
        find_scans_table,
        read_scans_table,
        slice_thickness,
    )
    from nnunet_vit_mae.datasets.split.patients import patient_of

    folders = [folder.resolve().parent for folder in (args.images, args.references) if folder]
    table = args.csv or find_scans_table([args.references, *folders])
    if table is None:
        if args.patient:
            raise UserError(f"--patient {args.patient} names a column of a table: give it with --csv.")
        return evaluation_set
    names = [case.name for case in evaluation_set.cases]
    scans = read_scans_table(table, names)
    known = scans.patients(args.patient) if args.patient else scans.known(PATIENT)
    if SLICE_THICKNESS in scans.columns or not known:
        evaluation_set = evaluation_set.with_slice_thickness(slice_thickness(scans), table)
    unknown = [name for name in names if name not in known] if known else []
    return evaluation_set.with_patients({name: patient_of(name, known) for name in names}, unknown, table)


def _paths_by_name(values: Sequence[str], flag: str) -> dict[str, Path]:
    """Read `NAME=PATH`, or `PATH` named after its last part; raise `UserError` for other forms and equal names."""
    paths: dict[str, Path] = {}
    for value in values:
        name, sign, path = value.partition("=")
        if not sign or Path(value).exists():
            name, path = Path(value).resolve().name, value
        if not (name.strip() and path) or "/" in name or "\\" in name:
            raise UserError(f"{flag} {value}: write NAME=FOLDER, for example {flag} ViT=predictions.")
        if name in paths:
            raise UserError(
                f"{flag} {value}: there is another model named {name}; give every model its own name, NAME=FOLDER."
            )
        paths[name] = Path(path)
    return paths


def _paths_by_model(values: Sequence[str], flag: str, models: Sequence[str]) -> dict[str, Path]:
    """Read `NAME=PATH` by model; raise `UserError` for other forms and unknown models."""
    for value in values:
        if "=" not in value:
            raise UserError(f"{flag} {value}: write NAME=PATH, with the NAME of a model in -p.")
    paths = _paths_by_name(values, flag)
    for name, path in paths.items():
        if name not in models:
            raise UserError(f"{flag} {name}={path}: there is no model {name}, only {', '.join(models)}.")
    return paths
