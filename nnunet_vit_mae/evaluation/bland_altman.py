"""Bland-Altman plots of volumes (ViTiac, figure 4)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from nnunet_vit_mae.evaluation.drawing import (
    PER_ROW,
    format_tick,
    make_panels,
    model_styles,
    range_with_margin,
    styled,
    wrap_name,
)
from nnunet_vit_mae.evaluation.words import MINUS, format_values
from nnunet_vit_mae.statistics import limits_of_agreement


@styled
def bland_altman_figure(volumes: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Draw predicted minus reference volume over the mean of both, with bias and limits of agreement.

    Args:
        volumes: Reference and predicted volumes (mm3, one per case) by the name of a panel.

    Returns:
        A figure with a panel for each name, all with the same axes.
    """
    means = {name: (reference + predicted) / 2 for name, (reference, predicted) in volumes.items()}
    differences = {name: predicted - reference for name, (reference, predicted) in volumes.items()}
    limits = {name: limits_of_agreement(values) for name, values in differences.items()}
    xlim = range_with_margin([0.0, *np.concatenate([*means.values()])])
    ylim = range_with_margin([0.0, *np.concatenate([*differences.values(), *limits.values()])])
    figure, panels = make_panels(list(volumes), height=3.3)
    for place, (axes, (name, style)) in enumerate(zip(panels, model_styles(volumes).items(), strict=True)):
        axes.scatter(means[name], differences[name], **style.points(20), zorder=3)
        axes.axhline(0, color="#c8c8c8", linewidth=0.8, zorder=0)
        axes.set_title(wrap_name(name, 26), fontweight="bold")
        axes.set(xlim=xlim, ylim=ylim, xlabel="Mean of both volumes (mm³)")
        axes.xaxis.set_major_formatter(FuncFormatter(format_tick))
        axes.yaxis.set_major_formatter(FuncFormatter(format_tick))
        axes.locator_params(axis="x", nbins=4)
        axes.tick_params(labelleft=place % PER_ROW == 0)
        if place % PER_ROW == 0:
            axes.set_ylabel(f"Predicted {MINUS} reference (mm³)")
        bias, lower, upper = limits[name]
        lines = {"+1.96 SD": upper, "bias": bias, f"{MINUS}1.96 SD": lower}
        _draw_lines(axes, {text: value for text, value in lines.items() if math.isfinite(value)}, ylim)
    return figure


def _draw_lines(axes: Axes, values: dict[str, float], limits: tuple[float, float]) -> None:
    """Draw horizontal lines with their names and values to the right."""
    places = spread_apart(list(values.values()), 0.13 * (limits[1] - limits[0]), limits)
    texts = format_values("difference_mm3", *values.values())
    for (name, value), place, text in zip(values.items(), places, texts, strict=True):
        axes.axhline(value, color="black", linewidth=1.1, linestyle="-" if name == "bias" else "--", zorder=2)
        weight = "bold" if name == "bias" else "normal"
        inside = {"xycoords": ("axes fraction", "data"), "va": "center", "annotation_clip": False}
        axes.annotate(f"{name}\n{text}", (1.03, place), **inside, fontsize=8, fontweight=weight)


def spread_apart(values: Sequence[float], gap: float, limits: tuple[float, float]) -> list[float]:
    """Move descending values as little as needed to lie `gap` apart and within the limits.

    >>> spread_apart([1.0, 0.5, 0.0], 10, (-50, 50))
    [10.5, 0.5, -9.5]
    """
    middle = len(values) // 2
    places = list(values)
    for index in range(middle - 1, -1, -1):
        places[index] = max(places[index], places[index + 1] + gap)
    for index in range(middle + 1, len(places)):
        places[index] = min(places[index], places[index - 1] - gap)
    shift = max(limits[0] - places[-1], 0.0) - max(places[0] - limits[1], 0.0) if places else 0.0
    return [place + shift for place in places]
