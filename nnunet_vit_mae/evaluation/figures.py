"""Figures of the report: each function takes an `Evaluation` and a label and returns a matplotlib figure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nnunet_vit_mae.evaluation.drawing import (
    LINE,
    PER_ROW,
    WIDTH,
    Scale,
    draw_box,
    label_y_axis,
    make_panels,
    model_styles,
    point_offsets,
    styled,
    wrap_name,
)
from nnunet_vit_mae.evaluation.results import Bin, Evaluation
from nnunet_vit_mae.evaluation.words import HIGHLIGHTED, correct_in_words, range_text, title_with_unit


@styled
def measures_figure(evaluation: Evaluation, label: str) -> Figure:
    """Draw Dice and absolute volume difference: a box and points for each model, and lines that join the same case."""
    crowded = len(evaluation.models) > 4  # names are vertical then
    figure = Figure(figsize=(WIDTH, 5.2 if crowded else 3.9), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)  # type: ignore[union-attr]
    for axes, column in zip(figure.subplots(1, 2), HIGHLIGHTED, strict=True):
        table = _pivot(evaluation, label, column)
        scale = Scale.around(table) if column != "dice" else None
        for offset, values in zip(point_offsets(len(table)), table, strict=True):
            axes.plot(np.arange(len(values)) + 0.22 + offset, values, color="#b5b5b5", linewidth=0.5, zorder=1)
        for place, style in enumerate(model_styles(evaluation.models).values()):
            values = table[:, place]
            draw_box(axes, values, place - 0.14, 0.26, style)
            axes.scatter(place + 0.22 + point_offsets(len(values)), values, **style.points(16), zorder=3)
        names = [wrap_name(model, 20 if crowded else 15) for model in evaluation.models]
        axes.set_xticks(range(len(names)), names, rotation=90 if crowded else 0)
        axes.set_xlim(-0.5, len(evaluation.models) - 0.5)
        axes.grid(axis="y")
        label_y_axis(axes, column, scale)
    return figure


@styled
def scatter_figure(evaluation: Evaluation, label: str) -> Figure:
    """Draw predicted over reference volume with the line of identity; in a square both are in the same risk group."""
    risks = {risk.model: risk for risk in evaluation.risks_of(label)}
    volumes = evaluation.volumes_of(label)
    scale = Scale.around(np.concatenate([np.concatenate(pair) for pair in volumes.values()]))
    figure, panels = make_panels(evaluation.models, height=3.0)
    for place, (axes, (model, style)) in enumerate(zip(panels, model_styles(evaluation.models).items(), strict=True)):
        scale.apply(axes, "x")
        scale.apply(axes, "y")
        low, high = scale.limits
        axes.plot([low, high], [low, high], color=LINE, linewidth=1, zorder=2)
        if model in risks:
            _shade_groups(axes, [low, *risks[model].cutoffs, high])
        axes.scatter(*volumes[model], **style.points(20), zorder=3)
        axes.set_title(wrap_name(model, 26), fontweight="bold")
        axes.set_box_aspect(1)
        axes.set_xlabel(f"Reference (mm³{scale.note})")
        axes.tick_params(labelleft=place % PER_ROW == 0)
        if place % PER_ROW == 0:
            axes.set_ylabel(f"Predicted (mm³{scale.note})")
    return figure


def _shade_groups(axes: Axes, edges: Sequence[float]) -> None:
    for start, end in pairwise(edges):
        axes.fill_between([start, end], start, end, color="#ececec", linewidth=0, zorder=0)
    for cutoff in edges[1:-1]:
        axes.axvline(cutoff, color="#9a9a9a", linewidth=0.7, linestyle=":", zorder=1)
        axes.axhline(cutoff, color="#9a9a9a", linewidth=0.7, linestyle=":", zorder=1)


@styled
def risk_figure(evaluation: Evaluation, label: str) -> Figure:
    """Draw a confusion matrix for each model: risk groups by reference volume (rows) and predicted volume (columns)."""
    risks = {risk.model: risk for risk in evaluation.risks_of(label)}
    models = [model for model in evaluation.models if model in risks]
    figure, panels = make_panels(models, height=3.2)
    for place, (axes, model) in enumerate(zip(panels, models, strict=True)):
        risk = risks[model]
        _draw_confusion(axes, np.array(risk.confusion, dtype=float).reshape(len(risk.groups), len(risk.groups)))
        names = [wrap_name(group, 12) for group in risk.groups]
        vertical = max(map(len, risk.groups)) * len(names) > 34
        places = np.arange(len(names)) + 0.5
        axes.set_xticks(places, names, rotation=90 if vertical else 0)
        axes.set_yticks(places, names if place % PER_ROW == 0 else [""] * len(names))
        axes.set_xlabel("Group by predicted volume")
        if place % PER_ROW == 0:
            axes.set_ylabel("Group by reference volume")
        axes.set_title(f"{wrap_name(model, 26)}\n", fontweight="bold")
        axes.annotate(correct_in_words(risk), (0.5, 1.02), xycoords="axes fraction", ha="center", va="bottom")
    return figure


def _draw_confusion(axes: Axes, counts: np.ndarray) -> None:
    rows = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, rows, out=np.zeros_like(counts), where=rows > 0)
    axes.pcolormesh(shares, cmap="Blues", vmin=0, vmax=1.15, edgecolors="white", linewidth=1.5)
    for row, column in np.ndindex(counts.shape):
        axes.text(
            column + 0.5,
            row + 0.5,
            f"{counts[row, column]:.0f}",
            ha="center",
            va="center",
            color="white" if shares[row, column] > 0.65 else "black",
            fontsize=11,
            fontweight="bold" if row == column else "normal",
        )
    axes.set(xlim=(0, len(counts)), ylim=(len(counts), 0), aspect="equal")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


@styled
def bins_figure(evaluation: Evaluation, label: str) -> Figure:
    """Draw Dice by slice thickness and volume difference by reference volume (ViTiac, supplementary figure 2)."""
    pairs = evaluation.bin_pairs(label)
    figure = Figure(figsize=(WIDTH, 3.2 * len(pairs) + 0.4), layout="constrained")
    figure.get_layout_engine().set(hspace=0.08)  # type: ignore[union-attr]
    for axes, (measure, quantity) in zip(figure.subplots(len(pairs), squeeze=False)[:, 0], pairs, strict=True):
        _draw_bins(axes, evaluation, evaluation.bins_of(label, measure, quantity))
    handles = [
        figure.axes[0].scatter([], [], **style.points(28), label=wrap_name(model, 30))
        for model, style in model_styles(evaluation.models).items()
    ]
    if len(evaluation.models) > 1:
        figure.legend(handles=handles, loc="outside upper center", ncols=min(4, len(handles)), frameon=False)
    return figure


def _draw_bins(axes: Axes, evaluation: Evaluation, bins: Sequence[Bin]) -> None:
    measure, quantity = bins[0].measure, bins[0].quantity
    ranges = sorted({(entry.low, entry.high) for entry in bins})
    rows = evaluation.rows_of(bins[0].label)
    sizes, values = (rows[column].to_numpy(dtype=float) for column in (quantity, measure))
    scale = None
    if measure.endswith("difference"):  # relative differences of small volumes can be very large
        scale = Scale.around(values, ratio=25)
    step = 0.8 / len(evaluation.models)
    for place, (low, high) in enumerate(ranges):
        if place % 2:
            axes.axvspan(place - 0.5, place + 0.5, color="#f6f6f6", linewidth=0, zorder=0)
        for index, (model, style) in enumerate(model_styles(evaluation.models).items()):
            inside = (sizes <= high) & ((sizes >= low) if place == 0 else (sizes > low))
            chosen = values[inside & (rows["model"] == model).to_numpy()]
            centre = place + (index - (len(evaluation.models) - 1) / 2) * step
            draw_box(axes, chosen, centre, 0.78 * step, style)
            axes.scatter(centre + step * point_offsets(len(chosen)), chosen, **style.points(12), zorder=3)
    counts = {edges: max(entry.n for entry in bins if (entry.low, entry.high) == edges) for edges in ranges}
    axes.set_xticks(
        range(len(ranges)),
        [f"{range_text(*edges, first=not place)}\nn = {counts[edges]}" for place, edges in enumerate(ranges)],
    )
    axes.set_xlim(-0.5, len(ranges) - 0.5)
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel(title_with_unit(quantity))
    axes.grid(axis="y")
    label_y_axis(axes, measure, scale)


def _pivot(evaluation: Evaluation, label: str, column: str) -> np.ndarray:
    """Return values (cases models), NaN where there is none."""
    rows = evaluation.rows_of(label)
    table = rows.pivot(index="case", columns="model", values=column).reindex(columns=list(evaluation.models))
    return table.to_numpy(dtype=float)
