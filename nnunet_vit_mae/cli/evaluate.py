"""Compare predictions with reference segmentations: tables, intervals, tests, risk groups, figures and a report."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_vit_mae.cli.arguments import parser_for, positive_float, positive_int, whole_number
from nnunet_vit_mae.errors import UserError, exit_on_user_error
from nnunet_vit_mae.files import make_folder, refuse_in_use

if TYPE_CHECKING:
    from nnunet_vit_mae.evaluation.results import Evaluation, Mean

HEADLINE = {"dice": ("Dice", 3), "absolute_difference_mm3": ("|volume difference| mm3", 1), "hd95_mm": ("HD95 mm", 2)}
CALIBRATION = "calibration.json"


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `mae3d_evaluate`."""
    parser = parser_for("mae3d_evaluate", __doc__)
    add = parser.add_argument
    add("-r", dest="references", required=True, type=Path, metavar="FOLDER", help="reference segmentations")
    add(
        "-p",
        dest="predictions",
        required=True,
        action="append",
        metavar="NAME=FOLDER",
        help="predictions of a model, once for each; FOLDER alone is named after itself",
    )
    add("-i", dest="images", type=Path, metavar="FOLDER", help="images, for slice thickness and pictures")
    add("-o", dest="output", required=True, type=Path, metavar="FOLDER", help="new folder for the report")
    group = {"type": positive_float, "nargs": "+"}
    add("--cutoffs", **group, metavar="MM3", help="volumes between risk groups, else quartiles")
    add("--thickness_bins", **group, metavar="MM", help="slice thicknesses between bins, else quartiles")
    add("--tolerance", type=positive_float, default=1.0, metavar="MM", help="tolerance of the surface Dice")
    add("--min_lesion_voxels", type=positive_int, default=1, metavar="N", help="smallest lesion that counts")
    add("--resamples", type=positive_int, default=1000, metavar="N", help="bootstrap resamples")
    add("--seed", type=whole_number, default=0, metavar="N", help="seed of the bootstrap")
    add(
        "--calibration",
        dest="calibrations",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help=f"what mae3d_calibrate wrote for a model: {CALIBRATION}, or the folder that it is in",
    )
    add("-np", dest="processes", type=positive_int, metavar="N", help="processes (default: one for 20 cases, up to 4)")
    args = parser.parse_args(argv)

    predictions = _named(args.predictions, "-p")
    calibrations = _calibrations(args.calibrations, list(predictions))
    for flag, values in {"--cutoffs": args.cutoffs, "--thickness_bins": args.thickness_bins}.items():
        if values and any(low >= high for low, high in pairwise(values)):
            raise UserError(f"{flag} {' '.join(f'{value:g}' for value in values)}: give ascending numbers.")
    refuse_in_use(args.output)

    from nnunet_vit_mae.evaluation.cases import find_evaluation_set, measure_cases
    from nnunet_vit_mae.evaluation.report import read_calibration, write_report
    from nnunet_vit_mae.evaluation.results import Options
    from nnunet_vit_mae.evaluation.summary import evaluate, write_tables

    options = Options(
        tolerance_mm=args.tolerance,
        min_lesion_voxels=args.min_lesion_voxels,
        cutoffs_mm3=tuple(args.cutoffs) if args.cutoffs else None,
        thickness_bins_mm=tuple(args.thickness_bins) if args.thickness_bins else None,
        resamples=args.resamples,
        seed=args.seed,
    )
    for file in calibrations.values():
        read_calibration(file)  # a mistake is better known before hours of measuring than after
    study = find_evaluation_set(args.references, predictions, args.images)
    make_folder(args.output)
    # a process takes as long to start as several cases take to measure
    processes = args.processes or min(4, 1 + len(study.cases) // 20)
    table, notes = measure_cases(study, options, processes)
    evaluation = evaluate(table, study.models, list(study.labels.values), options, [*study.notes, *notes])
    write_tables(evaluation, args.output)
    print(headline_text(evaluation), flush=True)
    write_report(
        evaluation,
        args.output,
        references=args.references,
        predictions=predictions,
        images=args.images,
        calibrations=calibrations,
    )
    print(f"Wrote index.html, cases.csv, summary.json and figures to {args.output}.")


def headline_text(evaluation: Evaluation) -> str:
    """Three means of each model and label with their intervals, what two models differ by, and the notes, as text."""
    rows = [["label", "model", "cases", *(title for title, _ in HEADLINE.values())]]
    means = {(mean.label, mean.model, mean.measure): mean for mean in evaluation.means}
    for label in evaluation.labels:
        for model in evaluation.models:
            found = [means[label, model, measure] for measure in HEADLINE]
            cases = str(found[0].n + found[0].left_out)
            rows.append([label, model, cases, *(_mean(mean, HEADLINE[mean.measure][1]) for mean in found)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    confidence = f"{100 * float(str(evaluation.settings['confidence'])):g}%"
    lines.append(f"Means with {confidence} bootstrap intervals; n: cases in which it is defined, where not in all.")
    if len(evaluation.models) == 2:
        for test in evaluation.tests:
            if test.measure in HEADLINE and test.p is not None:
                title, digits = HEADLINE[test.measure]
                lines.append(
                    f"{test.label}: {title}, {test.second} minus {test.first}: {test.difference:+.{digits}f} "
                    f"(n={test.n}, p={test.p:.2g}, {test.p_holm:.2g} after Holm's correction)"
                )
    return "\n".join([*lines, *evaluation.notes])


def _mean(mean: Mean, digits: int) -> str:
    if not mean.n:
        return "-"
    text = f"{mean.mean:.{digits}f}"
    if mean.n > 1:
        text += f" [{mean.low:.{digits}f}, {mean.high:.{digits}f}]"
    return text + (f" n={mean.n}" if mean.left_out else "")


def _named(values: Sequence[str], flag: str) -> dict[str, Path]:
    """`NAME=PATH`, or `PATH` named after its last part; raises `UserError` for other forms and equal names."""
    named: dict[str, Path] = {}
    for value in values:
        name, sign, path = value.partition("=")
        if not sign or Path(value).exists():
            name, path = Path(value).resolve().name, value
        if not (name.strip() and path) or "/" in name or "\\" in name:
            raise UserError(f"{flag} {value}: write NAME=FOLDER, for example {flag} ViT=predictions.")
        if name in named:
            raise UserError(
                f"{flag} {value}: there is another {name}; give every model a name of its own, NAME=FOLDER."
            )
        named[name] = Path(path)
    return named


def _calibrations(values: Sequence[str], models: Sequence[str]) -> dict[str, Path]:
    """The files by model; raises `UserError` for unknown models and missing files."""
    for value in values:
        if "=" not in value:
            raise UserError(f"--calibration {value}: write NAME=PATH, with a NAME that -p has.")
    files = {}
    for name, path in _named(values, "--calibration").items():
        file = path / CALIBRATION if path.is_dir() else path
        if name not in models:
            raise UserError(f"--calibration {name}={path}: there is no model {name}, only {', '.join(models)}.")
        if not file.is_file():
            raise UserError(f"{file} is missing: run mae3d_calibrate, or check --calibration.")
        files[name] = file
    return files
