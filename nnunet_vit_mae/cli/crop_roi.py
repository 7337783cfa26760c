"""Register scans to a template and crop the region drawn on it; the result is an nnU-Net dataset to check by eye."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nnunet_vit_mae.cli.arguments import parser_for, place_for_nnunet, positive_int, raw_dataset_folder
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.processes.signals import command


@command("Cases that are done are kept, and the same command goes on with the others.")
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `mae3d_crop_roi`; the exit code is 2 if a scan could not be cropped."""
    args = _parser().parse_args(argv)
    output = raw_dataset_folder(args.output)
    only_reject = args.reject and not args.images
    if not only_reject and not (args.images and args.templates and args.regions):
        raise UserError("Scans, templates and regions are needed (except with --reject alone): give -i, -t and -r.")
    if not only_reject and (args.csv is None) != (args.column is None):
        raise UserError("--csv and --template_column go together: give both or neither.")

    from nnunet_vit_mae.datasets.crop.cropping import TemplateColumn, crop_folder
    from nnunet_vit_mae.datasets.crop.dataset import CONTENTS, cropping_report, reject_cases
    from nnunet_vit_mae.datasets.crop.one_case import CropSettings
    from nnunet_vit_mae.storage.readme import write_readme

    if only_reject:
        cropping = reject_cases(output, args.reject, args.contrasts)
    else:
        settings = CropSettings(output, args.templates, args.regions, args.margin, args.resample)
        column = TemplateColumn(args.csv, args.case, args.column) if args.csv else None
        cropping = crop_folder(args.images, args.labels, settings, column, args.contrasts, args.processes)
        if args.reject:
            left = reject_cases(output, args.reject, args.contrasts)
            cropping = replace(cropping, rows=left.rows, sheets=left.sheets)
    write_readme(output, CONTENTS, private=(args.images, args.labels))
    print(cropping_report(cropping, output))
    if place := place_for_nnunet(output):
        print(place)
    if cropping.failed:
        raise UserError(cropping.failure())


def _parser() -> argparse.ArgumentParser:
    scans = "-i Dataset501_Heads/imagesTr -l Dataset501_Heads/labelsTr"
    example = f"{scans} -o Dataset502_Region -t template.nii.gz -r region.nii.gz"
    parser = parser_for("mae3d_crop_roi", __doc__, example)
    add = parser.add_argument
    add("-i", dest="images", type=Path, metavar="FOLDER", help="scans: NIfTI, NRRD, MHA, or one DICOM folder each")
    add("-l", dest="labels", type=Path, metavar="FOLDER", help="labels, named like their scans")
    add("-o", dest="output", type=Path, required=True, metavar="FOLDER", help="raw dataset, e.g. Dataset501_Skull")
    add("-t", dest="templates", type=Path, nargs="+", default=[], metavar="FILE", help="templates")
    add("-r", dest="regions", type=Path, nargs="+", default=[], metavar="FILE", help="region drawn on each template")
    add("--margin", type=_millimetres, default=5.0, metavar="MM", help="margin around the region")
    add("--csv", type=Path, metavar="FILE", help="table with the template of each case")
    add("--case", metavar="COLUMN", help="column of the table with case names (otherwise detected)")
    help_ = "column of the table with templates; without it, the most similar template is used"
    add("--template_column", dest="column", metavar="COLUMN", help=help_)
    add("--resample", action="store_true", help="crop on the template's grid instead of the scan's own voxels")
    add("--contrasts", nargs="+", metavar="NAME", help="channel names (otherwise those of the scans' dataset)")
    add("--reject", type=Path, metavar="FILE", help="text file of cases to move out of the dataset, one per line")
    add("-np", dest="processes", type=positive_int, default=4, metavar="N", help="number of processes")
    return parser


def _millimetres(text: str) -> float:
    """Argparse type of a finite length, 0 or more."""
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return number
