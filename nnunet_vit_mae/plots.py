"""Figures as PNG or SVG files. They do not use pyplot, so that they change no global state and need no display."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nnunet_vit_mae.presets import AXES
from nnunet_vit_mae.storage.files import replacing


@contextmanager
def names_as_written() -> Iterator[None]:
    """Draw names in the block as they are: a dollar begins no formula, and characters that the font lacks are boxes."""
    with rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


def save_figure(figure: Figure, file: Path, dpi: int = 120) -> None:
    """Write a figure, with no partial file if interrupted; equal figures give equal files.

    Args:
        figure: The figure.
        file: A PNG or SVG, by its suffix.
        dpi: Pixels per inch of a PNG.
    """
    metadata = {"Date": None} if file.suffix == ".svg" else None
    with replacing(file) as temporary, rc_context({"svg.hashsalt": file.stem}), names_as_written():
        figure.savefig(temporary, dpi=dpi, metadata=metadata)


def plot_progress(losses: Sequence[float], rates: Sequence[float], file: Path, *, plain: int = 0) -> None:
    """Plot the loss (left axis) and the learning rate (right axis) of each epoch.

    Args:
        losses: Loss of each epoch.
        rates: Learning rate of each epoch.
        file: The figure to write.
        plain: After how many epochs the loss is another one, from plain to norm-pix: the two cannot be compared.
    """
    comparable = losses[plain:] or losses
    epochs = np.arange(1, len(losses) + 1)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    left = figure.add_subplot()
    left.plot(epochs, losses, color="tab:blue", marker="." if len(losses) < 30 else None)
    left.set(
        xlabel="epoch",
        ylabel="loss on masked tokens",
        title=f"lowest loss {min(comparable):.4f}, last {losses[-1]:.4f}",
    )
    left.grid(alpha=0.3)
    if 0 < plain < len(losses):
        left.axvline(plain + 0.5, color="tab:blue", linewidth=1, linestyle=":", label="plain before, norm-pix after")
        left.legend(frameon=False)
    right = left.twinx()
    right.plot(epochs, rates, color="tab:gray", linewidth=1, linestyle="--")
    right.set_ylabel("learning rate (dashed)")
    right.set_ylim(bottom=0)
    save_figure(figure, file)


def plot_views(
    views: Sequence[np.ndarray], names: Sequence[str], spacing: Sequence[float], title: str, file: Path
) -> None:
    """Draw central slices of volumes, with a row for each plane and a column for each volume.

    Args:
        views: Volumes of equal shape (z y x). The first sets the range of grey values; NaN is drawn in blue.
        names: Title of each column.
        spacing: Voxel size in mm (z y x).
        title: Title of the figure.
        file: The figure to write.
    """
    low, high = np.percentile(views[0], (1, 99))
    shape = np.array(views[0].shape) * np.array(spacing)
    heights = [shape[1], shape[0], shape[0]]  # mm, of a slice across z, y and x
    figure = Figure(figsize=(2.6 * len(views), 2.6 * sum(heights) / shape[2] + 0.6), layout="constrained")
    figure.suptitle(title, fontsize=9)
    axes = figure.subplots(3, len(views), squeeze=False, height_ratios=heights)
    for column, (view, name) in enumerate(zip(views, names, strict=True)):
        axes[0, column].set_title(name, fontsize=9)
        for plane in range(3):
            _show_slice(axes[plane, column], view, plane, spacing, low, high)
            if column == 0:
                axes[plane, column].set_ylabel(f"across {AXES[plane]}", fontsize=8)
    save_figure(figure, file)


def plot_contrasts(
    views: Mapping[str, np.ndarray], names: Sequence[str], spacing: Sequence[float], title: str, file: Path
) -> None:
    """Draw the central slice across z, with a row for each view and a column for each contrast (AMAE, figure 2).

    Args:
        views: Volumes of equal shape (contrast z y x) by name. The first sets the range of grey values of each
            contrast; NaN is drawn in blue.
        names: Name of each contrast.
        spacing: Voxel size in mm (z y x).
        title: Title of the figure.
        file: The figure to write.
    """
    _, _, height, width = next(iter(views.values())).shape
    tall = 2.2 * (height * spacing[1]) / (width * spacing[2])
    figure = Figure(figsize=(2.2 * len(names), len(views) * tall + 0.8), layout="constrained")
    figure.suptitle(title, fontsize=9)
    axes = figure.subplots(len(views), len(names), squeeze=False)
    for row, (view, volumes) in enumerate(views.items()):
        for column, name in enumerate(names):
            low, high = np.percentile(next(iter(views.values()))[column], (1, 99))
            _show_slice(axes[row, column], volumes[column], 0, spacing, low, high)
            if row == 0:
                axes[0, column].set_title(name, fontsize=9)
        axes[row, 0].set_ylabel(view, fontsize=8)
    save_figure(figure, file)


def _show_slice(axes: Axes, volume: np.ndarray, plane: int, spacing: Sequence[float], low: float, high: float) -> None:
    rows, columns = (step for axis, step in enumerate(spacing) if axis != plane)
    image = np.take(volume, volume.shape[plane] // 2, axis=plane)
    axes.set_facecolor("#30507a")
    origin = "upper" if plane == 0 else "lower"  # z points up
    axes.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=rows / columns, origin=origin)
    axes.set(xticks=[], yticks=[])


@dataclass(frozen=True)
class Segmented:
    """A row of `plot_segmentations`; arrays are (z y x)."""

    title: str
    image: np.ndarray
    masks: Mapping[str, np.ndarray]  # by name; the first is the reference
    dice: Mapping[str, float]  # by name of the mask


def plot_segmentations(rows: Sequence[Segmented], file: Path, window: tuple[float, float]) -> None:
    """Draw the slice across z with most of the reference, with the outline of a mask in each column.

    Args:
        rows: Images with masks of the same names.
        file: The figure to write.
        window: Grey values shown black and white.
    """
    columns = len(rows[0].masks)
    figure = Figure(figsize=(2.6 * columns, 2.8 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, entry in enumerate(rows):
        reference = next(iter(entry.masks.values()))
        z = int(reference.reshape(len(reference), -1).sum(axis=1).argmax())
        for column, (name, mask) in enumerate(entry.masks.items()):
            axis = axes[row, column]
            axis.imshow(entry.image[z], cmap="gray", vmin=window[0], vmax=window[1])
            if mask[z].any():
                axis.contour(mask[z] > 0, levels=[0.5], colors="tab:red" if column else "tab:green", linewidths=1.2)
            axis.set_title(f"{name}, Dice {entry.dice[name]:.2f}" if name in entry.dice else entry.title, fontsize=8)
            axis.set(xticks=[], yticks=[])
    save_figure(figure, file)


@dataclass(frozen=True)
class Features:
    """A row of `plot_features`; arrays are slices (y x)."""

    title: str
    maps: Mapping[str, np.ndarray]  # by name; the first is the image
    probability: np.ndarray  # 0 to 1
    caption: str  # of the probability
    spacing: Sequence[float]  # mm, z y x


def plot_features(rows: Sequence[Features], title: str, file: Path) -> None:
    """Draw the maps of each network, each with its own range of grey values, and the probability over the image.

    Args:
        rows: Maps of each network.
        title: Title of the figure.
        file: The figure to write.
    """
    columns = max(len(row.maps) for row in rows) + 1
    shapes = [(row.probability.shape[0] * row.spacing[1], row.probability.shape[1] * row.spacing[2]) for row in rows]
    heights = [2.2 * height / width + 0.5 for height, width in shapes]
    figure = Figure(figsize=(2.2 * columns, sum(heights) + 0.3), layout="compressed")
    figure.suptitle(title, fontsize=9)
    axes = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for line, row in zip(axes, rows, strict=True):
        line[0].set_ylabel(row.title, fontsize=8)
        for axis, (name, values) in zip(line, row.maps.items(), strict=False):
            _show_features(axis, values, name, row.spacing)
        for axis in line[len(row.maps) : -1]:
            axis.set_axis_off()
        image = next(iter(row.maps.values()))
        _show_features(line[-1], image, row.caption, row.spacing)
        aspect = row.spacing[1] / row.spacing[2]
        line[-1].imshow(row.probability, cmap="autumn", vmin=0, vmax=1, alpha=0.7 * row.probability, aspect=aspect)
    save_figure(figure, file, dpi=200)  # several pixels per voxel, for fine patterns


def _show_features(axes: Axes, values: np.ndarray, name: str, spacing: Sequence[float]) -> None:
    low, high = np.percentile(values, (1, 99))
    _show_slice(axes, values[np.newaxis], 0, spacing, low, high)
    axes.set_title(name, fontsize=8)
