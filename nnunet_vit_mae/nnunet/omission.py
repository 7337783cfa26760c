"""What a trained network loses when contrasts are taken away (AMAE, section 2.4 and tables 1 and 2).

Test cases are predicted with all contrasts, and again with some of them replaced by zeros, by nnU-Net's own command;
nnU-Net's own evaluation gives the Dice of both. A case that has none of those contrasts is not predicted again, for
its prediction would be the same. Neither is one that has no other: what a network makes of no image at all says
nothing about a contrast.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nnunetv2
import numpy as np
from nnunetv2.evaluation.evaluate_predictions import compute_metrics
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from tqdm import tqdm

from nnunet_vit_mae.errors import UserError, reading
from nnunet_vit_mae.files import link, refuse_in_use
from nnunet_vit_mae.imaging.channels import IMAGE_ENDINGS
from nnunet_vit_mae.imaging.volumes import write_zeros
from nnunet_vit_mae.nnunet.models import Model
from nnunet_vit_mae.nnunet.omission_table import EMPTY_REFERENCE, NOTHING_LEFT, NOTHING_TO_OMIT, OmissionRow, write_csv
from nnunet_vit_mae.nnunet.plans import Plan
from nnunet_vit_mae.nnunet.prediction import PredictionCase, find_prediction_cases, find_reference, predict
from nnunet_vit_mae.presets import canonical_contrast


@dataclass(frozen=True)
class OmissionCase:
    """A test case that has been looked into."""

    case: PredictionCase
    reference: Path
    omitted: tuple[int, ...]  # the channels to omit that hold anything but zeros
    others: bool  # whether any other channel does

    @property
    def predicted_again(self) -> bool:
        """Whether there is something to omit, and something to segment with."""
        return bool(self.omitted) and self.others


def find_channels(plan: Plan, names: Sequence[str]) -> list[int]:
    """The channels of these contrasts, ascending; spellings are matched as `presets.contrast` does.

    Raises `UserError` for images without a geometry, for unknown names, for all contrasts at once, and where nnU-Net
    turns zeros into other values.
    """
    ending = plan.dataset_json["file_ending"]
    if ending not in IMAGE_ENDINGS:
        raise UserError(f"{plan.dataset.name} has {ending} files; zeros can replace {_list(IMAGE_ENDINGS)}.")
    known, wanted = (
        [canonical_contrast(name) for name in plan.channel_names],
        {canonical_contrast(name) for name in names},
    )
    unknown = [name for name in names if canonical_contrast(name) not in known]
    if unknown:
        raise UserError(f"--omit {_list(unknown)}: {plan.dataset.name} has only {_list(plan.channel_names)}.")
    if wanted == set(known):
        raise UserError(f"--omit {_list(names)} would leave nothing of {_list(plan.channel_names)}: omit fewer.")
    channels = [channel for channel, name in enumerate(known) if name in wanted]
    for channel in channels:
        if not _zeros_stay_zeros(plan, channel):
            raise UserError(
                f"--omit {plan.channel_names[channel]}: nnU-Net's {plan.configuration.normalization_schemes[channel]} "
                "turns zeros into other values there, which would not mean absence."
            )
    return channels


def find_omission_cases(plan: Plan, images: Path, references: Path, channels: Sequence[int]) -> list[OmissionCase]:
    """Find the cases, and see which contrasts each has.

    Raises `UserError` for files that are missing, cannot be read or do not fit each other, and when no case can be
    compared.
    """
    cases = [(case, find_reference(plan, case.name, references)) for case in find_prediction_cases(plan, images)]
    studies = []
    for case, reference in tqdm(cases, unit="case", desc="looking"):
        present = _present(plan, case, reference)
        omitted = tuple(channel for channel in channels if present[channel])
        studies.append(OmissionCase(case, reference, omitted, any(np.delete(present, channels))))
    names = _list([plan.channel_names[channel] for channel in channels])
    if not any(study.omitted for study in studies):
        raise UserError(f"None of the {len(studies)} cases has {names}, only zeros: there is nothing to omit.")
    if not any(study.predicted_again for study in studies):
        raise UserError(f"No case that has {names} has another contrast: nothing would be left to segment with.")
    return studies


def omit(
    model: Model, studies: Sequence[OmissionCase], channels: Sequence[int], *, images: Path, output: Path, device: str
) -> list[OmissionRow]:
    """Predict the folder `images` twice and evaluate both; everything goes to a new folder.

    That is `with_all/predictions`, `without_NAME/images` and `/predictions`, `log.txt`, `omission.csv`.
    Raises `UserError` when the folder is in use or cannot be made, or when a prediction fails.
    """
    refuse_in_use(output)
    plan, log = model.plan, output / "log.txt"
    fewer = output / "_".join(["without", *(re.sub(r"\W+", "_", plan.channel_names[channel]) for channel in channels)])
    again = [study for study in studies if study.predicted_again]
    try:
        write_images(again, fewer / "images")
    except OSError as error:
        raise UserError(f"{output} cannot be written to ({error}): choose another place with -o.") from None

    folders = [(images, output / "with_all" / "predictions"), (fewer / "images", fewer / "predictions")]
    for (source, predictions), predicted in zip(folders, (studies, again), strict=True):
        command = model.command(source, predictions, device)
        predict(command, [predictions / study.reference.name for study in predicted], log)
    rows = []
    for study in tqdm(studies, unit="case", desc="evaluating"):
        rows += _rows(plan, study, *(predictions for _, predictions in folders))
    write_csv(rows, output / "omission.csv")
    return rows


def write_images(studies: Sequence[OmissionCase], folder: Path) -> None:
    """The images for the second prediction: zeros for what is omitted, links to everything else."""
    folder.mkdir(parents=True)
    for study in studies:
        for channel, image in enumerate(study.case.images):
            if channel in study.omitted:
                write_zeros(folder / image.name, image)
            else:
                link(image, folder / image.name)


def summary(plan: Plan, studies: Sequence[OmissionCase], channels: Sequence[int]) -> str:
    """In how many cases there is something to omit, as text."""
    some = sum(bool(study.omitted) for study in studies)
    counts = [
        f"{plan.channel_names[channel]} in {sum(channel in study.omitted for study in studies)}" for channel in channels
    ]
    lines = [f"There is something to omit in {some} of {len(studies)} cases: {', '.join(counts)}."]
    alone = [study.case.name for study in studies if study.omitted and not study.others]
    if alone:
        lines.append(f"Left out, for no contrast would be left to segment with: {', '.join(alone)}.")
    return "\n".join(lines)


def _zeros_stay_zeros(plan: Plan, channel: int) -> bool:
    """Whether nnU-Net's normalisation leaves an image of zeros as it is: not so for CT, where zero is water."""
    scheme: Any = recursive_find_python_class(
        str(Path(nnunetv2.__path__[0], "preprocessing", "normalization")),
        plan.configuration.normalization_schemes[channel],
        "nnunetv2.preprocessing.normalization",
    )
    intensities = plan.plans.foreground_intensity_properties_per_channel[str(channel)]
    zeros = np.zeros((2, 2, 2), np.float32)
    return not scheme(plan.configuration.use_mask_for_norm[channel], intensities).run(zeros.copy(), zeros).any()


def _present(plan: Plan, case: PredictionCase, file: Path) -> list[bool]:
    """Which channels hold anything but zeros, as nnU-Net reads them."""
    reader = plan.plans.image_reader_writer_class()
    with reading(f"The case {case.name}"):
        volume, _ = reader.read_images([str(image) for image in case.images])  # c z y x
        reference, _ = reader.read_seg(str(file))
    if reference.shape[1:] != volume.shape[1:]:
        sizes = [" x ".join(map(str, array.shape[1:])) for array in (reference, volume)]
        raise UserError(f"{file} has {sizes[0]} voxels (z y x), but the images of that case have {sizes[1]}.")
    return [bool(channel.any()) for channel in volume]


def _rows(plan: Plan, study: OmissionCase, complete: Path, without: Path) -> list[OmissionRow]:
    """A row for each label or region of a case."""
    names = {_values(label): name for name, label in plan.dataset_json["labels"].items()}
    first = _metrics(plan, study.reference, complete)
    # the same images give the same prediction; of no images there is none
    same = first if not study.omitted else {}
    second = _metrics(plan, study.reference, without) if study.predicted_again else same
    rows = []
    for label, metrics in first.items():
        dice = metrics["Dice"], second[label]["Dice"] if second else math.nan
        rows.append(
            OmissionRow(
                case=study.case.name,
                label=names[_values(label)],
                dice_with=float(dice[0]),
                dice_without=float(dice[1]),
                difference=float(dice[1] - dice[0]),
                omitted=_list([plan.channel_names[channel] for channel in study.omitted]),
                left_out=_why_left_out(study, empty=metrics["TP"] + metrics["FN"] == 0),
            )
        )
    return rows


def _metrics(plan: Plan, reference: Path, predictions: Path) -> dict[Any, dict[str, float]]:
    """nnU-Net's metrics of each label or region, with the ignore label left out."""
    manager = plan.plans.get_label_manager(plan.dataset_json)
    labels = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    reader = plan.plans.image_reader_writer_class()
    prediction = predictions / reference.name
    return compute_metrics(str(reference), str(prediction), reader, labels, manager.ignore_label)["metrics"]


def _why_left_out(study: OmissionCase, *, empty: bool) -> str:
    """Why a label of a case is not compared, if so.

    Where the reference is empty there is no overlap to measure: nnU-Net gives no Dice, or 0 for a single voxel.
    """
    if study.omitted and not study.others:
        return NOTHING_LEFT
    if empty:
        return EMPTY_REFERENCE
    return "" if study.omitted else NOTHING_TO_OMIT


def _values(label: Any) -> tuple[int, ...]:
    """A label, or a region of several, in the same form."""
    return tuple(int(value) for value in np.atleast_1d(label))


def _list(names: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(names)
