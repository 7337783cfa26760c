"""How much worse a trained network segments without some contrasts (AMAE, section 2.4 and tables 1 and 2).

nnU-Net's own command predicts the test cases with all contrasts, and again with some contrasts replaced by zeros;
nnU-Net's own evaluation computes the Dice of both. A case without any of the omitted contrasts is not predicted again,
because its prediction would be the same. Neither is a case that has no other contrast, because a prediction from no
image at all says nothing about a contrast.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nnunetv2
import numpy as np
from nnunetv2.evaluation.evaluate_predictions import compute_metrics
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

from nnunet_vit_mae.errors import UserError, reading
from nnunet_vit_mae.imaging.channels import IMAGE_ENDINGS
from nnunet_vit_mae.imaging.volumes import refuse_large
from nnunet_vit_mae.imaging.writing import write_zeros
from nnunet_vit_mae.nnunet.models import Model
from nnunet_vit_mae.nnunet.omission_table import EMPTY_REFERENCE, NOTHING_LEFT, NOTHING_TO_OMIT, OmissionRow
from nnunet_vit_mae.nnunet.plans import Plan, classes_of
from nnunet_vit_mae.nnunet.prediction import (
    PredictionCase,
    find_prediction_cases,
    find_reference,
    predict_folder,
    refuse_turned_reference,
)
from nnunet_vit_mae.presets import canonical_contrast
from nnunet_vit_mae.progress import with_progress
from nnunet_vit_mae.storage.csv_tables import write_instances
from nnunet_vit_mae.storage.files import link
from nnunet_vit_mae.storage.readme import write_readme

CONTENTS = {
    "omission.csv": "Dice of each case and label, with and without the contrast",
    "with_all/": "segmentations from all contrasts",
    "without_*/": "images with zeros in place of the contrast, and segmentations from them",
    "log.txt": "what nnU-Net has said",
}


@dataclass(frozen=True)
class OmissionCase:
    """A test case, with the contrasts that it has."""

    case: PredictionCase
    reference: Path
    omitted: tuple[int, ...]  # those of the channels to omit that are not all zeros
    others: bool  # whether any other channel is not all zeros

    @property
    def name(self) -> str:
        """The name of the case."""
        return self.case.name

    @property
    def predicted_again(self) -> bool:
        """Whether the case has a contrast to omit and another one to segment with."""
        return bool(self.omitted) and self.others


def find_channels(plan: Plan, names: Sequence[str]) -> list[int]:
    """Return the channels of these contrasts, ascending; spellings are matched by `presets.canonical_contrast`.

    Raises `UserError` for images without a geometry, for unknown names, for all contrasts at once, and if nnU-Net's
    normalisation turns zeros into other values.
    """
    ending = plan.file_ending
    if ending not in IMAGE_ENDINGS:
        raise UserError(
            f"{plan.dataset.name} has {ending} files, but only {', '.join(IMAGE_ENDINGS)} can be replaced by zeros."
        )
    known = [canonical_contrast(name) for name in plan.channel_names]
    omitted = {canonical_contrast(name) for name in names}
    unknown = [name for name in names if canonical_contrast(name) not in known]
    if unknown:
        raise UserError(f"--omit {', '.join(unknown)}: {plan.dataset.name} has only {', '.join(plan.channel_names)}.")
    if omitted == set(known):
        raise UserError(f"--omit {', '.join(names)} would leave none of {', '.join(plan.channel_names)}: omit fewer.")
    channels = [channel for channel, name in enumerate(known) if name in omitted]
    for channel in channels:
        if not _zeros_stay_zeros(plan, channel):
            raise UserError(
                f"--omit {plan.channel_names[channel]}: nnU-Net's {plan.configuration.normalization_schemes[channel]} "
                "turns zeros into other values, which would not mean that the contrast is absent."
            )
    return channels


def find_omission_cases(plan: Plan, images: Path, references: Path, channels: Sequence[int]) -> list[OmissionCase]:
    """Find the cases, and read which contrasts each of them has.

    Raises `UserError` for files that are missing, cannot be read or do not match, and if no case can be compared.
    """
    files = [(case, find_reference(plan, case.name, references)) for case in find_prediction_cases(plan, images)]
    cases = []
    for case, reference in with_progress(files, unit="case", desc="reading"):
        present = _present_channels(plan, case, reference)
        omitted = tuple(channel for channel in channels if present[channel])
        cases.append(OmissionCase(case, reference, omitted, any(np.delete(present, channels))))
    names = ", ".join([plan.channel_names[channel] for channel in channels])
    if not any(case.omitted for case in cases):
        raise UserError(f"None of the {len(cases)} cases has {names}: these channels hold only zeros.")
    if not any(case.predicted_again for case in cases):
        raise UserError(f"No case that has {names} has another contrast to segment with: omit fewer.")
    return cases


def omit(
    model: Model, cases: Sequence[OmissionCase], channels: Sequence[int], *, images: Path, output: Path, device: str
) -> list[OmissionRow]:
    """Predict the folder `images` with and without the channels, and compute the Dice of both.

    The folder `output` gets `with_all/predictions`, `without_NAME/images`, `without_NAME/predictions`, `log.txt`
    and `omission.csv`. Raises `UserError` if the folder cannot be made, or if a prediction fails.
    """
    with_all = output / "with_all" / "predictions"
    names = [re.sub(r"\W+", "_", model.plan.channel_names[channel]) for channel in channels]
    without = output / "_".join(["without", *names])
    places = {"log": output / "log.txt", "device": device}
    predict_folder(model, images, [case.name for case in cases], with_all, **places)

    again = [case for case in cases if case.predicted_again]
    try:
        write_images(again, without / "images")
    except OSError as error:
        raise UserError(f"{output} cannot be written to ({error}): choose another folder with -o.") from None
    predict_folder(model, without / "images", [case.name for case in again], without / "predictions", **places)
    rows = []
    for case in with_progress(cases, unit="case", desc="evaluating"):
        rows += _case_rows(model.plan, case, with_all, without / "predictions")
    write_instances(OmissionRow, rows, output / "omission.csv")
    write_readme(output, CONTENTS)
    return rows


def write_images(cases: Sequence[OmissionCase], folder: Path) -> None:
    """Write the images for the second prediction: zeros for omitted contrasts, links to all others."""
    folder.mkdir(parents=True, exist_ok=True)
    for case in cases:
        for channel, image in enumerate(case.case.images):
            (folder / image.name).unlink(missing_ok=True)  # of a call that was stopped
            if channel in case.omitted:
                write_zeros(folder / image.name, image)
            else:
                link(image, folder / image.name)


def summary(plan: Plan, cases: Sequence[OmissionCase], channels: Sequence[int]) -> str:
    """Say in how many cases there is something to omit, and which cases are left out."""
    concerned = [case for case in cases if case.omitted]
    counts = [
        f"{plan.channel_names[channel]} in {len([case for case in concerned if channel in case.omitted])}"
        for channel in channels
    ]
    lines = [f"There is something to omit in {len(concerned)} of {len(cases)} cases: {', '.join(counts)}."]
    left_out = [case.name for case in concerned if not case.others]
    if left_out:
        lines.append(f"Left out, because no contrast would be left to segment with: {', '.join(left_out)}.")
    return "\n".join(lines)


def _zeros_stay_zeros(plan: Plan, channel: int) -> bool:
    """Return whether nnU-Net's normalisation leaves an image of zeros unchanged: not for CT, as 0 HU is water."""
    scheme: Any = recursive_find_python_class(
        str(Path(nnunetv2.__path__[0], "preprocessing", "normalization")),
        plan.configuration.normalization_schemes[channel],
        "nnunetv2.preprocessing.normalization",
    )
    intensities = plan.plans.foreground_intensity_properties_per_channel[str(channel)]
    zeros = np.zeros((2, 2, 2), np.float32)
    return not scheme(plan.configuration.use_mask_for_norm[channel], intensities).run(zeros.copy(), zeros).any()


def _present_channels(plan: Plan, case: PredictionCase, file: Path) -> list[bool]:
    """Return, for each channel, whether it holds anything but zeros."""
    reader = plan.plans.image_reader_writer_class()
    refuse_large([*case.images, file])
    with reading(f"The case {case.name}"):
        volume, _ = reader.read_images([str(image) for image in case.images])  # c z y x
        reader.read_seg(str(file))  # a damaged one would stop the comparison after the predictions
    refuse_turned_reference(case, file)
    return [bool(channel.any()) for channel in volume]


def _case_rows(plan: Plan, case: OmissionCase, with_all: Path, without: Path) -> list[OmissionRow]:
    """Return a row for each label or region of a case."""
    metrics_with = _metrics(plan, case.reference, with_all)
    if case.predicted_again:
        metrics_without = _metrics(plan, case.reference, without)
    else:
        metrics_without = {} if case.omitted else metrics_with  # the same images give the same prediction
    rows = []
    for label, metrics in metrics_with.items():
        dice_with = float(metrics["Dice"])
        dice_without = float(metrics_without[label]["Dice"]) if metrics_without else math.nan
        rows.append(
            OmissionRow(
                case=case.name,
                label=label,
                dice_with=dice_with,
                dice_without=dice_without,
                difference=dice_without - dice_with,
                omitted=", ".join([plan.channel_names[channel] for channel in case.omitted]),
                left_out=_why_left_out(case, empty=metrics["TP"] + metrics["FN"] == 0),
            )
        )
    return rows


def _metrics(plan: Plan, reference: Path, predictions: Path) -> dict[str, dict[str, float]]:
    """Return nnU-Net's metrics of each label or region by name; voxels with the ignore label do not count."""
    classes, reader = classes_of(plan), plan.plans.image_reader_writer_class()
    files = str(reference), str(predictions / reference.name)
    found = compute_metrics(*files, reader, list(classes.values), classes.ignore)["metrics"]
    return {name: found[values] for name, values in zip(classes.names, classes.values, strict=True)}


def _why_left_out(case: OmissionCase, *, empty: bool) -> str:
    """Return why a label of a case is not compared, or an empty string.

    Without a reference there is no overlap to measure: nnU-Net gives no Dice, or 0 if a single voxel is predicted.
    """
    if case.omitted and not case.others:
        return NOTHING_LEFT
    if empty:
        return EMPTY_REFERENCE
    return "" if case.omitted else NOTHING_TO_OMIT
