"""All commands in one: `mae3d pretrain -d 501` is `mae3d_pretrain -d 501`, and `mae3d` alone lists them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from nnunet_vit_mae.errors import UserError, did_you_mean
from nnunet_vit_mae.processes.signals import command

GROUPS = {  # in the order of the work
    "Before anything else": ("doctor", "demo", "trainers"),
    "From the hospital's files to a dataset": (
        "convert", "crop_roi", "refine_labels", "fill_contrasts", "check", "split",
    ),
    "Pre-training": ("plan", "preprocess", "pretrain", "share"),
    "Trained models": ("calibrate", "quantify", "evaluate", "omit", "features", "export", "import"),
    "Comparing networks on your data": ("study",),
}  # fmt: skip
MODULES = {"export": "export_model", "import": "import_model"}  # where the module has another name than its command


@command()
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `mae3d`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return
    name, *rest = arguments
    known = [name for names in GROUPS.values() for name in names]
    if name not in known:
        raise UserError(f"mae3d has no command {name}{did_you_mean(name, known)}: mae3d --help lists all.")
    command_module(name).main(rest)


def overview() -> str:
    """Return a line for each command, grouped in the order of the work."""
    lines = [
        "usage: mae3d COMMAND ...",
        "       mae3d COMMAND --help",
        "",
        "mae3d COMMAND is the same as mae3d_COMMAND.",
    ]
    for title, names in GROUPS.items():
        lines += ["", f"{title}:"]
        lines += [f"  {name:15} {(command_module(name).__doc__ or '').splitlines()[0]}" for name in names]
    return "\n".join([*lines, "", "Training and prediction are nnU-Net's own: nnUNetv2_train, nnUNetv2_predict."])


def command_module(name: str) -> ModuleType:
    """Return the module with the `main` of a command."""
    return import_module(f"nnunet_vit_mae.cli.{MODULES.get(name, name)}")
