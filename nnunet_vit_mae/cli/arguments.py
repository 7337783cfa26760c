"""Flags that several commands share, spelled as nnU-Net spells them."""

from __future__ import annotations

import argparse
import io
import logging
import math
import os
import re
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from nnunet_vit_mae.errors import UserError, did_you_mean
from nnunet_vit_mae.sections import LARGEST

if TYPE_CHECKING:
    import torch

    from nnunet_vit_mae.datasets.tables import PatientColumns
    from nnunet_vit_mae.nnunet.models import Model


logger = logging.getLogger(__name__)

RAW = "nnUNet_raw"  # nnU-Net's variable
FIRST_FOLD = ["0"]  # unless -f is given


class _WithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        # a default of None, False or [] tells the reader nothing
        if action.default in (None, []) or action.default is False:
            return action.help
        if isinstance(action.default, list):  # as one types it
            return f"{action.help} (default: {' '.join(action.default)})"
        return super()._get_help_string(action)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        # examples keep their lines
        return text if "\n" in text else super()._fill_text(text, width, indent)


class _Parser(argparse.ArgumentParser):
    """A parser that suggests the nearest flag for an unknown one, and that shells can ask for completions."""

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        if "_ARGCOMPLETE" in os.environ:  # the shell asks, by way of argcomplete's own hook
            import argcomplete

            argcomplete.autocomplete(self)
        return super().parse_args(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        if unknown := re.search(r"unrecognized arguments: ([^ =]+)", message):
            message += did_you_mean(unknown[1], self._option_string_actions)
        super().error(message)


def parser_for(program: str, description: str | None, *examples: str) -> argparse.ArgumentParser:
    """Return a parser whose help shows the defaults and examples, each a command line without the program.

    From now on the console escapes what it cannot print.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    lines = "".join(f"\n  {program} {example}".rstrip() for example in examples)
    epilog = f"examples:{lines}" if examples else None
    return _Parser(prog=program, description=description, epilog=epilog, formatter_class=_WithDefaults)


def add_dataset_argument(parser: argparse.ArgumentParser) -> None:
    """Add `-d`, the dataset."""
    parser.add_argument("-d", dest="dataset", required=True, metavar="ID", help="dataset number or name, e.g. 501")


def add_plan_arguments(parser: argparse.ArgumentParser, plans: str = "name of the plans") -> None:
    """Add `-d`, `-c` and `-p`: dataset, configuration and plans, and what these are."""
    add_dataset_argument(parser)
    parser.add_argument("-c", dest="configuration", default="3d_fullres", metavar="NAME", help="nnU-Net configuration")
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", metavar="NAME", help=plans)


def add_model_arguments(parser: argparse.ArgumentParser, trainer: str = "nnUNetTrainerViTMAE") -> None:
    """Add `-d`, `-c`, `-p`, `-tr` and `-f`: which trained model; `trainer` is the default."""
    add_plan_arguments(parser)
    parser.add_argument("-tr", dest="trainer", default=trainer, metavar="NAME", help="trainer of the model")
    parser.add_argument("-f", dest="folds", nargs="+", default=FIRST_FOLD, metavar="FOLD", help="trained folds")


def chosen_model(args: argparse.Namespace) -> Model:
    """Return the model of `add_model_arguments` and `-chk`; raises `UserError` as `find_model` does.

    A warning names folds that are trained too if none are chosen: nnU-Net's own command predicts with all five.
    """
    from nnunet_vit_mae.nnunet.models import find_model

    chosen = {"trainer": args.trainer, "folds": args.folds, "checkpoint": args.checkpoint}
    model = find_model(args.dataset, args.plans, args.configuration, **chosen)
    trained = sorted(file.parent.name.removeprefix("fold_") for file in model.folder.glob(f"fold_*/{model.checkpoint}"))
    if args.folds is FIRST_FOLD and trained != FIRST_FOLD:
        logger.warning("Fold 0 alone is used, but there are the folds %s: choose with -f.", ", ".join(trained))
    return model


def prediction_command(model: Model, checkpoint: str) -> str:
    """Return nnU-Net's command to predict with a checkpoint of a model."""
    return (
        f"nnUNetv2_predict -i IN -o OUT {model.plan.flags_text} -tr {model.trainer} -f {' '.join(model.folds)} "
        f"-chk {checkpoint}"
    )


def add_device_argument(parser: argparse.ArgumentParser, default: str) -> None:
    """Add `-device`; see `usable_device`."""
    parser.add_argument("-device", choices=("cuda", "cpu"), default=default, help="device to run on")


def add_patient_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--csv`, `--case` and `--patient`: which case belongs to which patient; see `patient_columns`."""
    add = parser.add_argument
    add("--csv", type=Path, metavar="FILE", help="table of patients, looked for here, then in the raw dataset")
    add("--case", metavar="COLUMN", help="column of the table with case names (otherwise detected)")
    add("--patient", default="patient", metavar="COLUMN", help="column of the table with patients")


def usable_device(name: str) -> torch.device:
    """Return the chosen device; raises `UserError` if there is no such device."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("-device cuda needs a GPU, but torch finds none: use -device cpu, or check the driver.")
    return torch.device(name)


def raw_dataset_folder(output: Path) -> Path:
    """Return the raw dataset to write; raises `UserError` if nnU-Net would not find a dataset by that name."""
    if not re.fullmatch(r"Dataset[0-9]{3}_.+", output.name):
        raise UserError(f"{output} is not named as nnU-Net expects: give a folder such as Dataset501_Skull with -o.")
    return output


def place_for_nnunet(output: Path) -> str:
    """Return a sentence for a raw dataset that nnU-Net will not find; empty if it will."""
    raw = os.environ.get(RAW)
    if not raw or output.resolve().parent == Path(raw).resolve():
        return ""
    return f"nnU-Net will not find {output}, which is not in {RAW}: move it to {Path(raw, output.name)}."


def refuse_not_ascending(flag: str, values: Sequence[float] | None) -> None:
    """Raise `UserError` for the values of a flag that are not ascending; None if it was not given."""
    if values and any(low >= high for low, high in pairwise(values)):
        raise UserError(f"{flag} {' '.join(f'{value:g}' for value in values)}: give ascending numbers.")


def refuse_patient_without_table(args: argparse.Namespace) -> None:
    """Raise `UserError` for a column of patients without a table."""
    if args.patient != "patient" and not args.csv:
        raise UserError("--patient needs a table with that column: give it with --csv.")


def patient_columns(args: argparse.Namespace, raw: Path) -> PatientColumns:
    """Return where the patients are listed; see `table_file`."""
    refuse_patient_without_table(args)
    from nnunet_vit_mae.datasets.tables import PatientColumns

    return PatientColumns(table_file(args.csv, raw), args.case, args.patient)


def table_file(file: Path | None, raw: Path) -> Path | None:
    """Return the file of `--csv`; one that is not found here may be in the raw dataset."""
    return raw / file if file is not None and not file.exists() and (raw / file).exists() else file


def positive_int(text: str) -> int:
    """Argparse type of a whole number above 0."""
    number = int(text)
    if not 1 <= number <= LARGEST:
        raise argparse.ArgumentTypeError(f"{text} is not from 1 to {LARGEST}")
    return number


def positive_float(text: str) -> float:
    """Argparse type of a finite number above 0."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def share(text: str) -> float:
    """Argparse type of a share, such as of patients."""
    number = float(text)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return number


def whole_number(text: str) -> int:
    """Argparse type of a whole number, 0 or more."""
    number = int(text)
    if not 0 <= number <= LARGEST:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to {LARGEST}")
    return number
