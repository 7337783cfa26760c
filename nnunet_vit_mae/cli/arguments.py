"""Flags that several commands share, spelled as nnU-Net spells them."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_vit_mae.errors import UserError

if TYPE_CHECKING:
    import torch


class _WithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        # "None" and "False" say nothing: what happens without the flag is in its help where it is not plain
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def parser_for(program: str, description: str | None) -> argparse.ArgumentParser:
    """A parser whose help shows the defaults."""
    return argparse.ArgumentParser(prog=program, description=description, formatter_class=_WithDefaults)


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """`-d`, `-c` and `-p`: which data set, configuration and plans."""
    parser.add_argument("-d", dest="dataset", required=True, metavar="ID", help="data set number or name, e.g. 501")
    parser.add_argument("-c", dest="configuration", default="3d_fullres", metavar="NAME", help="configuration")
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", metavar="NAME", help="plans")


def add_device_argument(parser: argparse.ArgumentParser, default: str) -> None:
    """`-device`; see `usable_device`."""
    parser.add_argument("-device", choices=("cuda", "cpu"), default=default, help="where to run")


def add_patient_arguments(parser: argparse.ArgumentParser) -> None:
    """`--csv`, `--case` and `--patient`: who is who; see `table_file`."""
    add = parser.add_argument
    add("--csv", type=Path, metavar="FILE", help="table with patients; looked for here, then in the raw data set")
    add("--case", metavar="COLUMN", help="its column of cases, else the one in which they occur")
    add("--patient", default="patient", metavar="COLUMN", help="its column of patients")


def usable_device(name: str) -> torch.device:
    """The device that was chosen; raises `UserError` when there is none."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "-device cuda was asked for, but torch finds no GPU here: use -device cpu, or repair the driver."
        )
    return torch.device(name)


def checked_output(output: Path) -> Path:
    """A raw data set to write; raises `UserError` when nnU-Net would not find it by that name."""
    if not re.fullmatch(r"Dataset[0-9]{3}_.+", output.name):
        raise UserError(f"{output} is not named as nnU-Net wants it: give a folder such as Dataset501_Skull with -o.")
    return output


def table_file(given: Path | None, raw: Path) -> Path | None:
    """Where `--csv` is: a name that is no file here may be one in the raw data set."""
    return given if given is None or given.exists() or not (raw / given).exists() else raw / given


def seed(text: str) -> int:
    """An argparse type: what scikit-learn takes for one."""
    number = int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to {2**32 - 1}")
    return number


def positive_int(text: str) -> int:
    """An argparse type."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def positive_float(text: str) -> float:
    """An argparse type."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def whole_number(text: str) -> int:
    """An argparse type: 0 or more."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return number
