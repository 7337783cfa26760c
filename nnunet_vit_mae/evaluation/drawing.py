"""What the figures of an evaluation share: style, colours of models, axes and panels.

A model has the same colour and marker in all figures. The colours are Okabe and Ito's, which colour-blind readers can
tell apart; the markers distinguish models in greyscale.
"""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from nnunet_vit_mae.evaluation.words import TITLES, UNITS, axis_text
from nnunet_vit_mae.plots import names_as_written, save_figure

P = ParamSpec("P")

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that figures look the same everywhere
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
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")  # one more than colours, so that 56 models look different
LINE = "#555555"
WIDTH = 8.0  # inches: the width of a page
PER_ROW = 3  # panels


def save_both(figure: Figure, file: Path) -> list[Path]:
    """Write a figure as PNG and SVG.

    Args:
        figure: The figure.
        file: Path without a suffix.

    Returns:
        The files written.
    """
    files = [file.with_name(f"{file.name}.{suffix}") for suffix in ("png", "svg")]
    for path in files:
        save_figure(figure, path, dpi=200)
    return files


def styled(function: Callable[P, Figure]) -> Callable[P, Figure]:
    """Decorate a function to draw in our style, without changing matplotlib's settings."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with rc_context(STYLE), names_as_written():
            figure = function(*args, **kwargs)
            figure.draw_without_rendering()  # ticks take the settings of the moment when they are first drawn
            return figure

    return wrapped


@dataclass(frozen=True)
class ModelStyle:
    """Colour and marker of a model."""

    colour: str
    marker: str

    def points(self, size: float) -> dict:
        """Return arguments of `scatter` for points of a size."""
        return {"s": size, "marker": self.marker, "facecolor": self.colour, "alpha": 0.75, "linewidth": 0}


def model_styles(models: Iterable[str]) -> dict[str, ModelStyle]:
    """Return a colour and a marker for each model."""
    return {
        model: ModelStyle(COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)])
        for number, model in enumerate(models)
    }


@dataclass(frozen=True)
class Scale:
    """The scale of an axis that starts at zero: linear, or logarithmic above `threshold`."""

    top: float
    threshold: float | None = None

    @classmethod
    def around(cls, values: np.ndarray, ratio: float = 8) -> Scale:
        """Choose a logarithmic scale when the largest value exceeds `ratio` times the median."""
        positive = values[np.isfinite(values) & (values > 0)]
        if not len(positive):
            return cls(1.0)
        top = float(positive.max())
        if top <= ratio * float(np.median(positive)):
            return cls(top)
        lowest = 10.0 ** math.floor(math.log10(np.percentile(positive, 5)))
        return cls(top, max(lowest, 10.0 ** (math.floor(math.log10(top)) - 3)))  # at most four powers of ten

    @property
    def note(self) -> str:
        """Text after the unit."""
        return "" if self.threshold is None else ", log scale"

    @property
    def limits(self) -> tuple[float, float]:
        """Ends of the axis."""
        if self.threshold is None:
            return -0.04 * self.top, 1.06 * self.top
        return -0.25 * self.threshold, 1.4 * self.top

    @property
    def ticks(self) -> list[float]:
        """Ticks of a logarithmic scale."""
        assert self.threshold is not None
        powers = range(round(math.log10(self.threshold)), math.floor(math.log10(self.top)) + 1)
        steps = (1,) if len(powers) > 2 else (1, 2, 5)
        ticks = [step * 10.0**power for power in powers for step in steps]
        return [0.0, *(tick for tick in ticks if tick <= self.limits[1])]

    def apply(self, axes: Axes, axis: str) -> None:
        """Give the axis "x" or "y" this scale."""
        if self.threshold is not None:
            getattr(axes, f"set_{axis}scale")("symlog", linthresh=self.threshold, linscale=0.5)
            getattr(axes, f"set_{axis}ticks")(self.ticks, minor=False)
            getattr(axes, f"set_{axis}ticks")([], minor=True)
        getattr(axes, f"{axis}axis").set_major_formatter(FuncFormatter(format_tick))
        getattr(axes, f"set_{axis}lim")(*self.limits)


def format_tick(value: float, _position: int | None = None) -> str:
    """Format a tick, as matplotlib's `FuncFormatter` calls it."""
    return axis_text(value)


def _percent_tick(value: float, _position: int | None = None) -> str:
    return f"{axis_text(100 * value)}%"


def label_y_axis(axes: Axes, column: str, scale: Scale | None) -> None:
    """Label the y axis with a column, and give it a scale; without one it shows shares from 0 to 1."""
    note = ", ".join(filter(None, [UNITS.get(column, ""), scale.note.strip(", ") if scale else ""]))
    title = "|Volume difference| / reference volume" if column == "relative_difference" else TITLES.get(column, column)
    axes.set_ylabel(f"{title} ({note})" if note else title)
    if scale:
        scale.apply(axes, "y")
        if column == "relative_difference":
            axes.yaxis.set_major_formatter(FuncFormatter(_percent_tick))
    else:
        axes.set_ylim(-0.03, 1.03)


def draw_box(axes: Axes, values: np.ndarray, place: float, width: float, style: ModelStyle) -> None:
    """Draw a box plot with whiskers to 1.5 times the interquartile range, and the mean; none below five values."""
    values = values[np.isfinite(values)]
    if len(values) < 5:
        return
    axes.boxplot(
        [values],
        positions=[place],
        widths=width,
        showfliers=False,  # every case is drawn as a point anyway
        patch_artist=True,
        manage_ticks=False,
        showmeans=True,
        boxprops={"facecolor": f"{style.colour}40", "edgecolor": style.colour, "linewidth": 1},
        medianprops={"color": "black", "linewidth": 1.4},
        whiskerprops={"color": style.colour, "linewidth": 1},
        capprops={"color": style.colour, "linewidth": 1},
        meanprops={"marker": "D", "markersize": 4.5, "markerfacecolor": "white", "markeredgecolor": "black"},
        zorder=2,
    )


def make_panels(names: Sequence[str], height: float) -> tuple[Figure, list[Axes]]:
    """Make a figure with a panel of the same size for each name, three in a row."""
    columns = min(PER_ROW, max(1, len(names)))
    rows = max(1, math.ceil(len(names) / columns))
    width = WIDTH if columns == PER_ROW else (4.4 if columns == 1 else 7.2)
    figure = Figure(figsize=(width, height * rows + (0.6 if columns < PER_ROW else 0)), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    return figure, panels[: len(names)]


def draw_legend(figure: Figure, panels: Iterable[Axes], names: Iterable[str], columns: int = 4) -> None:
    """Draw one legend below all panels, of the names that occur in any of them."""
    drawn = [axes.get_legend_handles_labels() for axes in panels]
    lines = {name: line for panel in reversed(drawn) for line, name in zip(*panel, strict=True)}
    known = [name for name in names if name in lines]
    handles = [lines[name] for name in known]
    figure.legend(handles, known, loc="outside lower center", ncols=columns, frameon=False)


def range_with_margin(values: Iterable[float]) -> tuple[float, float]:
    """Return limits of an axis that show all finite values."""
    finite = [float(value) for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    margin = 0.06 * (high - low) or 1.0
    return low - margin, high + margin


def point_offsets(number: int) -> np.ndarray:
    """Return offsets within ±0.11 that keep neighbouring points apart; they are not random."""
    return (np.arange(number) * 0.6180339887 % 1 - 0.5) * 0.22


def wrap_name(name: str, width: int) -> str:
    """Break a name into lines."""
    return "\n".join(textwrap.wrap(name, width)) or name
