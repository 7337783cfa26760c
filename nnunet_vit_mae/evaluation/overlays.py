"""Figures of the best, the median and the worst case by Dice: outlines of reference and prediction over the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from nnunet_vit_mae.errors import reading
from nnunet_vit_mae.evaluation.cases import EvaluationSet, counted_masks
from nnunet_vit_mae.evaluation.drawing import WIDTH, styled
from nnunet_vit_mae.evaluation.results import Evaluation
from nnunet_vit_mae.imaging.grids import on_grid, turned_like
from nnunet_vit_mae.imaging.labels import read_segmentation
from nnunet_vit_mae.imaging.volumes import Geometry, read_volume, without_warnings_of_itk

# colour and width of outlines: light and wide below, dark and thin on top, so that both show in greyscale and where
# they agree
REFERENCE, PREDICTION = ("#3ee08f", 3.0), ("#f5152f", 1.2)
LPS = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)  # direction of x, y and z to left, posterior and superior
SMALLEST_VIEW = 40.0  # mm: enough to see where a small lesion lies


@dataclass(frozen=True)
class ExampleCase:
    """A case of a model that is shown as an example."""

    model: str
    label: str
    rank: str  # best, median, worst or only case
    case: str
    dice: float


@dataclass(frozen=True)
class ExampleSlice:
    """The slice across z of an example in which reference and prediction have most voxels; arrays are (y x)."""

    example: ExampleCase
    image: np.ndarray | None
    reference: np.ndarray
    prediction: np.ndarray
    spacing: tuple[float, float]  # mm along y and x
    window: tuple[float, float]  # grey values shown black and white


def choose_examples(evaluation: Evaluation, label: str) -> list[list[ExampleCase]]:
    """Choose the worst, the median and the best case of each model by Dice.

    Args:
        evaluation: The results.
        label: The label.

    Returns:
        Examples of each model that has any; fewer than three when fewer cases have a Dice.
    """
    chosen = []
    for model in evaluation.models:
        rows = evaluation.rows_of(label, model).dropna(subset=["dice"]).sort_values(by=["dice", "case"])
        cases, dice = rows["case"].tolist(), rows["dice"].tolist()
        ranks = _ranks(len(rows))
        if ranks:
            chosen.append([ExampleCase(model, label, rank, str(cases[i]), float(dice[i])) for rank, i in ranks.items()])
    return chosen


def _ranks(number: int) -> dict[str, int]:
    """Return the positions of the examples among a number of cases in ascending order."""
    if number == 0:
        return {}
    if number == 1:
        return {"only case": 0}
    if number == 2:
        return {"worst": 0, "best": 1}
    return {"worst": 0, "median": number // 2, "best": number - 1}


def read_example(example: ExampleCase, evaluation_set: EvaluationSet) -> ExampleSlice:
    """Read the slice of an example.

    Args:
        example: The case, model and label.
        evaluation_set: The files and labels.

    Returns:
        The slice; its image is None when the case has none.

    Raises:
        UserError: If a file cannot be read or does not fit the reference.
    """
    case, labels = evaluation_set.case(example.case), evaluation_set.labels
    file = case.predictions[example.model]
    with without_warnings_of_itk():
        reference, geometry = read_segmentation(case.reference)
        prediction, its_geometry = read_segmentation(file)
        prediction, _ = on_grid(file, prediction, its_geometry, case.reference, geometry)
        image = None if case.image is None else _read_image(case.image, case.reference, geometry)
    # voxels are compared one by one, so all are shown in the geometry of the reference
    reference, spacing = radiological_view(reference, geometry)
    prediction, _ = radiological_view(prediction, geometry)

    def masks(z: int) -> tuple[np.ndarray, np.ndarray]:
        return counted_masks(reference[z], prediction[z], labels.values[example.label], labels.ignore)

    z = _fullest([int(np.count_nonzero(np.logical_or(*masks(z)))) for z in range(len(reference))])
    shown = None if image is None else radiological_view(image, geometry)[0][z].astype(np.float32)
    return ExampleSlice(example, shown, *masks(z), (spacing[1], spacing[2]), robust_window(shown))


def _read_image(file: Path, reference: Path, geometry: Geometry) -> np.ndarray:
    with reading(file):
        image, its_geometry = read_volume(file)
    return on_grid(file, image, its_geometry, reference, geometry)[0]


def _fullest(counts: Sequence[int]) -> int:
    return int(np.argmax(counts)) if any(counts) else len(counts) // 2


def robust_window(image: np.ndarray | None) -> tuple[float, float]:
    """Return the grey values shown black and white; a few bright voxels, such as metal, do not darken the rest."""
    finite = np.zeros(0) if image is None else image[np.isfinite(image)]
    low, high = np.percentile(finite, (0.5, 99.5)) if len(finite) else (0.0, 1.0)
    return float(low), float(max(high, low + 1e-6))


def radiological_view(array: np.ndarray, geometry: Geometry) -> tuple[np.ndarray, tuple[float, ...]]:
    """Turn axial slices so that the patient's right is on the left; leave other slices as they are.

    Args:
        array: A volume (z y x).
        geometry: Its geometry.

    Returns:
        A view of the volume (z y x) and its spacing in mm (z y x).
    """
    if geometry.axes[2] in "SI":
        array, geometry = turned_like(array, geometry, replace(geometry, direction=LPS))
    return array, geometry.spacing[::-1]


@styled
def overlays_figure(slices: Sequence[Sequence[ExampleSlice]]) -> Figure:
    """Draw examples.

    Args:
        slices: The examples of each model.

    Returns:
        A figure with a row for each model; masks without an image where there is none.
    """
    columns = max(len(row) for row in slices)
    side = WIDTH / 3
    figure = Figure(figsize=(side * columns + 0.3, (side + 0.35) * len(slices) + 0.4), layout="constrained")
    figure.get_layout_engine().set(wspace=0.02, hspace=0.03)  # type: ignore[union-attr]
    grid = figure.subplots(len(slices), columns, squeeze=False)
    for line, row in zip(grid, slices, strict=True):
        for axes in line[len(row) :]:
            axes.set_axis_off()
        for axes, entry in zip(line, row, strict=False):
            _draw_slice(axes, entry)
        line[0].set_ylabel(row[0].example.model, fontweight="bold")
    handles = [
        LineCollection([[(0, 0), (1, 0)]], colors=colour, linewidths=width, label=name)
        for name, (colour, width) in {"reference": REFERENCE, "prediction": PREDICTION}.items()
    ]
    legend = figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=True, labelcolor="white")
    legend.get_frame().set(facecolor="#222222", edgecolor="none")
    return figure


def _draw_slice(axes: Axes, entry: ExampleSlice) -> None:
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
    left, right, bottom, top = view_limits(entry.reference | entry.prediction, entry.spacing)
    axes.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[], aspect="equal")
    axes.spines[:].set_visible(False)
    axes.set_title(f"{entry.example.rank}: Dice {entry.example.dice:.2f}\n{entry.example.case}", fontsize=8.5)
    _scale_bar(axes, right - left)


def outline(mask: np.ndarray, spacing: tuple[float, float]) -> np.ndarray:
    """Outline a mask along the sides of its voxels.

    Contour lines would cut the corners of voxels, and most of a structure that is a few voxels wide.

    Args:
        mask: Boolean mask (y x).
        spacing: Voxel size in mm (y x).

    Returns:
        Line segments (segments, 2 ends, x and y) in mm.
    """
    padded = np.pad(mask.astype(bool), 1)
    rows, columns = np.nonzero(padded[1:, 1:-1] != padded[:-1, 1:-1])
    horizontal = [np.stack([np.stack([columns + end, rows], -1) for end in (0, 1)], 1)]
    rows, columns = np.nonzero(padded[1:-1, 1:] != padded[1:-1, :-1])
    vertical = [np.stack([np.stack([columns, rows + end], -1) for end in (0, 1)], 1)]
    return np.concatenate(horizontal + vertical) * np.array(spacing[::-1])


def view_limits(mask: np.ndarray, spacing: tuple[float, float]) -> tuple[float, float, float, float]:
    """Return left, right, bottom and top (mm) of a square around the mask, or of the whole slice if it is empty."""
    extent = np.array(mask.shape) * spacing
    side = float(extent.max())
    middle = extent / 2
    if mask.any():
        places = np.argwhere(mask)
        low, high = places.min(axis=0) * spacing, (places.max(axis=0) + 1) * spacing
        middle = (low + high) / 2
        side = min(side, max(SMALLEST_VIEW, 1.7 * float((high - low).max())))
    reach = np.minimum(side, extent) / 2
    middle = np.clip(middle, reach, extent - reach)  # stays inside the image
    y, x = middle
    return x - side / 2, x + side / 2, y + side / 2, y - side / 2


def _scale_bar(axes: Axes, side: float) -> None:
    length = max(step for step in (1, 2, 5, 10, 20, 50, 100) if step <= max(1.0, side / 4))
    share = length / side
    axes.plot([0.95 - share, 0.95], [0.05, 0.05], transform=axes.transAxes, color="white", linewidth=2.5)
    axes.text(
        0.95 - share / 2, 0.07, f"{length} mm", transform=axes.transAxes, color="white", ha="center", va="bottom"
    ).set_fontsize(8)
