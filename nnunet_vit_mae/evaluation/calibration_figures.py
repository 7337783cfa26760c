"""Figures of a calibration: loss and Dice against the threshold, and agreement before and after (ViTiac, figure 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from nnunet_vit_mae.evaluation.figures import COLOURS, bland_altman_figure, styled
from nnunet_vit_mae.evaluation.results import Evaluation
from nnunet_vit_mae.evaluation.summary import agreement
from nnunet_vit_mae.thresholds import LOG_ODDS_LIMIT, Curve, Volumes

TICKS = np.array([0.001, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98, 0.999])
WHEN = {"before calibration": "before_mm3", "after calibration": "after_mm3"}


@styled
def curve_figure(curves: Mapping[str, Curve], thresholds: Sequence[float]) -> Figure:
    """A row for each class: mean absolute volume difference (left axis) and mean Dice (right) by threshold."""
    figure = Figure(figsize=(7, 2.9 * len(curves)), layout="constrained")
    rows = figure.subplots(len(curves), squeeze=False)[:, 0]
    for axes, (label, curve), threshold in zip(rows, curves.items(), thresholds, strict=True):
        axes.plot(_log_odds(curve.thresholds), curve.difference_mm3, color=COLOURS[0])
        axes.set_ylabel("Mean absolute volume\ndifference (mm³)", color=COLOURS[0])
        # everything above, where most of an image is called foreground, would flatten what matters
        shown = np.interp([0.5, threshold, 1.0], curve.thresholds, curve.difference_mm3)
        axes.set_ylim(0, 2 * max(shown.max(), 1e-6))
        right = axes.twinx()
        right.plot(_log_odds(curve.thresholds), curve.dice, color=COLOURS[1], linestyle="--")
        right.set_ylabel("Mean Dice (dashed)", color=COLOURS[1])
        right.set_ylim(0, 1)
        for place, name, style in ((0.5, "nnU-Net: 0.5", ":"), (threshold, f"calibrated: {threshold:.3g}", "-")):
            axes.axvline(_log_odds(place), color="black", linewidth=1, linestyle=style, label=name)
        axes.legend(loc="upper right", fontsize=8)
        axes.set_xticks(_log_odds(TICKS), [f"{tick:g}" for tick in TICKS])
        axes.set(
            xlim=(-LOG_ODDS_LIMIT, LOG_ODDS_LIMIT),
            xlabel="Threshold on the probability (axis in log odds)",
            title=label,
        )
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    return figure


def agreement_figure(volumes: Sequence[Volumes], label: str) -> Figure:
    """Bland-Altman plots of one class, on the cases that the threshold was fitted to."""
    rows = pd.DataFrame([asdict(row) for row in volumes if row.label == label])
    cases = pd.concat(
        [rows.assign(model=model, predicted_mm3=rows[column]) for model, column in WHEN.items()], ignore_index=True
    )
    found = tuple(
        agreement(model, label, (rows[column] - rows["reference_mm3"]).to_numpy()) for model, column in WHEN.items()
    )
    return bland_altman_figure(Evaluation(tuple(WHEN), (label,), cases, (), (), found, (), (), {}), label)


def _log_odds(probabilities: np.ndarray | float) -> np.ndarray:
    return np.log(probabilities / (1 - np.asarray(probabilities)))
