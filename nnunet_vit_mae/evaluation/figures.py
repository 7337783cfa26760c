"""Figures of an evaluation: one function each, an `Evaluation` and a label in, a matplotlib figure out.

A model has one colour and one marker in all of them. The colours are Okabe and Ito's, which colour-blind people tell
apart; the markers do the same in grey.
"""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ParamSpec

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from nnunet_vit_mae.evaluation.results import Bin, Evaluation
from nnunet_vit_mae.evaluation.words import MINUS, TITLES, UNITS, correct, interval, number, rows_of, tick
from nnunet_vit_mae.plots import save_figure

P = ParamSpec("P")

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # matplotlib has it, so that a figure looks the same everywhere
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.6,
    "text.parse_math": False,  # names come from users and may hold a dollar
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")  # not as many as colours: no two of 56 models look the same
LINE = "#555555"
WIDTH = 8.0  # inches: a page's width
PER_ROW = 3  # panels


def save_both(figure: Figure, file: Path) -> list[Path]:
    """Write a PNG to print from and an SVG that stays sharp; `file` has no suffix."""
    files = [file.with_name(f"{file.name}.{suffix}") for suffix in ("png", "svg")]
    for path in files:
        save_figure(figure, path, dpi=200)
    return files


def styled(function: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw with our style and leave matplotlib's settings as they were."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with rc_context(STYLE):
            figure = function(*args, **kwargs)
            figure.draw_without_rendering()  # ticks are made when first drawn, by the settings of that moment
            return figure

    return wrapped


# ---------- measures


@styled
def measures_figure(evaluation: Evaluation, label: str) -> Figure:
    """Dice and absolute volume difference: a box and a point per case for each model, lines join the same case."""
    crowded = len(evaluation.models) > 4  # names stand upright then
    figure = Figure(figsize=(WIDTH, 5.2 if crowded else 3.9), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)  # type: ignore[union-attr]
    for axes, column in zip(figure.subplots(1, 2), ("dice", "absolute_difference_mm3"), strict=True):
        table = _pivot(evaluation, label, column)
        scale = Scale.around(table) if column != "dice" else None
        for offset, values in zip(_offsets(len(table)), table, strict=True):
            axes.plot(np.arange(len(values)) + 0.22 + offset, values, color="#b5b5b5", linewidth=0.5, zorder=1)
        for place, look in enumerate(model_styles(evaluation.models).values()):
            values = table[:, place]
            _box(axes, values, place - 0.14, 0.26, look)
            axes.scatter(place + 0.22 + _offsets(len(values)), values, **look.points(16), zorder=3)
        names = [_wrapped(model, 20 if crowded else 15) for model in evaluation.models]
        axes.set_xticks(range(len(names)), names, rotation=90 if crowded else 0)
        axes.set_xlim(-0.5, len(evaluation.models) - 0.5)
        axes.grid(axis="y")
        _name_axis(axes, "y", column, scale)
    return figure


# ---------- volumes


@styled
def bland_altman_figure(evaluation: Evaluation, label: str) -> Figure:
    """Predicted minus annotated volume over the mean of both, with bias and limits of agreement (ViTiac, figure 4)."""
    agreements = {entry.model: entry for entry in evaluation.agreements if entry.label == label}
    figure, panels = _panels(evaluation.models, height=3.3)
    middles, differences = [], []
    for axes, (model, look) in zip(panels, model_styles(evaluation.models).items(), strict=True):
        annotated, predicted = _volumes(evaluation, model, label)
        middles.extend((annotated + predicted) / 2)
        differences.extend(predicted - annotated)
        axes.scatter((annotated + predicted) / 2, predicted - annotated, **look.points(20), zorder=3)
        axes.set_title(_wrapped(model, 26), fontweight="bold")
        axes.set_xlabel("Mean of both volumes (mm³)")
    lines = [[agreements[m].upper, agreements[m].bias, agreements[m].lower] for m in agreements]
    low, high = _range([*differences, *(value for three in lines for value in three), 0.0])
    for place, (axes, model) in enumerate(zip(panels, evaluation.models, strict=True)):
        axes.axhline(0, color="#c8c8c8", linewidth=0.8, zorder=0)
        axes.set(xlim=_range([0.0, *middles]), ylim=(low, high))
        axes.xaxis.set_major_formatter(FuncFormatter(_tick))
        axes.yaxis.set_major_formatter(FuncFormatter(_tick))
        axes.locator_params(axis="x", nbins=4)
        axes.tick_params(labelleft=place % PER_ROW == 0)
        if place % PER_ROW == 0:
            axes.set_ylabel(f"Predicted {MINUS} annotated (mm³)")
        if model in agreements:
            entry = agreements[model]
            named = {"+1.96 SD": entry.upper, "bias": entry.bias, f"{MINUS}1.96 SD": entry.lower}
            _name_lines(axes, {name: value for name, value in named.items() if math.isfinite(value)}, (low, high))
    return figure


def _name_lines(axes: Axes, values: dict[str, float], limits: tuple[float, float]) -> None:
    """Draw horizontal lines and write what they are to their right, apart from each other where they are close."""
    places = _apart(list(values.values()), 0.13 * (limits[1] - limits[0]), limits)
    texts = number("difference_mm3", *values.values())
    for (name, value), place, text in zip(values.items(), places, texts, strict=True):
        axes.axhline(value, color="black", linewidth=1.1, linestyle="-" if name == "bias" else "--", zorder=2)
        weight = "bold" if name == "bias" else "normal"
        inside = {"xycoords": ("axes fraction", "data"), "va": "center", "annotation_clip": False}
        axes.annotate(f"{name}\n{text}", (1.03, place), **inside, fontsize=8, fontweight=weight)


def _apart(values: Sequence[float], gap: float, limits: tuple[float, float]) -> list[float]:
    """Descending values moved as little as needed to lie `gap` apart, and within the limits."""
    middle = len(values) // 2
    places = list(values)
    for index in range(middle - 1, -1, -1):
        places[index] = max(places[index], places[index + 1] + gap)
    for index in range(middle + 1, len(places)):
        places[index] = min(places[index], places[index - 1] - gap)
    shift = max(limits[0] - places[-1], 0.0) - max(places[0] - limits[1], 0.0) if places else 0.0
    return [place + shift for place in places]


@styled
def scatter_figure(evaluation: Evaluation, label: str) -> Figure:
    """Predicted over annotated volume with the line of identity; squares are where both are in the same risk group."""
    risks = {entry.model: entry for entry in evaluation.risks if entry.label == label}
    pairs = {model: _volumes(evaluation, model, label) for model in evaluation.models}
    scale = Scale.around(np.concatenate([np.concatenate(pair) for pair in pairs.values()]))
    figure, panels = _panels(evaluation.models, height=3.0)
    for place, (axes, (model, look)) in enumerate(zip(panels, model_styles(evaluation.models).items(), strict=True)):
        scale.apply(axes, "x")
        scale.apply(axes, "y")
        low, high = scale.limits
        axes.plot([low, high], [low, high], color=LINE, linewidth=1, zorder=2)
        edges = [low, *(risks[model].cutoffs if model in risks else ()), high]
        for start, end in pairwise(edges):
            if len(edges) > 2:
                axes.fill_between([start, end], start, end, color="#ececec", linewidth=0, zorder=0)
        for cutoff in edges[1:-1]:
            axes.axvline(cutoff, color="#9a9a9a", linewidth=0.7, linestyle=":", zorder=1)
            axes.axhline(cutoff, color="#9a9a9a", linewidth=0.7, linestyle=":", zorder=1)
        axes.scatter(*pairs[model], **look.points(20), zorder=3)
        axes.set_title(_wrapped(model, 26), fontweight="bold")
        axes.set_box_aspect(1)
        axes.set_xlabel(f"Annotated (mm³{scale.note})")
        axes.tick_params(labelleft=place % PER_ROW == 0)
        if place % PER_ROW == 0:
            axes.set_ylabel(f"Predicted (mm³{scale.note})")
    return figure


@styled
def risk_figure(evaluation: Evaluation, label: str) -> Figure:
    """Risk groups by annotated volume (rows) and by predicted volume (columns) for each model."""
    risks = {entry.model: entry for entry in evaluation.risks if entry.label == label}
    models = [model for model in evaluation.models if model in risks]
    figure, panels = _panels(models, height=3.2)
    for place, (axes, model) in enumerate(zip(panels, models, strict=True)):
        risk = risks[model]
        _confusion(axes, np.array(risk.confusion, dtype=float).reshape(len(risk.groups), len(risk.groups)))
        names = [_wrapped(group, 12) for group in risk.groups]
        upright = max(map(len, risk.groups)) * len(names) > 34
        places = np.arange(len(names)) + 0.5
        axes.set_xticks(places, names, rotation=90 if upright else 0)
        axes.set_yticks(places, names if place % PER_ROW == 0 else [""] * len(names))
        axes.set_xlabel("Group by predicted volume")
        if place % PER_ROW == 0:
            axes.set_ylabel("Group by annotated volume")
        axes.set_title(f"{_wrapped(model, 26)}\n", fontweight="bold")
        axes.annotate(correct(risk), (0.5, 1.02), xycoords="axes fraction", ha="center", va="bottom")
    return figure


def _confusion(axes: Axes, counts: np.ndarray) -> None:
    rows = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, rows, out=np.zeros_like(counts), where=rows > 0)
    axes.pcolormesh(shares, cmap="Blues", vmin=0, vmax=1.15, edgecolors="white", linewidth=1.5)
    for row, column in np.ndindex(counts.shape):
        dark, right = shares[row, column] > 0.65, row == column
        axes.text(
            column + 0.5,
            row + 0.5,
            f"{counts[row, column]:.0f}",
            ha="center",
            va="center",
            color="white" if dark else "black",
            fontsize=11,
            fontweight="bold" if right else "normal",
        )
    axes.set(xlim=(0, len(counts)), ylim=(len(counts), 0), aspect="equal")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


# ---------- bins


def bin_pairs(evaluation: Evaluation, label: str) -> list[tuple[str, str]]:
    """What was looked at by what: (measure, quantity) in the order of the evaluation."""
    return list(dict.fromkeys((entry.measure, entry.quantity) for entry in evaluation.bins if entry.label == label))


@styled
def bins_figure(evaluation: Evaluation, label: str) -> Figure:
    """Dice by slice thickness, volume difference by annotated volume: boxes (ViTiac, supplementary figure 2)."""
    pairs = bin_pairs(evaluation, label)
    figure = Figure(figsize=(WIDTH, 3.2 * len(pairs) + 0.4), layout="constrained")
    figure.get_layout_engine().set(hspace=0.08)  # type: ignore[union-attr]
    for axes, (measure, quantity) in zip(figure.subplots(len(pairs), squeeze=False)[:, 0], pairs, strict=True):
        bins = [b for b in evaluation.bins if (b.label, b.measure, b.quantity) == (label, measure, quantity)]
        _bins_panel(axes, evaluation, bins)
    handles = [
        figure.axes[0].scatter([], [], **look.points(28), label=_wrapped(model, 30))
        for model, look in model_styles(evaluation.models).items()
    ]
    if len(evaluation.models) > 1:
        figure.legend(handles=handles, loc="outside upper center", ncols=min(4, len(handles)), frameon=False)
    return figure


def _bins_panel(axes: Axes, evaluation: Evaluation, bins: Sequence[Bin]) -> None:
    measure, quantity = bins[0].measure, bins[0].quantity
    ranges = sorted({(entry.low, entry.high) for entry in bins})
    rows = rows_of(evaluation, bins[0].label)
    scale = None
    if measure.endswith("difference"):  # a small volume may be wrong by many times itself
        scale = Scale.around(rows[measure].to_numpy(dtype=float), ratio=25)
    step = 0.8 / len(evaluation.models)
    for place, (low, high) in enumerate(ranges):
        if place % 2:
            axes.axvspan(place - 0.5, place + 0.5, color="#f6f6f6", linewidth=0, zorder=0)
        for index, (model, look) in enumerate(model_styles(evaluation.models).items()):
            size = rows[quantity].to_numpy(dtype=float)
            inside = (size <= high) & ((size >= low) if place == 0 else (size > low))
            values = rows[measure].to_numpy(dtype=float)[inside & (rows["model"] == model).to_numpy()]
            centre = place + (index - (len(evaluation.models) - 1) / 2) * step
            _box(axes, values, centre, 0.78 * step, look)
            axes.scatter(centre + step * _offsets(len(values)), values, **look.points(12), zorder=3)
    counts = {edges: max(entry.n for entry in bins if (entry.low, entry.high) == edges) for edges in ranges}
    axes.set_xticks(
        range(len(ranges)),
        [f"{interval(*edges, first=not place)}\nn = {counts[edges]}" for place, edges in enumerate(ranges)],
    )
    axes.set_xlim(-0.5, len(ranges) - 0.5)
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel(f"{TITLES.get(quantity, quantity)} ({UNITS.get(quantity, '')})".replace(" ()", ""))
    axes.grid(axis="y")
    _name_axis(axes, "y", measure, scale)


# ---------- parts


@dataclass(frozen=True)
class ModelStyle:
    """How a model is drawn."""

    colour: str
    marker: str

    def points(self, size: float) -> dict:
        """Arguments of `scatter`."""
        return {"s": size, "marker": self.marker, "facecolor": self.colour, "alpha": 0.75, "linewidth": 0}


def model_styles(models: Iterable[str]) -> dict[str, ModelStyle]:
    """A colour and a marker for each model."""
    return {
        model: ModelStyle(COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)])
        for number, model in enumerate(models)
    }


@dataclass(frozen=True)
class Scale:
    """An axis from zero: linear, or logarithmic above `threshold` where some values dwarf the others."""

    top: float
    threshold: float | None = None

    @classmethod
    def around(cls, values: np.ndarray, ratio: float = 8) -> Scale:
        """Logarithmic when the largest is above `ratio` times the middle."""
        positive = values[np.isfinite(values) & (values > 0)]
        if not len(positive):
            return cls(1.0)
        top = float(positive.max())
        if top <= ratio * float(np.median(positive)):
            return cls(top)
        lowest = 10.0 ** math.floor(math.log10(np.percentile(positive, 5)))
        return cls(top, max(lowest, 10.0 ** (math.floor(math.log10(top)) - 3)))  # four powers of ten are enough

    @property
    def note(self) -> str:
        return "" if self.threshold is None else ", log scale"

    @property
    def limits(self) -> tuple[float, float]:
        if self.threshold is None:
            return -0.04 * self.top, 1.06 * self.top
        return -0.25 * self.threshold, 1.4 * self.top

    @property
    def ticks(self) -> list[float]:
        assert self.threshold is not None
        powers = range(round(math.log10(self.threshold)), math.floor(math.log10(self.top)) + 1)
        steps = (1,) if len(powers) > 2 else (1, 2, 5)
        ticks = [step * 10.0**power for power in powers for step in steps]
        return [0.0, *(tick for tick in ticks if tick <= self.limits[1])]

    def apply(self, axes: Axes, axis: str) -> None:
        """Give the axis x or y this scale."""
        if self.threshold is not None:
            getattr(axes, f"set_{axis}scale")("symlog", linthresh=self.threshold, linscale=0.5)
            getattr(axes, f"set_{axis}ticks")(self.ticks, minor=False)
            getattr(axes, f"set_{axis}ticks")([], minor=True)
        getattr(axes, f"{axis}axis").set_major_formatter(FuncFormatter(_tick))
        getattr(axes, f"set_{axis}lim")(*self.limits)


def _tick(value: float, _position: int | None = None) -> str:
    return tick(value)


def _percent_tick(value: float, _position: int | None = None) -> str:
    return f"{tick(100 * value)}%"


def _name_axis(axes: Axes, axis: str, column: str, scale: Scale | None) -> None:
    note = ", ".join(filter(None, [UNITS.get(column, ""), scale.note.strip(", ") if scale else ""]))
    title = "|Volume difference| / annotated volume" if column == "relative_difference" else TITLES.get(column, column)
    getattr(axes, f"set_{axis}label")(f"{title} ({note})" if note else title)
    if scale:
        scale.apply(axes, axis)
        if column == "relative_difference":
            getattr(axes, f"{axis}axis").set_major_formatter(FuncFormatter(_percent_tick))
    else:
        getattr(axes, f"set_{axis}lim")(-0.03, 1.03)


def _box(axes: Axes, values: np.ndarray, place: float, width: float, look: ModelStyle) -> None:
    """Median, quartiles, whiskers to 1.5 times their distance, and the mean; of fewer than five values nothing."""
    values = values[np.isfinite(values)]
    if len(values) < 5:
        return
    axes.boxplot(
        [values],
        positions=[place],
        widths=width,
        showfliers=False,  # the points are drawn anyway
        patch_artist=True,
        manage_ticks=False,
        showmeans=True,
        boxprops={"facecolor": f"{look.colour}40", "edgecolor": look.colour, "linewidth": 1},
        medianprops={"color": "black", "linewidth": 1.4},
        whiskerprops={"color": look.colour, "linewidth": 1},
        capprops={"color": look.colour, "linewidth": 1},
        meanprops={"marker": "D", "markersize": 4.5, "markerfacecolor": "white", "markeredgecolor": "black"},
        zorder=2,
    )


def _panels(names: Sequence[str], height: float) -> tuple[Figure, list[Axes]]:
    """A panel of the same size for each name, three in a row."""
    columns = min(PER_ROW, max(1, len(names)))
    rows = max(1, math.ceil(len(names) / columns))
    width = WIDTH if columns == PER_ROW else (4.4 if columns == 1 else 7.2)
    figure = Figure(figsize=(width, height * rows + (0.6 if columns < PER_ROW else 0)), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    return figure, panels[: len(names)]


def _pivot(evaluation: Evaluation, label: str, column: str) -> np.ndarray:
    """A row for each case, a column for each model; NaN where there is no value."""
    rows = rows_of(evaluation, label)
    table = rows.pivot(index="case", columns="model", values=column).reindex(columns=list(evaluation.models))
    return table.to_numpy(dtype=float)


def _volumes(evaluation: Evaluation, model: str, label: str) -> tuple[np.ndarray, np.ndarray]:
    """Annotated and predicted volume of each case."""
    rows = rows_of(evaluation, label, model)
    annotated = rows["reference_mm3"].to_numpy(dtype=float)
    predicted = rows["predicted_mm3"].to_numpy(dtype=float)
    known = np.isfinite(annotated) & np.isfinite(predicted)
    return annotated[known], predicted[known]


def _range(values: Iterable[float]) -> tuple[float, float]:
    finite = [float(value) for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    margin = 0.06 * (high - low) or 1.0
    return low - margin, high + margin


def _offsets(number: int) -> np.ndarray:
    """Places within ±0.11 that keep neighbours apart and are the same each time."""
    return (np.arange(number) * 0.6180339887 % 1 - 0.5) * 0.22


def _wrapped(name: str, width: int) -> str:
    return "\n".join(textwrap.wrap(name, width)) or name
