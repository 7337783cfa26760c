"""Pictures of the best, the median and the worst case by Dice: outlines of reference and prediction over the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from nnunet_vit_mae.errors import UserError, reading
from nnunet_vit_mae.evaluation.cases import described_labels
from nnunet_vit_mae.evaluation.figures import WIDTH, styled
from nnunet_vit_mae.evaluation.results import Evaluation
from nnunet_vit_mae.evaluation.words import rows_of
from nnunet_vit_mae.imaging.labels import Labels
from nnunet_vit_mae.imaging.volumes import without_warnings_of_itk

# green light and wide, red dark and thin on top of it: they differ without colours, and where they agree both are seen
REFERENCE, PREDICTION = ("#3ee08f", 3.0), ("#f5152f", 1.2)
SMALLEST_VIEW = 40.0  # mm: enough around a small lesion to see where it is


@dataclass(frozen=True)
class Example:
    """A case worth a picture."""

    model: str
    label: str
    rank: str  # best, median or worst
    case: str
    dice: float


@dataclass(frozen=True)
class ExampleSlice:
    """An example cut across z where reference and prediction have most voxels; arrays are (y x)."""

    example: Example
    image: np.ndarray | None
    reference: np.ndarray
    prediction: np.ndarray
    spacing: tuple[float, float]  # mm along y and x
    window: tuple[float, float]


def choose_examples(evaluation: Evaluation, label: str) -> list[list[Example]]:
    """For each model its worst, median and best case; fewer when there are fewer cases with a Dice."""
    chosen = []
    for model in evaluation.models:
        own = rows_of(evaluation, label, model).dropna(subset=["dice"]).sort_values(by=["dice", "case"])
        picks = {"worst": 0, "median": len(own) // 2, "best": len(own) - 1}
        if len(own) < 3:
            picks = {"worst": 0, "best": 1} if len(own) == 2 else {"only case": 0}
        cases, dice = own["case"].tolist(), own["dice"].tolist()
        chosen.append(
            [Example(model, label, rank, str(cases[i]), float(dice[i])) for rank, i in picks.items() if i < len(own)]
        )
    return [examples for examples in chosen if examples]


def labels_of(labels: Sequence[str], references: Path, predictions: Mapping[str, Path]) -> Labels:
    """Which values of a segmentation each label has; a label that no `dataset.json` describes is its own number.

    Raises `UserError` for a name that is neither.
    """
    found = described_labels(references, [*predictions.values()])
    values = dict(found.values) if found else {}
    values |= {label: (int(label),) for label in labels if label not in values and label.isdigit()}
    for label in labels:
        if label not in values:
            raise UserError(f"No dataset.json beside the predictions or the references has the label {label}.")
    return Labels(values, found.ignore if found else None)


def cut(
    example: Example, labels: Labels, references: Path, predictions: Mapping[str, Path], images: Path | None
) -> ExampleSlice:
    """Read an example. Without an image the masks remain."""
    file = needed_file(references, example.case)
    reference = read(file)
    others = [needed_file(predictions[example.model], example.case)]
    image = None if images is None else find_file(images, f"{example.case}_0000")
    upright = [_upright(entry) for entry in (reference, *(_on_grid_of(reference, o) for o in [*others, image] if o))]
    spacing = upright[0].GetSpacing()
    arrays = [sitk.GetArrayFromImage(entry) for entry in upright]
    counted = arrays[0] != labels.ignore if labels.ignore is not None else np.True_
    masks = [np.isin(array, labels.values[example.label]) & counted for array in arrays[:2]]
    counts = (masks[0] | masks[1]).reshape(len(masks[0]), -1).sum(axis=1)
    z = int(counts.argmax()) if counts.any() else len(counts) // 2
    shown = arrays[2][z].astype(np.float32) if image else None
    return ExampleSlice(example, shown, masks[0][z], masks[1][z], (spacing[1], spacing[0]), robust_window(shown))


def robust_window(image: np.ndarray | None) -> tuple[float, float]:
    """Grey values from black to white; single bright voxels (metal, say) do not darken everything."""
    finite = np.zeros(0) if image is None else image[np.isfinite(image)]
    low, high = np.percentile(finite, (0.5, 99.5)) if len(finite) else (0.0, 1.0)
    return float(low), float(max(high, low + 1e-6))


def find_file(folder: Path, name: str) -> Path | None:
    """The volume of that name with whatever ending: of `a.nii.gz` and `a.b.nii.gz` the first is that of `a`."""
    files = [file for file in folder.glob(f"{_literal(name)}.*") if file.suffix not in (".json", ".npz", ".pkl")]
    return min(files, key=lambda file: (len(file.name), file.name), default=None)


def needed_file(folder: Path, name: str) -> Path:
    """As `find_file`, but raises `UserError` when there is none."""
    file = find_file(folder, name)
    if file is None:
        raise UserError(f"{folder} has no file of case {name}.")
    return file


def read(file: Path) -> sitk.Image:
    """Read a volume; raises `UserError` when that is not possible."""
    with reading(file), without_warnings_of_itk():
        return sitk.ReadImage(str(file))


def _on_grid_of(reference: sitk.Image, file: Path) -> sitk.Image:
    """Read what is compared voxel by voxel with a reference, whatever its own header says of place and direction."""
    image = read(file)
    if image.GetSize() != reference.GetSize():
        sizes = " and ".join(" x ".join(map(str, entry.GetSize())) for entry in (image, reference))
        raise UserError(f"{file} does not fit its reference: they have {sizes} voxels; resample one to the other.")
    image.CopyInformation(reference)
    return image


def _upright(image: sitk.Image) -> sitk.Image:
    """Turn axial slices so that the patient's right is on the left, as radiologists look; leave others as they are."""
    direction = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(image.GetDirection())
    return sitk.DICOMOrient(image, "LPS") if direction[2] in "SI" else image


@styled
def overlays_figure(slices: Sequence[Sequence[ExampleSlice]]) -> Figure:
    """A row for each model; masks alone where there is no image."""
    columns = max(len(row) for row in slices)
    side = WIDTH / 3
    figure = Figure(figsize=(side * columns + 0.3, (side + 0.35) * len(slices) + 0.4), layout="constrained")
    figure.get_layout_engine().set(wspace=0.02, hspace=0.03)  # type: ignore[union-attr]
    grid = figure.subplots(len(slices), columns, squeeze=False)
    for line, row in zip(grid, slices, strict=True):
        for axes in line[len(row) :]:
            axes.set_axis_off()
        for axes, entry in zip(line, row, strict=False):
            _draw(axes, entry)
        line[0].set_ylabel(row[0].example.model, fontweight="bold")
    handles = [
        LineCollection([[(0, 0), (1, 0)]], colors=colour, linewidths=width, label=name)
        for name, (colour, width) in {"annotated": REFERENCE, "predicted": PREDICTION}.items()
    ]
    legend = figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=True, labelcolor="white")
    legend.get_frame().set(facecolor="#222222", edgecolor="none")
    return figure


def _draw(axes: Axes, entry: ExampleSlice) -> None:
    shape = np.array(entry.reference.shape)
    height, width = shape * entry.spacing
    axes.set_facecolor("#1a1a1a")
    if entry.image is not None:
        low, high = entry.window
        axes.imshow(entry.image, cmap="gray", vmin=low, vmax=high, extent=(0, width, height, 0))
    else:
        fill = np.where(entry.reference, 0.75, np.where(entry.prediction, 0.45, 0.25))
        axes.imshow(fill, cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0), interpolation="nearest")
    for mask, (colour, line) in ((entry.reference, REFERENCE), (entry.prediction, PREDICTION)):
        edges = outline(mask, entry.spacing)
        axes.add_collection(LineCollection(list(edges), colors=colour, linewidths=line, capstyle="projecting"))
    left, right, bottom, top = view(entry.reference | entry.prediction, entry.spacing)
    axes.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[], aspect="equal")
    axes.spines[:].set_visible(False)
    axes.set_title(f"{entry.example.rank}: Dice {entry.example.dice:.2f}\n{entry.example.case}", fontsize=8.5)
    _scale_bar(axes, right - left)


def outline(mask: np.ndarray, spacing: tuple[float, float]) -> np.ndarray:
    """The sides of voxels between inside and outside, in mm: (side, end, x and y).

    Contour lines would cut the corners of voxels, and most of a structure that is a few voxels wide.
    """
    padded = np.pad(mask.astype(bool), 1)
    rows, columns = np.nonzero(padded[1:, 1:-1] != padded[:-1, 1:-1])
    level = [np.stack([np.stack([columns + end, rows], -1) for end in (0, 1)], 1)]
    rows, columns = np.nonzero(padded[1:-1, 1:] != padded[1:-1, :-1])
    upright = [np.stack([np.stack([columns, rows + end], -1) for end in (0, 1)], 1)]
    return np.concatenate(level + upright) * np.array(spacing[::-1])


def view(mask: np.ndarray, spacing: tuple[float, float]) -> tuple[float, float, float, float]:
    """Left, right, bottom and top (mm) of a square around the mask, or of all when the mask is empty."""
    extent = np.array(mask.shape) * spacing
    side = float(extent.max())
    middle = extent / 2
    if mask.any():
        found = np.argwhere(mask)
        low, high = found.min(axis=0) * spacing, (found.max(axis=0) + 1) * spacing
        middle = (low + high) / 2
        side = min(side, max(SMALLEST_VIEW, 1.7 * float((high - low).max())))
    reach = np.minimum(side, extent) / 2
    middle = np.clip(middle, reach, extent - reach)  # no empty margin where the image could fill it
    y, x = middle
    return x - side / 2, x + side / 2, y + side / 2, y - side / 2


def _scale_bar(axes: Axes, side: float) -> None:
    length = max(step for step in (1, 2, 5, 10, 20, 50, 100) if step <= max(1.0, side / 4))
    share = length / side
    axes.plot([0.95 - share, 0.95], [0.05, 0.05], transform=axes.transAxes, color="white", linewidth=2.5)
    axes.text(
        0.95 - share / 2, 0.07, f"{length} mm", transform=axes.transAxes, color="white", ha="center", va="bottom"
    ).set_fontsize(8)


def _literal(name: str) -> str:
    """A name as a pattern of file names that fits it alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
