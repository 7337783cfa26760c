"""Segment a folder of scans, and write a table of volumes with warnings for the reader."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_vit_mae.cli.arguments import (
    add_device_argument,
    add_model_arguments,
    chosen_model,
    parser_for,
    positive_float,
    positive_int,
    refuse_not_ascending,
    share,
    usable_device,
    whole_number,
)
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.processes.signals import command

if TYPE_CHECKING:
    from nnunet_vit_mae.nnunet.models import Model
    from nnunet_vit_mae.nnunet.volume_tables import Part


@command("Segmentations that are done are kept, and the same command goes on with the others.")
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `mae3d_quantify`."""
    args = _parser().parse_args(argv)
    if args.coverage is not None and not args.uncertainty:
        raise UserError("--coverage is for intervals of volumes: add --uncertainty, or leave it out.")
    refuse_not_ascending("--cutoffs", args.cutoffs)
    _refuse_unusable_dicom(args)

    from nnunet_vit_mae.nnunet.quantification import find_scans_to_quantify, quantify
    from nnunet_vit_mae.nnunet.uncertainty import LEVEL
    from nnunet_vit_mae.nnunet.volume_tables import Part

    device = usable_device(args.device).type
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("highdicom").setLevel(logging.WARNING)  # it reports every module that it copies
    part = Part(args.part_id, args.num_parts)
    model = chosen_model(args)
    images, table = args.images.resolve(), args.table.resolve()
    level = (args.coverage or LEVEL) if args.uncertainty else None
    options = {"cutoffs": args.cutoffs, "device": device, "level": level}
    if args.dicom:
        tables, unfinished = _quantify_dicom(model, images, table, part, args, options)
    else:
        tables, unfinished = quantify(model, find_scans_to_quantify(model, images, part), table, part, **options), ""
    written = f"segmentations in {table.stem}_segmentations{f' and {table.stem}_dicom' if args.dicom else ''}"
    print(f"Wrote {' and '.join(map(str, tables))} with {model.checkpoint}; {written}.")
    if args.uncertainty:
        print(f"Maps of the share of members that disagree, in percent, are in {table.stem}_uncertainty.")
    if unfinished:
        raise UserError(unfinished)


def _parser() -> argparse.ArgumentParser:
    parser = parser_for(
        "mae3d_quantify",
        __doc__,
        "-i scans -o volumes.csv -d 501",
        "-i studies -o volumes.csv -d 501 --dicom --contrast 'CT=*head*' --codes codes.json",
    )
    add = parser.add_argument
    add(
        "-i",
        dest="images",
        required=True,
        type=Path,
        metavar="FOLDER",
        help="images, named as for nnU-Net, or DICOM studies",
    )
    add("-o", dest="table", required=True, type=Path, metavar="TABLE.csv", help="table to write")
    add_model_arguments(parser)
    add("-chk", dest="checkpoint", metavar="FILE", help="checkpoint (default: the calibrated one, if any)")
    add(
        "--cutoffs",
        nargs="+",
        type=positive_float,
        metavar="MM3",
        help="cutoffs between risk groups (default: quartiles of the training volumes)",
    )
    add("--uncertainty", action="store_true", help="add intervals of volumes, expected Dice, and maps of disagreement")
    help_ = "share of cases whose interval should contain the true volume (default: 0.9)"
    add("--coverage", type=share, metavar="SHARE", help=help_)
    add("-num_parts", type=positive_int, default=1, metavar="N", help="number of parts to divide the cases into")
    add("-part_id", type=whole_number, default=0, metavar="K", help="part to process here, from 0")
    add_device_argument(parser, "cuda")
    _add_dicom_arguments(parser)
    return parser


def _add_dicom_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("DICOM, with highdicom").add_argument
    add("--dicom", action="store_true", help="read DICOM studies, and write DICOM segmentations and reports too")
    help_ = "channel of the model and its series descriptions, as in mae3d_convert; repeat it for each channel"
    add("--contrast", dest="contrasts", action="append", default=[], metavar="NAME=PATTERN", help=help_)
    add("--reference", metavar="NAME", help="channel to segment on and to register the others to (default: the first)")
    add("--codes", type=Path, metavar="FILE.json", help="codes of the labels, e.g. of SNOMED CT (default: tissue)")


def _refuse_unusable_dicom(args: argparse.Namespace) -> None:
    """Raise `UserError` for flags that need `--dicom`, and for what `--dicom` needs."""
    given = {"--contrast": args.contrasts, "--reference": args.reference, "--codes": args.codes}
    if not args.dicom:
        if alone := [flag for flag, value in given.items() if value]:
            raise UserError(f"{alone[0]} is for DICOM studies: add --dicom, or leave it out.")
        return
    if find_spec("highdicom") is None:
        raise UserError('--dicom needs highdicom: pip install "nnunet-vit-mae[dicom]".')
    if not args.images.is_dir():
        raise UserError(f"{args.images} is not a folder: give the folder of the DICOM files with -i.")


def _quantify_dicom(
    model: Model, images: Path, table: Path, part: Part, args: argparse.Namespace, options: dict[str, Any]
) -> tuple[list[Path], str]:
    """Return the tables that were written, and what could not be done, if anything."""
    from nnunet_vit_mae.imaging.dicom_codes import read_label_codes
    from nnunet_vit_mae.nnunet.dicom_quantification import DicomInput, quantify_dicom
    from nnunet_vit_mae.nnunet.plans import classes_of

    codes = read_label_codes(args.codes, classes_of(model.plan).names)
    source = DicomInput(images, args.contrasts, args.reference)
    result = quantify_dicom(model, source, table, part, codes=codes, **options)
    return result.tables, result.unfinished
