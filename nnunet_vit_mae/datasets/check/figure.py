"""The figure of `mae3d_check`: spacings, label volumes, and the intensities of every case, with outliers by name."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from nnunet_vit_mae.datasets.check.inspection import CaseSummary, ChannelSummary
from nnunet_vit_mae.datasets.contrasts.record import Channels
from nnunet_vit_mae.imaging.labels import Labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOLDER_COLOURS = {"imagesTr": "tab:blue", "imagesTs": "tab:orange", "imagesUn": "tab:gray"}
NAMED = 12  # at most this many outliers are named
MOST_TICKS = 40  # at most this many cases are named on the axis
FEW_VALUES = 12  # at most this many spacings get a bar each
WIDE = 20  # ratio of volumes from which the axis is logarithmic


def check_figure(
    cases: Sequence[CaseSummary], channels: Channels, labels: Labels, outliers: Sequence[Collection[str]]
) -> Figure:
    """Draw spacings and label volumes above and a row for each channel below; `outliers` holds cases by channel."""
    from nnunet_vit_mae.plots import names_as_written

    with names_as_written():
        return _check_figure(cases, channels, labels, outliers)


def _check_figure(
    cases: Sequence[CaseSummary], channels: Channels, labels: Labels, outliers: Sequence[Collection[str]]
) -> Figure:
    from matplotlib.figure import Figure

    rows = len(channels.names)
    figure = Figure(figsize=(11, 3.4 + 2.9 * rows), layout="constrained")
    grid = figure.add_gridspec(rows + 1, 6, height_ratios=[1.1] + [1] * rows)
    thickness = [case.thickness for case in cases if case.geometry]
    finest = [min(case.geometry.spacing) for case in cases if case.geometry]
    _draw_spacings(figure.add_subplot(grid[0, :2]), thickness, "slice thickness (largest spacing), mm")
    _draw_spacings(figure.add_subplot(grid[0, 2:4]), finest, "smallest spacing, mm")
    _draw_label_volumes(figure.add_subplot(grid[0, 4:]), cases, labels)
    for number, name in enumerate(channels.headings):
        axes = figure.add_subplot(grid[number + 1, :])
        _draw_intensities(axes, [case for case in cases if number in case.channels], number, name, outliers[number])
    return figure


def _draw_spacings(axes: Axes, values: Sequence[float], title: str) -> None:
    axes.set_title(title, fontsize=9)
    rounded, counts = np.unique(np.round(values, 2), return_counts=True)
    if len(rounded) <= FEW_VALUES:
        axes.bar([f"{value:g}" for value in rounded], counts, color="tab:blue", width=0.5)
        axes.set_xlim(-1, len(rounded))
        axes.tick_params(axis="x", labelsize=8, rotation=45 if len(rounded) > 6 else 0)
    else:
        axes.hist(values, bins=20, color="tab:blue")
    axes.set_ylabel("images")


def _draw_label_volumes(axes: Axes, cases: Sequence[CaseSummary], labels: Labels) -> None:
    """Draw ascending volumes of each label in ml; the legend counts cases without it, as a logarithm has no zero."""
    from matplotlib.ticker import FuncFormatter

    labelled = [case for case in cases if case.volumes is not None and case.folder == "imagesTr"]
    axes.set_title("label volume of training cases, ml", fontsize=9)
    for name, values in labels.values.items():
        volumes = [sum((case.volumes or {}).get(value, 0.0) for value in values) / 1000 for case in labelled]
        present = sorted(volume for volume in volumes if volume)
        absent = len(volumes) - len(present)
        caption = f"{name} ({absent} without)" if absent else name
        axes.plot(np.arange(1, len(present) + 1), present, marker=".", markersize=4, linewidth=1, label=caption)
    axes.set_xlabel("cases, smallest first", fontsize=8)
    drawn = [volume for line in axes.get_lines() for volume in np.asarray(line.get_ydata())]
    if drawn and max(drawn) > WIDE * min(drawn):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda volume, _: f"{volume:g}"))
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if labels.values:
        axes.legend(fontsize=7)


def _draw_intensities(
    axes: Axes, cases: Sequence[CaseSummary], number: int, name: str, outliers: Collection[str]
) -> None:
    """Draw the 1st to 99th percentile of each case as a bar and the median as a dot; outliers are red."""
    title = f"{name}: 1st to 99th percentile and median of each of {len(cases)} images, {len(outliers)} outliers (red)"
    axes.set_title(title, fontsize=9, loc="left")
    for folder, colour in FOLDER_COLOURS.items():
        for is_outlier in (False, True):
            places = [
                place
                for place, case in enumerate(cases)
                if case.folder == folder and (str(case) in outliers) == is_outlier
            ]
            channels = [cases[place].channels[number] for place in places]
            if channels:
                width = float(np.clip(400 / len(cases), 0.5, 4))
                label = None if is_outlier else folder
                _draw_channels(axes, places, channels, "tab:red" if is_outlier else colour, width, label)
    named = [(place, case) for place, case in enumerate(cases) if str(case) in outliers][:NAMED]
    if len(cases) <= MOST_TICKS:
        rotation = 60 if len(cases) > 12 else 0
        axes.set_xticks(range(len(cases)), [case.name for case in cases], rotation=rotation, fontsize=7)
        for tick, case in zip(axes.get_xticklabels(), cases, strict=True):
            tick.set_color("tab:red" if str(case) in outliers else "black")
    else:
        _name_outliers(axes, [(place, case.name, case.channels[number].p99) for place, case in named])
        axes.set_xlabel("images, by folder and name", fontsize=8)
    axes.set_xlim(-1, max(1, len(cases)))
    axes.margins(y=0.18 if named else 0.05)
    axes.grid(alpha=0.3, axis="y")
    if cases:
        axes.legend(fontsize=7, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, borderaxespad=0)


def _draw_channels(
    axes: Axes,
    places: Sequence[int],
    channels: Sequence[ChannelSummary],
    colour: str,
    width: float,
    label: str | None,
) -> None:
    low, high = [channel.p1 for channel in channels], [channel.p99 for channel in channels]
    axes.vlines(places, low, high, colour, linewidth=width, alpha=0.6)
    axes.plot(
        places,
        [channel.median for channel in channels],
        "o",
        color=colour,
        markersize=3,
        markeredgecolor="white",
        markeredgewidth=0.5,
        label=label,
    )


def _name_outliers(axes: Axes, named: Sequence[tuple[int, str, float]]) -> None:
    """Write the names of cases at their place and height."""
    for place, name, height in named:
        axes.annotate(
            name,
            (place, height),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=7,
            color="tab:red",
            rotation=25,
            bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.5},
        )
