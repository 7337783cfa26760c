"""Write images of zeros for contrasts that were not acquired, so that nnU-Net finds a file for every channel."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from nnunet_vit_mae.cli.arguments import add_dataset_argument, parser_for
from nnunet_vit_mae.errors import abbreviated
from nnunet_vit_mae.processes.signals import command


@command()
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `mae3d_fill_contrasts`; the exit code is 2 if a case could not be filled."""
    parser = parser_for("mae3d_fill_contrasts", __doc__, "-d 501")
    add_dataset_argument(parser)
    args = parser.parse_args(argv)

    from nnunet_vit_mae.datasets.acquisition import SCANS_TABLE
    from nnunet_vit_mae.datasets.contrasts.filling import contrast_table, fill_contrasts
    from nnunet_vit_mae.datasets.contrasts.record import CONTRAST_RECORD
    from nnunet_vit_mae.nnunet.folders import find_dataset

    raw = find_dataset(args.dataset).raw
    result = fill_contrasts(raw)
    print(contrast_table(result))
    for contrast in result.replaced:
        print(f"{contrast} was filled earlier and is an acquired image now: it counts as present.")
    if any(contrasts.blank for cases in result.record.values() for contrasts in cases.values()):
        print("Some of the given images are all zeros: they count as absent and stay unchanged (blank).")
    print(f"Wrote {len(result.written)} images of zeros; {raw / CONTRAST_RECORD} lists the contrasts of each case.")
    if result.corrected:
        print(f"Corrected the contrasts of {abbreviated(result.corrected)} in {raw / SCANS_TABLE}.")
    for case, problem in result.problems.items():
        print(f"Not filled: {case} {problem}.", file=sys.stderr)
    if result.problems:
        sys.exit(2)
