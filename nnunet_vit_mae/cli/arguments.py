"""Flags that several commands share, spelled as nnU-Net spells them."""

from __future__ import annotations

import argparse


def parser_for(program: str, description: str | None) -> argparse.ArgumentParser:
    """A parser whose help shows every default."""
    return argparse.ArgumentParser(
        prog=program, description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """`-d`, `-c` and `-p`: which data set, configuration and plans."""
    parser.add_argument("-d", dest="dataset", required=True, metavar="ID", help="data set number or name, e.g. 501")
    parser.add_argument("-c", dest="configuration", default="3d_fullres", metavar="NAME", help="configuration")
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", metavar="NAME", help="plans")


def positive_int(text: str) -> int:
    """An argparse type."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def positive_float(text: str) -> float:
    """An argparse type."""
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def whole_number(text: str) -> int:
    """An argparse type: 0 or more."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return number
