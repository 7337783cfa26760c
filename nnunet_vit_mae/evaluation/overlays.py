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

from nnunet_vit_mae.errors import UserError, reader_reason
from nnunet_vit_mae.evaluation.figures import WIDTH, styled
from nnunet_vit_mae.evaluation.results import Evaluation

# green light and wide, red dark and thin on top of it: they differ without colours, and where they agree both are seen
REFERENCE, PREDICTION = ("#3ee08f", 2.6), ("#e8112d", 1.1)
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
class Slice:
    """An example cut across z where reference and prediction have most voxels; arrays are (y x)."""

    example: Example
    image: np.ndarray | None
    reference: np.ndarray
    prediction: np.ndarray
    spacing: tuple[float, float]  # mm along y and x
    window: tuple[float, float]


def choose_examples(evaluation: Evaluation, label: str) -> list[list[Example]]:
    """For each model its worst, median and best case; fewer when there are fewer cases with a Dice."""
    rows = evaluation.cases[(evaluation.cases["label"] == label) & evaluation.cases["dice"].notna()]
    chosen = []
    for model in evaluation.models:
        own = rows[rows["model"] == model].sort_values(["dice", "case"])
        picks = {"worst": 0, "median": len(own) // 2, "best": len(own) - 1}
        if len(own) < 3:
            picks = {"worst": 0, "best": 1} if len(own) == 2 else {"only case": 0}
        cases, dice = own["case"].tolist(), own["dice"].tolist()
        chosen.append(
            [Example(model, label, rank, str(cases[i]), float(dice[i])) for rank, i in picks.items() if i < len(own)]
        )
    return [examples for examples in chosen if examples]


def cut(
    example: Example, values: Sequence[int], references: Path, predictions: Mapping[str, Path], images: Path | None
) -> Slice:
    """Read an example; `values` are those of its label in the segmentations. Without an image the masks remain."""
    reference = read_upright(find_file(references, example.case))
    prediction = read_upright(find_file(predictions[example.model], example.case))
    masks = [np.isin(sitk.GetArrayViewFromImage(image), values) for image in (reference, prediction)]
    file = None if images is None else find_file(images, f"{example.case}_0000", missing_ok=True)
    volume = None if file is None else sitk.GetArrayFromImage(read_upright(file)).astype(np.float32)
    for array, source in ((masks[1], predictions[example.model]), (volume, file)):
        if array is not None and array.shape != masks[0].shape:
            raise UserError(
                f"Case {example.case} in {source} has {array.shape} voxels (z y x), but its reference {masks[0].shape}."
            )
    union = masks[0] | masks[1]
    counts = union.reshape(len(union), -1).sum(axis=1)
    z = int(counts.argmax()) if counts.any() else len(union) // 2
    window = (0.0, 1.0) if volume is None else robust_window(volume[z])
    spacing = reference.GetSpacing()
    image = None if volume is None else volume[z]
    return Slice(example, image, masks[0][z], masks[1][z], (spacing[1], spacing[0]), window)


def robust_window(image: np.ndarray) -> tuple[float, float]:
    """Grey values from black to white; single bright voxels (metal, say) do not darken everything."""
    finite = image[np.isfinite(image)]
    low, high = np.percentile(finite, (0.5, 99.5)) if len(finite) else (0.0, 1.0)
    return float(low), float(max(high, low + 1e-6))


def find_file(folder: Path, name: str, missing_ok: bool = False) -> Path | None:
    """The file of that name with whatever ending; raises `UserError` when there is none, unless that is fine."""
    files = sorted(file for file in folder.glob(f"{_literal(name)}.*") if file.suffix not in (".json", ".npz", ".pkl"))
    if files or missing_ok:
        return files[0] if files else None
    raise UserError(f"{folder} has no file of case {name}.")


def read_upright(file: Path | None) -> sitk.Image:
    """Read a volume; one of axial slices is turned so that the patient's right is on the left, as radiologists look."""
    try:
        image = sitk.ReadImage(str(file))
    except RuntimeError as error:
        raise UserError(f"{file} cannot be read ({reader_reason(error)}).") from None
    if image.GetDimension() == 2:
        return sitk.JoinSeries(image)
    direction = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(image.GetDirection())
    return sitk.DICOMOrient(image, "LPS") if direction[2] in "SI" else image


@styled
def overlays_figure(slices: Sequence[Sequence[Slice]]) -> Figure:
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


def _draw(axes: Axes, entry: Slice) -> None:
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
        axes.add_collection(LineCollection(edges, colors=colour, linewidths=line, capstyle="projecting"))
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
    length = max(step for step in (1, 2, 5, 10, 20, 50, 100) if step <= max(1.0, side / 3))
    share = length / side
    axes.plot([0.95 - share, 0.95], [0.05, 0.05], transform=axes.transAxes, color="white", linewidth=2.5)
    axes.text(
        0.95 - share / 2, 0.07, f"{length} mm", transform=axes.transAxes, color="white", ha="center", va="bottom"
    ).set_fontsize(8)


def _literal(name: str) -> str:
    """A name as a pattern of file names that fits it alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
