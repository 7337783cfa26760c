"""Fit the decision threshold of a trained model on validation cases, and write calibrated checkpoints."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_vit_mae.cli.arguments import (
    add_device_argument,
    add_model_arguments,
    chosen_model,
    parser_for,
    prediction_command,
    usable_device,
)
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.processes.signals import command
from nnunet_vit_mae.storage.files import file_hash, locked
from nnunet_vit_mae.storage.layout import CALIBRATED, FINAL

if TYPE_CHECKING:
    from nnunet_vit_mae.nnunet.models import Model
    from nnunet_vit_mae.nnunet.predicted_cases import PredictedCase


@command("Predictions that are done are kept, and the same command goes on with the others.")
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `mae3d_calibrate`."""
    args = _parser().parse_args(argv)
    if (args.images is None) != (args.labels is None):
        raise UserError("-i and -l go together: give both the images and the labels of a development set, or neither.")
    if args.uncertainty and args.allow_training_cases:
        raise UserError(
            "--uncertainty needs cases that the model was not trained on, whose errors are those of new cases: leave "
            "out --allow_training_cases."
        )

    from nnunet_vit_mae.nnunet import calibration, uncertainty
    from nnunet_vit_mae.nnunet.calibrated import refuse_calibrated

    device = usable_device(args.device).type
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    refuse_calibrated(args.checkpoint)
    model = chosen_model(args)
    if args.uncertainty:
        uncertainty.refuse_without_volumes(model)
    with locked(model.folder):
        hashes = [file_hash(file) for file in model.files]
        cases = _cases(model, args, device)
        fitted = calibration.fit(model, cases, args.objective, temperature=args.temperature)
        if [file_hash(file) for file in model.files] != hashes:
            raise UserError(
                f"{args.checkpoint} has been written anew while its predictions were calibrated, so that the "
                "thresholds are of other weights: wait until the training has ended, or calibrate a copy."
            )
        written = calibration.write(model, cases, fitted)
        print(calibration.threshold_table(fitted))
        if args.uncertainty:
            images = args.images.resolve() if args.images else model.plan.dataset.raw / "imagesTr"
            print(uncertainty.summary_text(uncertainty.add_uncertainty(model, cases, images, device)))
    names = [str(file.relative_to(model.folder)) for file in written]
    print(f"Wrote to {model.folder}: {', '.join(names)}.")
    print(f"Predict with {prediction_command(model, CALIBRATED)}.")


def _cases(model: Model, args: argparse.Namespace, device: str) -> list[PredictedCase]:
    """Return the cases to calibrate on, predicted."""
    from nnunet_vit_mae.nnunet.predicted_cases import development_cases, training_cases, validation_cases

    if args.images is not None:
        images, labels = args.images.resolve(), args.labels.resolve()
        return development_cases(model, images, labels, device, allow_training_cases=args.allow_training_cases)
    return training_cases(model, device) if args.allow_training_cases else validation_cases(model, device)


def _parser() -> argparse.ArgumentParser:
    parser = parser_for("mae3d_calibrate", __doc__, "-d 501 -f 0", "-d 501 -f 0 1 2 3 4 -tr nnUNetTrainerBaseline")
    add = parser.add_argument
    add_model_arguments(parser)
    add("-chk", dest="checkpoint", default=FINAL, metavar="FILE", help="checkpoint to calibrate")
    add("--objective", choices=("volume", "dice"), default="volume", help="what to optimise: volume difference or Dice")
    add("--temperature", action="store_true", help="also fit a temperature, so that probabilities are calibrated")
    add(
        "--uncertainty",
        action="store_true",
        help="also predict with each fold and mirrored input separately, for mae3d_quantify --uncertainty",
    )
    add("-i", dest="images", type=Path, metavar="FOLDER", help="images of a development set, with -l")
    add(
        "-l", dest="labels", type=Path, metavar="FOLDER", help="reference segmentations of the development set, with -i"
    )
    add(
        "--allow_training_cases",
        action="store_true",
        help="allow cases that the model was trained on; without -i and -l, take all labelled cases but the test cases",
    )
    add_device_argument(parser, "cuda")
    return parser
