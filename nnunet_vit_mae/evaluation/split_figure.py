"""Volumes, slice thickness and kernels in the parts of a split (ViTiac, supplementary figure 1)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nnunet_vit_mae.evaluation.drawing import (
    COLOURS,
    WIDTH,
    ModelStyle,
    Scale,
    draw_box,
    label_y_axis,
    point_offsets,
    styled,
    wrap_name,
)

OTHER = "other"
STYLE = ModelStyle(COLOURS[0], "o")
LARGEST_KERNELS = len(COLOURS) - 1  # the last colour is that of all others


@dataclass(frozen=True)
class ScanProperties:
    """What is known of the scans, by case: labelled volume in mm3, slice thickness in mm, kernel."""

    volume: Mapping[str, float]
    thickness: Mapping[str, float]
    kernel: Mapping[str, str]


@styled
def split_figure(parts: Mapping[str, Sequence[str]], scans: ScanProperties) -> Figure:
    """Draw a panel for each property that is known of any scan, with the parts of a split side by side.

    Args:
        parts: The cases of each part, by name.
        scans: What is known of the cases.
    """
    numbers = {"labelled_mm3": scans.volume, "slice_thickness_mm": scans.thickness}
    rows = [column for column, values in numbers.items() if values] + ["kernel"] * bool(scans.kernel)
    figure = Figure(figsize=(WIDTH, 2.5 * len(rows) + 0.5), layout="constrained")
    panels = figure.subplots(len(rows), 1, squeeze=False, sharex=True)[:, 0]
    for axes, row in zip(panels, rows, strict=True):
        if row == "kernel":
            _draw_kernels(axes, parts, scans.kernel)
        else:
            _draw_numbers(axes, parts, numbers[row], row)
    names = [f"{wrap_name(name, 16)}\nn = {len(cases)}" for name, cases in parts.items()]
    panels[-1].set_xticks(range(len(parts)), names)
    panels[-1].set_xlim(-0.5, len(parts) - 0.5)
    return figure


def _draw_numbers(axes: Axes, parts: Mapping[str, Sequence[str]], values: Mapping[str, float], column: str) -> None:
    for place, cases in enumerate(parts.values()):
        own = np.array([values[case] for case in cases if case in values])
        draw_box(axes, own, place - 0.14, 0.26, STYLE)
        axes.scatter(place + 0.22 + point_offsets(len(own)), own, **STYLE.points(12), zorder=3)
    axes.grid(axis="y")
    label_y_axis(axes, column, Scale.around(np.array([*values.values()])))


def _draw_kernels(axes: Axes, parts: Mapping[str, Sequence[str]], kernels: Mapping[str, str]) -> None:
    """Draw the share of each kernel as a stacked bar; rare kernels are one colour."""
    shown = [name for name, _ in Counter(kernels.values()).most_common(LARGEST_KERNELS)]
    known = [[kernels[case] for case in cases if case in kernels] for cases in parts.values()]
    counts = [Counter(name if name in shown else OTHER for name in names) for names in known]
    below = np.zeros(len(parts))
    for name, colour in zip([*shown, OTHER], COLOURS, strict=False):
        shares = np.array([100 * count[name] / max(1, count.total()) for count in counts])
        if shares.any():
            axes.bar(range(len(parts)), shares, 0.6, bottom=below, color=colour, label=wrap_name(name, 24))
            below += shares
    axes.set_ylabel("Kernel (% of scans)")
    axes.set_ylim(0, 100)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
