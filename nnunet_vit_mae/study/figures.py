"""The figures of a study: learning curves, how models learned, and paired differences with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nnunet_vit_mae.evaluation.drawing import (
    COLOURS,
    LINE,
    WIDTH,
    ModelStyle,
    Scale,
    draw_legend,
    label_y_axis,
    model_styles,
    styled,
)
from nnunet_vit_mae.study.comparisons import (
    COMPARED,
    PairedDifference,
    SeriesPoint,
    Variant,
    distinct,
    point_of,
)
from nnunet_vit_mae.study.training import PretrainingCurve, TrainingCurve

ROWS = {False: "As trained", True: "Calibrated"}
DIFFERENCE = {"dice": "Difference in Dice", "absolute_difference_mm3": "Difference in volume error (mm³)"}
WIDE = 5.0  # ratio of the largest to the smallest number of labels from which their axis is logarithmic


@styled
def learning_curves(table: pd.DataFrame, arms: Sequence[str], label: str) -> Figure:
    """Draw Dice and absolute volume difference by number of labels.

    Args:
        table: The results, as in `results.csv`.
        arms: The arms, in the order of the legend.
        label: The label.

    Returns:
        A figure with a row as trained and, if any, a row calibrated; seeds are dots, intervals are bands.
    """
    rows = [calibrated for calibrated in ROWS if calibrated in distinct(table, "calibrated")]
    figure = Figure(figsize=(WIDTH, 2.9 * len(rows) + 0.5), layout="constrained")
    panels = figure.subplots(len(rows), len(COMPARED), squeeze=False, sharey="col", sharex=True)
    numbers = sorted(distinct(table, "few"))
    styles = model_styles(arms)
    for axes_of_row, calibrated in zip(panels, rows, strict=True):
        for axes, measure in zip(axes_of_row, COMPARED, strict=True):
            for place, (arm, style) in enumerate(styles.items()):
                points = {few: point_of(table, Variant(arm, calibrated), few, label, measure) for few in numbers}
                known = {few: point for few, point in points.items() if point is not None}
                _draw_curve(axes, known, style, arm, 1 + 0.02 * (place - (len(styles) - 1) / 2))
            axes.set_title(ROWS[calibrated], loc="left")
            axes.grid(axis="y")
    _label_numbers(panels[-1], numbers)
    for axes_of_column, measure in zip(panels.T, COMPARED, strict=True):
        scale = None if measure == "dice" else Scale.around(_seed_means(table, label, measure))
        for axes in axes_of_column:
            label_y_axis(axes, measure, scale)
    draw_legend(figure, panels[:, 0], styles)
    return figure


def _seed_means(table: pd.DataFrame, label: str, measure: str) -> np.ndarray:
    """Return the mean over cases of each run: the arms with their numbers of labels and seeds, calibrated or not."""
    of_label = table[table["label"] == label]
    return np.asarray(of_label.groupby(["arm", "calibrated", "few", "seed"])[measure].mean(), float)


def _draw_curve(axes: Axes, points: Mapping[int, SeriesPoint], style: ModelStyle, name: str, shift: float) -> None:
    """Draw the curve of an arm; its dots are shifted by a factor, so that those of all arms can be seen."""
    if not points:
        return
    numbers = np.array([*points])
    means, low, high = (np.array([getattr(p, part) for p in points.values()]) for part in ("mean", "low", "high"))
    if len(points) > 1:
        axes.plot(numbers, means, color=style.colour, marker=style.marker, markersize=5, linewidth=1.4, label=name)
        axes.fill_between(numbers, low, high, color=style.colour, alpha=0.13, linewidth=0)
    else:
        axes.plot(numbers * shift, means, color=style.colour, marker=style.marker, linewidth=0, label=name)
        axes.vlines(numbers * shift, low, high, color=style.colour, alpha=0.3, linewidth=7)
    for few, point in points.items():
        axes.scatter([few * shift] * len(point.seeds), point.seeds, **style.points(13), zorder=3)


def _label_numbers(row: Sequence[Axes], numbers: Sequence[int]) -> None:
    """Label the shared axis of the numbers of labels."""
    for axes in row:
        if numbers[-1] / numbers[0] > WIDE:
            axes.set_xscale("log")
        axes.set_xticks(numbers, [str(number) for number in numbers])
        axes.set_xticks([], minor=True)
        axes.set_xlim(0.85 * numbers[0], 1.15 * numbers[-1])
        axes.set_xlabel("Labelled training patients")


@styled
def differences_figure(answers: Sequence[PairedDifference]) -> Figure:
    """Draw paired differences of a question, a panel for each measure: interval, mean, and seeds as dots."""
    rows = list(dict.fromkeys((paired.few, paired.first, paired.second) for paired in answers))
    figure = Figure(figsize=(WIDTH, 0.32 * len(rows) + 1.2), layout="constrained")
    panels = figure.subplots(1, len(COMPARED), squeeze=False, sharey=True)[0]
    for axes, measure in zip(panels, COMPARED, strict=True):
        for paired in answers:
            if paired.measure == measure:
                _draw_difference(axes, paired, rows.index((paired.few, paired.first, paired.second)))
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_xlabel(DIFFERENCE[measure])
        axes.grid(axis="x")
        axes.set_ylim(len(rows) - 0.5, -0.5)
    names = [f"{second} \N{MINUS SIGN} {first}, {few} labels" for few, first, second in rows]
    panels[0].set_yticks(range(len(rows)), names)
    return figure


def _draw_difference(axes: Axes, paired: PairedDifference, place: int) -> None:
    colour = COLOURS[0] if paired.significant else "#777777"
    axes.plot([paired.low, paired.high], [place, place], color=colour, linewidth=4, alpha=0.35)
    axes.plot(paired.difference, place, marker="D", color=colour, markersize=5)
    axes.scatter(paired.seed_differences, [place + 0.22] * len(paired.seed_differences), s=9, color=colour, linewidth=0)


@styled
def pretraining_figure(curves: Sequence[PretrainingCurve]) -> Figure:
    """Draw the loss of each encoder by epoch; a dotted line marks where it becomes another loss."""
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    axes = figure.subplots()
    for curve, style in zip(curves, model_styles(curve.encoder for curve in curves).values(), strict=True):
        epochs = np.arange(1, len(curve.losses) + 1)
        plain, name = slice(0, curve.plain), curve.encoder
        for part in (plain, slice(curve.plain, None)):
            if len(epochs[part]):
                axes.plot(epochs[part], curve.losses[part], color=style.colour, linewidth=1.2, label=name)
                name = None
        if curve.plain:
            axes.axvline(curve.plain + 0.5, color=LINE, linewidth=0.8, linestyle=":")
    axes.set(xlabel="Epoch", ylabel="Loss on masked tokens")
    axes.grid(axis="y")
    axes.legend(frameon=False)
    return figure


@styled
def training_figure(curves: Sequence[TrainingCurve]) -> Figure:
    """Draw loss and Dice by epoch: a row for each number of labels, a line for each seed."""
    rows, arms = sorted({curve.few for curve in curves}), dict.fromkeys(curve.arm for curve in curves)
    figure = Figure(figsize=(WIDTH, 2.6 * len(rows) + 0.5), layout="constrained")
    panels = figure.subplots(len(rows), 2, squeeze=False, sharey="col", sharex=True)
    for (left, right), few in zip(panels, rows, strict=True):
        for arm, style in model_styles(arms).items():
            for number, curve in enumerate(c for c in curves if (c.arm, c.few) == (arm, few)):
                drawn = {"color": style.colour, "linewidth": 1, "alpha": 0.8, "label": None if number else arm}
                left.plot(np.arange(1, len(curve.losses) + 1), curve.losses, **drawn)
                right.plot(np.arange(1, len(curve.dice) + 1), curve.dice, **drawn)
        left.set_title(f"{few} labels", loc="left")
        left.set_ylabel("Training loss")
        label_y_axis(right, "dice", None)
        left.grid(axis="y")
        right.grid(axis="y")
    for axes in panels[-1]:
        axes.set_xlabel("Epoch")
    draw_legend(figure, panels[:, 0], arms)  # an arm may lack some numbers of labels
    return figure
