"""Figures of a calibration: volume difference and Dice by threshold, agreement before and after (ViTiac, figure 4),
and the reliability of the probabilities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from scipy.special import logit

from nnunet_vit_mae.calibration.open_cases import LOG_ODDS_LIMIT
from nnunet_vit_mae.calibration.temperature import Reliability
from nnunet_vit_mae.calibration.thresholds import CaseVolumes, ThresholdCurve
from nnunet_vit_mae.evaluation.bland_altman import bland_altman_figure
from nnunet_vit_mae.evaluation.drawing import COLOURS, format_tick, styled

TICKS = np.array([0.001, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98, 0.999])


@styled
def curve_figure(curves: Mapping[str, ThresholdCurve], thresholds: Sequence[float]) -> Figure:
    """Draw mean absolute volume difference (left axis) and mean Dice (right axis) of each class by threshold.

    Args:
        curves: The curve of each class, by name.
        thresholds: The fitted threshold of each class.

    Returns:
        A figure with a row for each class.
    """
    figure = Figure(figsize=(7, 2.9 * len(curves)), layout="constrained")
    rows = figure.subplots(len(curves), squeeze=False)[:, 0]
    for axes, (label, curve), threshold in zip(rows, curves.items(), thresholds, strict=True):
        axes.plot(logit(curve.thresholds), curve.difference_mm3, color=COLOURS[0])
        axes.set_ylabel("Mean absolute volume\ndifference (mm³)", color=COLOURS[0])
        # cuts off the part where most of the image is foreground, which would hide the minimum
        shown = np.interp([0.5, threshold, 1.0], curve.thresholds, curve.difference_mm3)
        axes.set_ylim(0, 2 * max(shown.max(), 1e-6))
        right = axes.twinx()
        right.plot(logit(curve.thresholds), curve.dice, color=COLOURS[1], linestyle="--")
        right.set_ylabel("Mean Dice (dashed)", color=COLOURS[1])
        right.set_ylim(0, 1)
        for place, name, style in ((0.5, "nnU-Net: 0.5", ":"), (threshold, f"calibrated: {threshold:.3g}", "-")):
            axes.axvline(logit(place), color="black", linewidth=1, linestyle=style, label=name)
        axes.legend(loc="upper right", fontsize=8)
        axes.set_xticks(logit(TICKS), [f"{tick:g}" for tick in TICKS])
        axes.set(
            xlim=(-LOG_ODDS_LIMIT, LOG_ODDS_LIMIT),
            xlabel="Threshold on the probability (axis in log odds)",
            title=label,
        )
        axes.yaxis.set_major_formatter(FuncFormatter(format_tick))
    return figure


def agreement_figure(volumes: Sequence[CaseVolumes], label: str) -> Figure:
    """Draw Bland-Altman plots of one class before and after calibration.

    Args:
        volumes: Volumes of the cases that the threshold was fitted to.
        label: The class.

    Returns:
        A figure with two panels.
    """
    rows = [row for row in volumes if row.label == label]
    reference = np.array([row.reference_mm3 for row in rows])
    before, after = np.array([row.before_mm3 for row in rows]), np.array([row.after_mm3 for row in rows])
    return bland_altman_figure({"before calibration": (reference, before), "after calibration": (reference, after)})


@styled
def reliability_figure(curves: Mapping[str, Mapping[str, Reliability]], temperature: float) -> Figure:
    """Draw how often voxels belong to each class by the probability that they do (a reliability diagram).

    Args:
        curves: The curves `before` and `after` the temperature, by class.
        temperature: The temperature; at 1 both curves are the same, and one is drawn.

    Returns:
        A figure with a panel for each class.
    """
    figure = Figure(figsize=(3.5 * len(curves), 3.6), layout="constrained")
    names = {"before": "as trained"} | ({"after": f"temperature {temperature:.3g}"} if temperature != 1 else {})
    for axes, (label, of_label) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        axes.plot([0, 1], [0, 1], color="black", linewidth=1, linestyle=":")
        for colour, (when, name) in zip(COLOURS, names.items(), strict=False):
            curve = of_label[when]
            text = f"{name}, error {curve.expected_error:.3f}" if len(curve.voxels) else f"{name}, no voxels"
            axes.plot(curve.probability, curve.frequency, marker="o", markersize=3, color=colour, label=text)
        axes.legend(loc="upper left", fontsize=8)
        axes.set(xlim=(0, 1), ylim=(0, 1), title=label, xlabel="Probability", ylabel="Share of voxels in the class")
    return figure
