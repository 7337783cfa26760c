"""Check installation, nnU-Net's variables and the machine, and with -d a dataset; each problem comes with advice."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nnunet_vit_mae.cli.arguments import parser_for
from nnunet_vit_mae.processes.signals import command

if TYPE_CHECKING:
    from nnunet_vit_mae.doctor.diagnosis import Diagnosis


@command()
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `mae3d_doctor`; the exit code is 2 when something is wrong."""
    args = _parse(argv)

    from nnunet_vit_mae.doctor.diagnosis import ERROR

    found = _diagnoses(args)
    if args.json:
        print(json.dumps([dataclasses.asdict(diagnosis) for diagnosis in found], indent=4))
    else:
        print("\n".join(map(_line, found)))
        errors = sum(diagnosis.level == ERROR for diagnosis in found)
        print(f"\n{errors} error{'s' * (errors > 1)}." if errors else "\nNo errors.")
    if any(diagnosis.level == ERROR for diagnosis in found):
        sys.exit(2)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_for("mae3d_doctor", __doc__, "", "-d 501 -p ViT_M_p4")
    add = parser.add_argument
    add("-d", dest="dataset", metavar="ID", help="also check a dataset: number or name, e.g. 501")
    add("-c", dest="configuration", default="3d_fullres", metavar="NAME", help="its nnU-Net configuration")
    add("-p", dest="plans", default="nnUNetPlans", metavar="NAME", help="its plans")
    add("--json", action="store_true", help="print JSON: topic, level, text and advice of each diagnosis")
    return parser.parse_args(argv)


def _diagnoses(args: argparse.Namespace) -> list[Diagnosis]:
    from nnunet_vit_mae.doctor.diagnosis import ERROR
    from nnunet_vit_mae.doctor.installation import diagnose_imports, diagnose_packages

    found = [*diagnose_packages(), *diagnose_imports()]
    if any(diagnosis.level == ERROR for diagnosis in found):  # what follows would not load
        return found

    from nnunet_vit_mae.doctor.installation import diagnose_compiler
    from nnunet_vit_mae.doctor.machine import diagnose_gpu, diagnose_shared_memory, diagnose_workers
    from nnunet_vit_mae.nnunet.diagnoses import diagnose_dataset, diagnose_trainers, diagnose_variables

    found += [*diagnose_gpu(os.environ), *diagnose_compiler(os.environ), *diagnose_workers(os.environ)]
    found += [*diagnose_shared_memory(), *diagnose_variables(), *diagnose_trainers()]
    if args.dataset:
        found += diagnose_dataset(args.dataset, args.plans, args.configuration)
    return found


def _line(diagnosis: Diagnosis) -> str:
    advice = f"\n{'':8}  {'':13}  -> {diagnosis.advice}" if diagnosis.advice else ""
    return f"{diagnosis.level:8}  {diagnosis.topic:13}  {diagnosis.text}{advice}"
