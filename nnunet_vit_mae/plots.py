"""Figures: arrays in, PNG files out. Built without pyplot: nothing global is touched and no screen is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nnunet_vit_mae.files import replacing

PLANES = ("z", "y", "x")


def save_figure(figure: Figure, file: Path, dpi: int = 120) -> None:
    """Write a PNG that is whole or not there."""
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=dpi)


def plot_progress(losses: Sequence[float], rates: Sequence[float], file: Path) -> None:
    """Loss and learning rate of each epoch."""
    epochs = np.arange(1, len(losses) + 1)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    left = figure.add_subplot()
    left.plot(epochs, losses, color="tab:blue", marker="." if len(losses) < 30 else None)
    left.set(
        xlabel="epoch", ylabel="loss on hidden tokens", title=f"lowest loss {min(losses):.4f}, last {losses[-1]:.4f}"
    )
    left.grid(alpha=0.3)
    right = left.twinx()
    right.plot(epochs, rates, color="tab:gray", linewidth=1, linestyle="--")
    right.set_ylabel("learning rate (dashed)")
    right.set_ylim(bottom=0)
    save_figure(figure, file)


def plot_views(
    views: Sequence[np.ndarray], names: Sequence[str], spacing: Sequence[float], title: str, file: Path
) -> None:
    """Central slices of equally shaped volumes (z y x): a row for each plane, a column for each volume.

    The first volume sets the grey values. NaN is drawn in blue. `spacing` (z y x, mm) sets the aspect.
    """
    low, high = np.percentile(views[0], (1, 99))
    shape = np.array(views[0].shape) * np.array(spacing)
    heights = [shape[1], shape[0], shape[0]]  # of a slice across z, y and x, in mm
    figure = Figure(figsize=(2.6 * len(views), 2.6 * sum(heights) / shape[2] + 0.6), layout="constrained")
    figure.suptitle(title, fontsize=9)
    axes = figure.subplots(3, len(views), squeeze=False, height_ratios=heights)
    for column, (view, name) in enumerate(zip(views, names, strict=True)):
        axes[0, column].set_title(name, fontsize=9)
        for plane in range(3):
            _show_slice(axes[plane, column], view, plane, spacing, low, high)
            if column == 0:
                axes[plane, column].set_ylabel(f"across {PLANES[plane]}", fontsize=8)
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
    """One row of `plot_segmentations`: an image and its masks, all (z y x); the first mask is the reference."""

    title: str
    image: np.ndarray
    masks: Mapping[str, np.ndarray]
    dice: Mapping[str, float]


def plot_segmentations(rows: Sequence[Segmented], file: Path, window: tuple[float, float]) -> None:
    """The slice (across z) with most of the reference, once for each mask, with the mask's outline."""
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
