"""Pictures for checking registrations by eye: a thumbnail for each case, and contact sheets of them, worst first.

All thumbnails show the same place of the template, so that a wrong registration stands out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_vit_mae.datasets.crop.region import Region
from nnunet_vit_mae.storage.files import replacing

PIXELS = 110  # along a side of one view
AROUND = 0.5  # share of the region's largest side that is shown around it on each side
RED = (255, 60, 40)
COLUMNS, ROWS = 4, 10  # thumbnails on a sheet


def thumbnail(region: Region, scan: sitk.Image, transform: sitk.Transform) -> np.ndarray:
    """Draw axial, coronal and sagittal slices of the scan through the region's centre, with the region's outline.

    Args:
        region: The region on its template.
        scan: The registered scan.
        transform: Maps points of the template to points of the scan (mm).

    Returns:
        RGB values (height width 3, uint8) on the template's axes; everything outside the scan is blue.
    """
    extent = np.ptp(region.points, axis=0)
    side = float(extent.max()) * (1 + 2 * AROUND)
    grid = sitk.Image([PIXELS] * 3, sitk.sitkUInt8)
    grid.SetSpacing([side / PIXELS] * 3)
    grid.SetOrigin((region.centre - side * (PIXELS - 1) / PIXELS / 2).tolist())
    shown = sitk.Resample(scan, grid, transform, sitk.sitkLinear, float("nan"), sitk.sitkFloat32)
    mask = sitk.Resample(region.mask, grid, sitk.Transform(3, sitk.sitkIdentity), sitk.sitkNearestNeighbor, 0)
    grey, inside = sitk.GetArrayFromImage(shown), sitk.GetArrayFromImage(mask) > 0
    in_view = grey[np.isfinite(grey)]
    low, high = np.percentile(in_view, (1, 99.5)) if in_view.size else (0.0, 1.0)
    views = []
    for axis in range(3):
        picture, area = grey.take(PIXELS // 2, axis), inside.max(axis)  # the region's projection, as it may be a tube
        if axis:  # z increases towards the head, but rows go down
            picture, area = picture[::-1], area[::-1]
        views.append(_painted(picture, area, float(low), float(high)))
    return np.concatenate(views, axis=1)


def write_thumbnail(picture: np.ndarray, file: Path) -> None:
    """Write a thumbnail as PNG; the file is complete or absent."""
    from matplotlib.image import imsave

    with replacing(file) as temporary:
        imsave(temporary, picture)


def write_sheets(pictures: Sequence[tuple[Path, str]], folder: Path) -> list[Path]:
    """Draw thumbnails with their captions on contact sheets, in the given order; older sheets are removed."""
    from matplotlib.figure import Figure  # `--help` does not wait for it
    from matplotlib.image import imread

    from nnunet_vit_mae.plots import names_as_written, save_figure

    for old in folder.glob("contact_sheet_[0-9]*.png"):
        old.unlink()
    sheets, many = [], COLUMNS * ROWS
    for start in range(0, len(pictures), many):
        page = pictures[start : start + many]
        rows = -(-len(page) // COLUMNS)
        figure = Figure(figsize=(COLUMNS * 3.6, rows * 1.5 + 0.1), layout="constrained")
        with names_as_written():
            for axes in (grid := figure.subplots(rows, COLUMNS, squeeze=False).ravel()):
                axes.set_axis_off()
            for axes, (file, text) in zip(grid, page, strict=False):
                axes.set_title(text, fontsize=7.5, loc="left", pad=2)
                axes.imshow(imread(file))
        sheets.append(folder / f"contact_sheet_{len(sheets) + 1:02d}.png")
        save_figure(figure, sheets[-1], dpi=110)
    return sheets


def _painted(grey: np.ndarray, area: np.ndarray, low: float, high: float) -> np.ndarray:
    """Colour grey values (h w): the mask's outline red, values that are not finite blue; returns h w 3, uint8."""
    scaled = np.clip((grey - low) / max(high - low, 1e-6), 0, 1)
    colours = np.repeat((255 * np.nan_to_num(scaled)).astype(np.uint8)[..., None], 3, axis=2)
    colours[~np.isfinite(grey)] = (40, 50, 90)
    inner = area.copy()
    for axis, step in ((0, 1), (0, -1), (1, 1), (1, -1)):
        inner &= np.roll(area, step, axis)
    colours[area & ~inner] = RED
    colours[[0, -1]] = colours[:, [0, -1]] = 0  # a frame between views
    return colours
