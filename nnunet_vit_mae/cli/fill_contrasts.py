"""Write images of zeros for contrasts that were not acquired, so that nnU-Net finds a file for every channel."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nnunet_vit_mae.cli.arguments import parser_for
from nnunet_vit_mae.errors import exit_on_user_error

if TYPE_CHECKING:
    from nnunet_vit_mae.datasets.contrasts import Filling


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `mae3d_fill_contrasts`; the exit code is 2 when a case could not be filled."""
    parser = parser_for("mae3d_fill_contrasts", __doc__)
    parser.add_argument("-d", dest="dataset", required=True, metavar="ID", help="data set number or name, e.g. 501")
    args = parser.parse_args(argv)

    from nnunet_vit_mae.datasets.contrasts import CONTRAST_RECORD, fill_contrasts
    from nnunet_vit_mae.nnunet.folders import find_dataset

    raw = find_dataset(args.dataset).raw
    filling = fill_contrasts(raw)
    print(contrast_table(filling))
    for contrast in filling.replaced:
        print(f"{contrast} was filled before and is an image now: it counts as present.")
    if any(contrasts.blank for cases in filling.record.values() for contrasts in cases.values()):
        print("Blank images were given as all zeros: they count as absent and are left as they are.")
    print(f"Wrote {len(filling.written)} images of zeros; what is present is in {raw / CONTRAST_RECORD}.")
    for case, problem in filling.problems.items():
        print(f"Not filled: {case} {problem}.", file=sys.stderr)
    if filling.problems:
        sys.exit(2)


def contrast_table(filling: Filling) -> str:
    """In how many cases of each folder a contrast is present, filled and blank: a row for each contrast."""
    kinds = ("present", "filled", "blank")
    rows = [f"{'contrast':16}  {'folder':8}" + "".join(f"  {kind:>7}" for kind in kinds)]
    counts = Counter(
        (name, folder, kind)
        for folder, cases in filling.record.items()
        for contrasts in cases.values()
        for kind in kinds
        for name in getattr(contrasts, kind)
    )
    for name in filling.channels.names:
        for folder in filling.record:
            rows.append(f"{name:16}  {folder:8}" + "".join(f"  {counts[name, folder, kind]:7}" for kind in kinds))
    return "\n".join(rows)
