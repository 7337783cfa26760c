"""The picture of `mae3d_check`: spacings, label volumes, and the intensities of every case, with outliers by name."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from nnunet_vit_mae.datasets.check.inspection import CaseSummary
from nnunet_vit_mae.datasets.contrasts import Channels
from nnunet_vit_mae.imaging.labels import Labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOLDER_COLOURS = {"imagesTr": "tab:blue", "imagesTs": "tab:orange", "imagesUn": "tab:gray"}
NAMED = 12  # outliers that have room for their names
MOST_TICKS = 40  # cases that have room for their names on the axis
FEW_VALUES = 12  # spacings that get a bar each
WIDE = 20  # ratio of volumes that needs a logarithm


def draw(
    looks: Sequence[CaseSummary], channels: Channels, labels: Labels, outliers: Sequence[Collection[str]]
) -> Figure:
    """Spacings and label volumes above, a row for each channel below; `outliers` are cases of each channel."""
    from matplotlib.figure import Figure

    rows = len(channels.names)
    figure = Figure(figsize=(11, 3.4 + 2.9 * rows), layout="constrained")
    grid = figure.add_gridspec(rows + 1, 6, height_ratios=[1.1] + [1] * rows)
    having = [look for look in looks if look.geometry]
    thickness = [look.thickness for look in having]
    finest = [min(look.geometry.spacing) for look in having if look.geometry]
    _spacings(figure.add_subplot(grid[0, :2]), thickness, "slice thickness (largest spacing), mm")
    _spacings(figure.add_subplot(grid[0, 2:4]), finest, "smallest spacing, mm")
    _volumes(figure.add_subplot(grid[0, 4:]), looks, labels)
    for number, name in enumerate(channels.names):
        _intensities(figure.add_subplot(grid[number + 1, :]), looks, number, name, outliers[number])
    return figure


def _spacings(axes: Axes, values: Sequence[float], title: str) -> None:
    axes.set_title(title, fontsize=9)
    rounded, counts = np.unique(np.round(values, 2), return_counts=True)
    if len(rounded) <= FEW_VALUES:
        axes.bar([f"{value:g}" for value in rounded], counts, color="tab:blue", width=0.5)
        axes.set_xlim(-1, len(rounded))
        axes.tick_params(axis="x", labelsize=8, rotation=45 if len(rounded) > 6 else 0)
    else:
        axes.hist(values, bins=20, color="tab:blue")
    axes.set_ylabel("images")


def _volumes(axes: Axes, looks: Sequence[CaseSummary], labels: Labels) -> None:
    """Ascending volumes of each label in ml; cases without it are counted in the legend, as a logarithm has no zero."""
    from matplotlib.ticker import FuncFormatter

    labelled = [look for look in looks if look.volumes is not None and look.folder == "imagesTr"]
    axes.set_title("label volume of training cases, ml", fontsize=9)
    for name, values in labels.values.items():
        volumes = [sum((look.volumes or {}).get(value, 0.0) for value in values) / 1000 for look in labelled]
        there = sorted(volume for volume in volumes if volume)
        without = len(volumes) - len(there)
        caption = name + (f" ({without} without)" if without else "")
        axes.plot(np.arange(1, len(there) + 1), there, marker=".", markersize=4, linewidth=1, label=caption)
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


def _intensities(axes: Axes, looks: Sequence[CaseSummary], number: int, name: str, outliers: Collection[str]) -> None:
    """1st to 99th percentile of each case as a bar, the median as a dot; outliers are red."""
    having = [look for look in looks if number in look.channels]
    axes.set_title(
        f"{name}: 1st to 99th percentile and median of each of {len(having)} images, {len(outliers)} stand out (red)",
        fontsize=9,
        loc="left",
    )
    places = np.arange(len(having))
    for folder, colour in FOLDER_COLOURS.items():
        for red in (False, True):
            here = [look.folder == folder and (str(look) in outliers) == red for look in having]
            chosen = [look.channels[number] for look, wanted in zip(having, here, strict=True) if wanted]
            if not chosen:
                continue
            at = places[here]
            shown = "tab:red" if red else colour
            width = float(np.clip(400 / len(having), 0.5, 4))
            axes.vlines(at, [one.p1 for one in chosen], [one.p99 for one in chosen], shown, linewidth=width, alpha=0.6)
            axes.plot(
                at,
                [one.median for one in chosen],
                "o",
                color=shown,
                markersize=3,
                markeredgecolor="white",
                markeredgewidth=0.5,
                label=None if red else folder,
            )
    named = [(float(place), look) for place, look in zip(places, having, strict=True) if str(look) in outliers][:NAMED]
    for place, look in named if len(having) > MOST_TICKS else ():
        axes.annotate(
            look.name,
            (place, look.channels[number].p99),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=7,
            color="tab:red",
            rotation=25,
            bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.5},
        )
    if len(having) <= MOST_TICKS:
        axes.set_xticks(places, [look.name for look in having], rotation=60 if len(having) > 12 else 0, fontsize=7)
        for tick, look in zip(axes.get_xticklabels(), having, strict=True):
            tick.set_color("tab:red" if str(look) in outliers else "black")
    else:
        axes.set_xlabel("images, by folder and name", fontsize=8)
    axes.set_xlim(-1, max(1, len(having)))
    axes.margins(y=0.18 if named else 0.05)
    axes.grid(alpha=0.3, axis="y")
    if having:
        axes.legend(fontsize=7, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, borderaxespad=0)
