"""Convert DICOM files or a BIDS folder to an nnU-Net raw dataset, with contrasts by name and pseudonymous cases."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from nnunet_vit_mae.cli.arguments import parser_for, place_for_nnunet, positive_int, raw_dataset_folder
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.processes.signals import command
from nnunet_vit_mae.storage.unfinished import new_folder


@command("Studies that are done are kept, and the same command goes on with the others.")
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `mae3d_convert`; the exit code is 2 if a study or an image could not be converted."""
    parser = parser_for(
        "mae3d_convert",
        __doc__,
        "-i dicom -o Dataset501_Brain --contrast 'T1=*t1*' --contrast 'FLAIR=*flair*' --key key.csv",
    )
    add = parser.add_argument
    add("-i", dest="source", type=Path, required=True, metavar="FOLDER", help="DICOM files in any order, or BIDS")
    add("-o", dest="output", type=Path, required=True, metavar="FOLDER", help="new raw dataset, e.g. Dataset501_Head")
    help_ = "contrast and its series descriptions (DICOM) or file names (BIDS); repeat it in the order of channels, or "
    help_ += "leave it out to list the descriptions (DICOM)"
    add("--contrast", dest="contrasts", action="append", default=[], metavar="NAME=PATTERN", help=help_)
    help_ = "contrast that the others are registered to (otherwise the one of the label, or the first)"
    add("--reference", metavar="NAME", help=help_)
    help_ = "series descriptions (DICOM) or paths (BIDS, otherwise *_dseg, *_mask and *_msk) of labels"
    add("--labels", metavar="PATTERN", help=help_)
    help_ = "values in the labels, which get the numbers 1, 2 and so on in this order (only needed for other values)"
    add("--label_values", nargs="+", type=positive_int, default=[], metavar="N", help=help_)
    help_ = "private CSV file to write outside the dataset: which case belongs to which patient"
    add("--key", type=Path, metavar="FILE", help=help_)
    add("-np", dest="processes", type=positive_int, default=4, metavar="N", help="number of processes")
    args = parser.parse_args(argv)

    output = raw_dataset_folder(args.output)
    if not args.source.is_dir():
        raise UserError(f"{args.source} is not a folder: give the folder of DICOM files or the root of a BIDS folder.")
    call = {name: value for name, value in vars(args).items() if name != "label_values"}  # may be given at the end
    with new_folder(output, call):
        problem = _convert(args, output)
    if problem:
        raise UserError(problem)


def _convert(args: argparse.Namespace, output: Path) -> str:
    """Convert everything, and return what could not be done, if anything."""
    from nnunet_vit_mae.datasets.convert.conversion import CONTENTS, conversion_report, convert
    from nnunet_vit_mae.datasets.convert.sources import contrast_order, find_studies, parse_patterns, parse_reference
    from nnunet_vit_mae.storage.readme import write_readme

    patterns = parse_patterns(args.contrasts)
    found = find_studies(args.source, patterns, args.labels)
    contrasts = contrast_order(patterns, found.studies)
    reference = parse_reference(args.reference, contrasts)
    conversion = convert(found, contrasts, reference, output, args.key, args.label_values, args.processes)
    write_readme(output, CONTENTS, private=(args.source, args.key))
    print(conversion_report(conversion, contrasts, output, args.key))
    for warning in found.warnings:
        print(f"Warning: {warning}")
    if place := place_for_nnunet(output):
        print(place)
    return conversion.unfinished(output)
