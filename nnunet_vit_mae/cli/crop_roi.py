"""Register scans to a template and crop the region drawn on it, for an nnU-Net data set that a reader can check."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_vit_mae.cli.arguments import checked_output, parser_for, positive_int
from nnunet_vit_mae.errors import UserError, exit_on_user_error
from nnunet_vit_mae.files import make_folder

if TYPE_CHECKING:
    from nnunet_vit_mae.datasets.crop.dataset import Cropping


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `mae3d_crop_roi`; the exit code is 2 when a scan could not be cropped."""
    args = _parser().parse_args(argv)
    output = checked_output(args.output)
    if args.reject and not args.images:
        from nnunet_vit_mae.datasets.crop.dataset import describe_like, finish, reject

        report(finish(reject(output, args.reject), output, describe_like(output / "imagesTr", args.contrasts)), output)
        return
    if not (args.images and args.templates and args.regions):
        raise UserError("Scans, templates and regions are needed: give -i, -t and -r (only --reject goes without).")
    if (args.csv is None) != (args.column is None):
        raise UserError("--csv and --template_column go together: give both, or neither.")

    from nnunet_vit_mae.datasets.crop.cropping import CropSettings, crop_scans
    from nnunet_vit_mae.datasets.crop.dataset import describe_like, finish, reject
    from nnunet_vit_mae.datasets.tables import read_case_table
    from nnunet_vit_mae.imaging.scans import find_scans

    scans = find_scans(args.images, args.labels)
    if output.absolute() in args.images.absolute().parents:
        raise UserError(f"{output} holds the scans themselves: give another data set with -o.")
    template_of = None
    if args.csv:
        table = read_case_table(args.csv, args.case, [scan.name for scan in scans])
        template_of = table.column(args.column, "--template_column")
    settings = CropSettings(output, args.templates, args.regions, args.margin, args.resample)
    make_folder(output)
    describe = describe_like(args.images, args.contrasts)
    cropping = finish(crop_scans(scans, settings, template_of, args.processes), output, describe)
    if args.reject:
        rows = reject(output, args.reject).rows
        cropping = finish(replace(cropping, rows=rows), output, describe)
    report(cropping, output)


def report(cropping: Cropping, output: Path) -> None:
    """Say what is there now and what to look at; raises `UserError` when a scan has failed."""
    from nnunet_vit_mae.datasets.crop.qc_table import DONE, QC_TABLE, REJECTED

    of_status = {status: [row for row in cropping.rows if row.status == status] for status in (DONE, REJECTED)}
    labelled = sum(row.folder == "imagesTr" for row in of_status[DONE])
    print(
        f"{output} has {labelled} cases with labels and {len(of_status[DONE]) - labelled} without; "
        f"{len(cropping.cropped)} cropped now, {len(of_status[REJECTED])} rejected."
    )
    partly = [row.case for row in of_status[DONE] if row.coverage is not None and row.coverage < 0.999]
    if partly:
        print(f"The region reaches beyond the field of view of {len(partly)}: see coverage in {output / QC_TABLE}.")
    if cut := [row.case for row in of_status[DONE] if row.label_inside is not None and row.label_inside < 1]:
        print(
            f"The crop cuts labelled voxels off in {len(cut)}: see label_inside in {output / QC_TABLE}, and --margin."
        )
    if cropping.sheets:
        print(
            f"Look at {cropping.sheets[0]} from the top, worst first, until all fit; write the cases that do not, one "
            "a line, to a text file, and give it with --reject."
        )
    if failed := cropping.failed:
        reasons = "; ".join(f"{case}: {problem}" for case, problem in sorted(failed.items()))
        raise UserError(
            f"{len(failed)} of {len(cropping.rows)} cases could not be cropped ({reasons}): mend or remove them and "
            "run the command again, all others are done."
        )


def _parser() -> argparse.ArgumentParser:
    parser = parser_for("mae3d_crop_roi", __doc__)
    add = parser.add_argument
    add("-i", dest="images", type=Path, metavar="FOLDER", help="scans: NIfTI, NRRD, MHA, or a folder of DICOM each")
    add("-l", dest="labels", type=Path, metavar="FOLDER", help="labels, named like their scans")
    add("-o", dest="output", type=Path, required=True, metavar="FOLDER", help="raw data set, e.g. Dataset501_Skull")
    add("-t", dest="templates", type=Path, nargs="+", default=[], metavar="FILE", help="templates")
    add("-r", dest="regions", type=Path, nargs="+", default=[], metavar="FILE", help="region on each template")
    add("--margin", type=_millimetres, default=5.0, metavar="MM", help="kept around the region")
    add("--csv", type=Path, metavar="FILE", help="table with the template of each case")
    add("--case", metavar="COLUMN", help="its column of cases, else the one in which they occur")
    help_ = "column of the template in --csv; without, the most similar template is taken"
    add("--template_column", dest="column", metavar="COLUMN", help=help_)
    add("--resample", action="store_true", help="crop on the template's grid instead of the scan's own voxels")
    add("--contrasts", nargs="+", metavar="NAME", help="names of the channels; without, those of the scans' data set")
    add("--reject", type=Path, metavar="FILE", help="cases to move out of the data set, one a line")
    add("-np", dest="processes", type=positive_int, default=4, metavar="N", help="processes")
    return parser


def _millimetres(text: str) -> float:
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return number
