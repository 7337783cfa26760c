"""Convert DICOM files or a BIDS folder to an nnU-Net raw data set, with contrasts by name and no patient's name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_vit_mae.cli.arguments import checked_output, parser_for, positive_int
from nnunet_vit_mae.errors import UserError, exit_on_user_error
from nnunet_vit_mae.files import refuse_in_use

if TYPE_CHECKING:
    from nnunet_vit_mae.datasets.convert.studies import Pattern, Study


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `mae3d_convert`; the exit code is 2 when a study or an image could not be converted."""
    parser = parser_for("mae3d_convert", __doc__)
    add = parser.add_argument
    add("-i", dest="source", type=Path, required=True, metavar="FOLDER", help="DICOM files in any order, or BIDS")
    add("-o", dest="output", type=Path, required=True, metavar="FOLDER", help="new raw data set, Dataset501_Head")
    help_ = "series (by description) or BIDS files (by name) of a contrast, once or more for each; order of channels"
    add("--contrast", dest="contrasts", action="append", default=[], metavar="NAME=PATTERN", help=help_)
    add("--reference", metavar="NAME", help="contrast that others are brought to; else the label's, else the first")
    add("--labels", metavar="PATTERN", help="series (DICOM) or paths (BIDS, else *_dseg and *_mask) of labels")
    add("--key", type=Path, metavar="FILE", help="private CSV outside of the data set: who is which case")
    add("-np", dest="processes", type=positive_int, default=4, metavar="N", help="processes")
    args = parser.parse_args(argv)

    output = checked_output(args.output)
    refuse_in_use(output)
    if not args.source.is_dir():
        raise UserError(f"{args.source} is no folder: give the one with the DICOM files, or the root of a BIDS folder.")

    from nnunet_vit_mae.datasets.convert.bids import bids_studies, is_bids
    from nnunet_vit_mae.datasets.convert.conversion import PROBLEMS, SCANS_TABLE, convert
    from nnunet_vit_mae.datasets.convert.studies import dicom_studies

    patterns = _patterns(args.contrasts)
    if is_bids(args.source):
        studies, lost = bids_studies(args.source, patterns, args.labels), 0
    else:
        studies, lost = dicom_studies(args.source, patterns, args.labels)
    contrasts = _order(patterns, studies)
    reference = _canonical(args.reference) if args.reference else None
    if reference and reference not in contrasts:
        raise UserError(f"--reference {args.reference} is none of the contrasts {', '.join(contrasts)}: correct it.")
    conversion = convert(studies, contrasts, reference, output, args.key, args.processes, lost)
    folders = [done.folder for done in conversion.done]
    print(
        f"{output} has {folders.count('imagesTr')} cases with labels and {folders.count('imagesUn')} without, of "
        f"{', '.join(contrasts)}; scanners are in {output / SCANS_TABLE}."
    )
    unfinished = [conversion.unfilled] if conversion.unfilled else []
    if problems := "; ".join(conversion.problems):
        unfinished += [
            f"Not all could be converted ({problems}): the rest is done, the reasons are in {output / PROBLEMS}, and "
            "--key writes which case is whom."
        ]
    if unfinished:
        raise UserError(" ".join(unfinished))


def _patterns(texts: list[str]) -> list[Pattern]:
    from nnunet_vit_mae.datasets.convert.studies import Pattern

    patterns = []
    for text in texts:
        name, equals, pattern = text.partition("=")
        if not (name and equals and pattern):
            raise UserError(f"--contrast {text} is not NAME=PATTERN: write for instance T1='*t1*sag*'.")
        patterns.append(Pattern(_canonical(name), pattern))
    return patterns


def _order(patterns: list[Pattern], studies: list[Study]) -> list[str]:
    """Of the patterns, else the most frequent contrast first."""
    if patterns:
        return list(dict.fromkeys(pattern.contrast for pattern in patterns))
    found = [name for study in studies for name in study.images]
    return sorted(set(found), key=lambda name: (-found.count(name), name))


def _canonical(name: str) -> str:
    from nnunet_vit_mae.presets import canonical_contrast

    return canonical_contrast(name)
